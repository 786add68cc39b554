"""The memory that planning takes, and its progress: both are told from the first files on."""

from collections.abc import Sequence

from wsm_ds.errors import BudgetTooSmall
from wsm_ds.layouts import Checkpoint, Layout, read_layout
from wsm_ds.layouts.detection import OnFiles
from wsm_ds.layouts.size import metadata_size
from wsm_ds.planning.window import ReadLayout
from wsm_ds.planning.window_recipe import WindowRecipe
from wsm_ds.sizes import format_size

FILE_BYTES = 1536
"""Of each rank file: its path, its size and times, and the CRC-32s of its records."""
ROW_BYTES = 350
"""Of each fragment of one checkpoint: its row, and the arrays in which places are found. Alike checkpoints share them.
With both figures the estimate is near the peaks that `benchmarks/plan.py` measured for 1024 ranks x 16."""


def planning_bytes(files: int, fragments: int) -> int:
    """Returns the memory that a plan takes while it is made, without the interpreter, in bytes.

    Args:
        files: rank files of all checkpoints together.
        fragments: pieces of tensors in one checkpoint: ranks x tensors at ZeRO stage 3, about ranks + tensors else.
    """
    return files * FILE_BYTES + fragments * ROW_BYTES


class PlanningMemory:
    """Reads the checkpoints of a plan within its memory budget, and counts their files.

    Args:
        recipes: of the plan.
        read: reads a layout; None: `read_layout`.
        on_files: called with the number of files that were read, and the number of all as far as it is known.

    Attributes:
        needed: memory that the plan takes, in bytes, as far as it is known.
    """

    def __init__(self, recipes: Sequence[WindowRecipe], read: ReadLayout | None, on_files: OnFiles) -> None:
        self.budget = int(recipes[0].memory_budget)
        self.checkpoints = max(recipe.last or len(recipe.tags or ()) or 1 for recipe in recipes)
        self.inner, self.on_files = read, on_files
        self.files = self.read_files = self.fragments = self.needed = 0

    def read(self, checkpoint: Checkpoint, allowed_globals: frozenset[str]) -> Layout:
        """Reads a layout.

        Raises:
            BudgetTooSmall: the plan would need more memory than the budget; the message says how much.
            WsmError: as `read_layout`.
        """
        size = metadata_size(checkpoint, allowed_globals)
        self.checkpoints -= 1
        self.files += size.files
        self.fragments = max(self.fragments, size.fragments)
        total = self.files + max(self.checkpoints, 0) * size.files
        self.needed = needed = planning_bytes(total, self.fragments)
        if needed > self.budget:
            raise BudgetTooSmall(
                f"--memory-budget: {format_size(self.budget)} are too little to plan this merge: {total} rank files "
                f"and {self.fragments} fragments need about {format_size(needed)}. Give at least that much, or merge "
                "fewer checkpoints."
            )
        before = self.read_files
        self.read_files += size.files
        if self.inner is not None:
            return self.inner(checkpoint, allowed_globals)
        return read_layout(checkpoint, allowed_globals, lambda done, _: self.on_files(before + done, total))

"""File names of a ZeRO checkpoint: which rank wrote each file, and which files a complete checkpoint has."""

import re
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from wsm_ds.errors import BrokenCheckpoint, UnsupportedLayout, few

# `_get_ckpt_name`, runtime/engine.py:4336: without `zero_pp_rank_N` in stages 0 to 2.
MODEL_FILE = re.compile(r"^(?:zero_pp_rank_(?P<dp>\d+)_)?mp_rank_(?P<mp>\d+)_model_states\.pt$")
# `_get_rank_zero_ckpt_name`, runtime/engine.py:4322. Older versions wrote no underscore before "optim_states" (:4793).
OPTIM_FILE = re.compile(r"^(?:bf16_)?zero_pp_rank_(?P<dp>\d+)_mp_rank_(?P<mp>\d+)_?optim_states\.pt$")
UNSUPPORTED = (
    # `_get_optimizer_ckpt_name`, runtime/engine.py:4362
    (re.compile(r"^expp_rank_"), "native MoE experts without ZeRO (stage 0)"),
    # runtime/model_checkpointing/writer_factory.py:39
    (re.compile(r"\.pt-\d+\.\d+$"), "pieces written by DeepSpeed's fast writer"),
    # runtime/engine.py:4941
    (re.compile(r"^offloaded_tensors$"), "NVMe-offloaded optimizer states"),
)


class Rank(NamedTuple):
    """The model-parallel and the data-parallel rank that wrote a file. Ranks sort in this order."""

    mp: int
    dp: int

    def __str__(self) -> str:
        return f"zero_pp_rank_{self.dp}_mp_rank_{self.mp:02d}"


class RankCounts(NamedTuple):
    """The numbers of model-parallel ranks (tensor-parallel ranks times pipeline stages) and data-parallel ranks."""

    mp: int
    dp: int

    def __str__(self) -> str:
        return f"{self.dp} data-parallel and {self.mp} model-parallel ranks"


def refuse_unsupported(path: Path, entries: list[str]) -> None:
    """Raises UnsupportedLayout if the folder `path` holds files of a format that this version does not read."""
    for pattern, feature in UNSUPPORTED:
        hits = [name for name in entries if pattern.search(name)]
        if hits:
            raise UnsupportedLayout(f"{path} holds {feature} ({few(hits, 2)}), which this version does not read.")


def files_by_rank(path: Path, entries: list[str], pattern: re.Pattern[str]) -> dict[Rank, str]:
    """Names of the files that match `pattern`, by the rank that wrote them, in the order of ranks.

    Args:
        path: the checkpoint's folder, for the message.
        entries: names of files in it.
        pattern: `MODEL_FILE` or `OPTIM_FILE`.

    Raises:
        BrokenCheckpoint: one rank has two files; both are named.
    """
    names: dict[Rank, str] = {}
    for name in entries:
        match = pattern.match(name)
        if not match:
            continue
        rank = Rank(int(match["mp"]), int(match["dp"] or 0))
        if rank in names:
            raise BrokenCheckpoint(
                f"{path} holds two files of {rank}: {names[rank]} and {name}. Two runs were saved into one folder; "
                "remove the stale one."
            )
        names[rank] = name
    return dict(sorted(names.items()))


def require_files(path: Path, file_type: str, names: dict[Rank, str], counts: RankCounts) -> None:
    """Raises BrokenCheckpoint unless each rank has its file, and no other file is there.

    Args:
        path: the checkpoint's folder, for the message.
        file_type: "model file" or "optimizer file".
        names: the existing files, as `files_by_rank` returns them.
        counts: the numbers of ranks, each of which must have a file. They come from a file that may be broken, and
            can be huge. So the search ends after the few missing ranks that the message names.
    """
    ranks = (Rank(mp, dp) for mp in range(counts.mp) for dp in range(counts.dp))
    suffix = "optim_states.pt" if file_type == "optimizer file" else "model_states.pt"
    example = next(iter(names.values()), f"{Rank(0, 0)}_{suffix}")
    missing = list(islice((_name_of(rank, example) for rank in ranks if rank not in names), 6))
    total, present = counts.mp * counts.dp, sum(rank.mp < counts.mp and rank.dp < counts.dp for rank in names)
    if missing:
        raise BrokenCheckpoint(
            f"{path} is incomplete: {total - present} of {total} ranks' {file_type}s are missing: "
            f"{few(missing, total=total - present)}."
        )
    if len(names) > total:
        raise BrokenCheckpoint(
            f"{path} holds {file_type}s of {len(names)} ranks, but was saved by {total}: files of another save remain. "
            "Remove them."
        )


def _name_of(rank: Rank, example: str) -> str:
    """The name of a rank's file, in the form that another rank's file has: prefixes differ between engines."""
    name = re.sub(r"zero_pp_rank_\d+", f"zero_pp_rank_{rank.dp}", example, count=1)
    return re.sub(r"mp_rank_\d+", f"mp_rank_{rank.mp:02d}", name, count=1)

"""How large a checkpoint's metadata are, from one of its files."""

from dataclasses import dataclass

from wsm_ds.errors import BrokenCheckpoint, UnsafePickle, UnsupportedLayout
from wsm_ds.layouts.file_names import MODEL_FILE
from wsm_ds.layouts.run import Checkpoint
from wsm_ds.layouts.schema import is_stage0, open_model


@dataclass(frozen=True)
class MetadataSize:
    """The size of a checkpoint's metadata.

    Attributes:
        files: torch files in its folder.
        fragments: pieces of tensors of one kind: ranks x tensors at ZeRO stage 3, about ranks + tensors else.
    """

    files: int
    fragments: int


def metadata_size(checkpoint: Checkpoint, allowed_globals: frozenset[str]) -> MetadataSize:
    """Reads how large a checkpoint's metadata are. What cannot be read counts as nothing: reading all of it tells why.

    Args:
        checkpoint: its folder, which is listed; one model file is read.
        allowed_globals: names of the user's own classes that the file may mention.
    """
    try:
        names = sorted(entry.name for entry in checkpoint.path.iterdir())
        models = [name for name in names if MODEL_FILE.match(name)]
        files = sum(name.endswith(".pt") for name in names)
        if not models:
            return MetadataSize(files, 0)
        model = open_model(checkpoint.path / models[0], allowed_globals).tree
        if is_stage0(model):
            return MetadataSize(files, len(model["module"]))
        tensors = sum(map(len, model["param_shapes"]))
        # A broken file may name any number of ranks; each of them has a file.
        ranks, is_partitioned = min(int(model["dp_world_size"]), files), models[0].startswith("zero_pp_rank_")
        return MetadataSize(files, tensors * ranks if is_partitioned else tensors + ranks)
    except (BrokenCheckpoint, UnsupportedLayout, UnsafePickle, FileNotFoundError, NotADirectoryError):
        return MetadataSize(0, 0)

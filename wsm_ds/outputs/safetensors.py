"""An output as safetensors: one file, or shards with an index, named and ordered as transformers expects.

Format (github.com/huggingface/safetensors, README): 8 bytes with the header's length, a JSON header padded with spaces,
then the tensors without gaps.
"""

import json
import logging
from dataclasses import dataclass

from wsm_ds.dtypes import CODES, DType
from wsm_ds.errors import UnsupportedLayout, few
from wsm_ds.layouts import Layout
from wsm_ds.layouts.coverage import KIND_OF_ROLE
from wsm_ds.layouts.layout import TensorInfo
from wsm_ds.outputs.named_tensors import in_stored_order, new_names, stored_dtype
from wsm_ds.outputs.zero_checkpoint import OutputFiles, OutputWindow, output_files
from wsm_ds.planning.plan import LiteralSegment, Template, ZeroSegment
from wsm_ds.planning.streams import FragmentRow, SourceTables, fragment_table

METADATA = "__metadata__"
"""The entry of a safetensors header that is not a tensor."""
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Shard:
    """One file: its header, the byte offset of each tensor in the file, and the file's length."""

    name: str
    header: bytes
    offsets: dict[str, int]
    nbytes: int


def plan_safetensors(
    tables: SourceTables, window: OutputWindow, dtype: DType | None, max_shard_bytes: int, rename: dict[str, str]
) -> tuple[OutputFiles, dict[str, str]]:
    """Plans the shards of a model. Tied parameters are stored once, under the name that owns them.

    Args:
        tables: the checkpoints that the plan reads.
        window: the window of the output.
        dtype: dtype of all floating-point parameters, trained and frozen; None keeps the dtype that each has in the
            module. Buffers, and parameters of other dtypes (whole numbers, 8-bit floats), always keep theirs.
        max_shard_bytes: a shard closes before it would grow beyond this; a larger tensor gets its own shard.
        rename: regular expressions and their replacements, applied to every name, in order.

    Returns:
        The files with the elements to be written into them, and the text files: the index, if there is more than one
        shard.

    Raises:
        RecipeError: `rename` gives two tensors the same name, or a tensor a name that safetensors cannot store.
        UnsupportedLayout: the checkpoints are model-parallel, or a tensor is of a kind or dtype that safetensors cannot
            store; it is named.
    """
    newest = window.newest(tables)
    if newest.model_parallel_size > 1:
        raise UnsupportedLayout(
            f"{newest.path} is a checkpoint of {newest.model_parallel_size} model-parallel ranks, and its files "
            "do not say how each tensor is split. Merge into a zero checkpoint (--format zero), and export that with "
            "the training code's own converter."
        )
    names = new_names(newest.tensors, rename, "in safetensors", ("", METADATA))
    dtypes = {name: stored_dtype(info, dtype) for name, info in newest.tensors.items()}
    _require_storable(newest, dtypes)
    if newest.extra_states:
        log.warning("%s: left out of safetensors, as they are no tensors: %s", newest.path, few(newest.extra_states))
    shards = _shards(newest.tensors, dtypes, max_shard_bytes, names)
    requests = []
    for role, kind in KIND_OF_ROLE.items():
        rows = [
            FragmentRow(number, 0, info.numel, file, shard.offsets[name], CODES[dtypes[name].name])
            for file, shard in enumerate(shards)
            for number, (name, info) in enumerate(newest.tensors.items())
            if info.role == role and name in shard.offsets
        ]
        table = in_stored_order(fragment_table(rows), newest)
        if len(table):
            requests.append(window.request(kind, tables.renumbered(table, newest)))
    templates = []
    for shard in shards:
        elements = ZeroSegment(len(shard.header), shard.nbytes - len(shard.header))
        templates.append(Template(shard.name, shard.nbytes, [LiteralSegment(0, shard.header), elements], ()))
    files = output_files(window, templates, requests)
    return OutputFiles(files, tuple(requests)), _index(newest.tensors, dtypes, shards, names)


def _require_storable(newest: Layout, dtypes: dict[str, DType]) -> None:
    """Raises UnsupportedLayout unless safetensors can store every tensor, each in its dtype."""
    unknown = [f"{name} ({dtype.name})" for name, dtype in dtypes.items() if dtype.safetensors_name is None]
    unstorable = [f"{name} ({what})" for name, what in newest.opaque.items()] + unknown
    if unstorable:
        raise UnsupportedLayout(
            f"{newest.path} holds {few(unstorable)}, which safetensors cannot store. Write --format zero, or convert "
            "them in the training program."
        )


def _shards(
    tensors: dict[str, TensorInfo], dtypes: dict[str, DType], max_bytes: int, renamed: dict[str, str]
) -> list[_Shard]:
    """Fills shards with tensors in their order, up to `max_bytes` each."""
    groups: list[list[str]] = [[]]
    used_bytes = 0
    for name, info in tensors.items():
        nbytes = info.numel * dtypes[name].itemsize
        if groups[-1] and used_bytes + nbytes > max_bytes:
            groups.append([])
            used_bytes = 0
        groups[-1].append(name)
        used_bytes += nbytes
    if len(groups) == 1:
        return [_shard("model.safetensors", groups[0], tensors, dtypes, renamed)]
    return [
        _shard(f"model-{number:05d}-of-{len(groups):05d}.safetensors", names, tensors, dtypes, renamed)
        for number, names in enumerate(groups, start=1)
    ]


def _shard(
    file: str, names: list[str], tensors: dict[str, TensorInfo], dtypes: dict[str, DType], renamed: dict[str, str]
) -> _Shard:
    """Lays out one shard. Tensors of wider dtypes come first, so that each is aligned to its element size."""
    # transformers writes this entry, too (modeling_utils.py, `save_pretrained`).
    entries: dict[str, object] = {METADATA: {"format": "pt"}}
    offsets, position = {}, 0
    for name in sorted(names, key=lambda name: -dtypes[name].itemsize):
        nbytes = tensors[name].numel * dtypes[name].itemsize
        entries[renamed[name]] = {
            "dtype": dtypes[name].safetensors_name,
            "shape": list(tensors[name].shape),
            "data_offsets": [position, position + nbytes],
        }
        offsets[name] = position
        position += nbytes
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    # The header is padded to 8 bytes, so that the tensors after it are aligned.
    text += b" " * (-len(text) % 8)
    header = len(text).to_bytes(8, "little") + text
    return _Shard(
        file, header, {name: offset + len(header) for name, offset in offsets.items()}, len(header) + position
    )


def _index(
    tensors: dict[str, TensorInfo], dtypes: dict[str, DType], shards: list[_Shard], renamed: dict[str, str]
) -> dict[str, str]:
    """The index that transformers needs to find a tensor's shard."""
    if len(shards) == 1:
        return {}
    total = sum(info.numel * dtypes[name].itemsize for name, info in tensors.items())
    weights = {renamed[name]: shard.name for shard in shards for name in shard.offsets}
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weights.items()))}
    return {"model.safetensors.index.json": json.dumps(index, indent=2) + "\n"}

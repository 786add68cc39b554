"""Output as safetensors: one file, or shards with an index, in the names and order that transformers expects.

Format: 8 bytes of header length, a JSON header padded with spaces, then the tensors without gaps.
"""

import json
import re
from dataclasses import dataclass

from wsm_ds.dtypes import CODES, DType
from wsm_ds.errors import RecipeError, UnsupportedLayout
from wsm_ds.layouts.layout import TensorInfo
from wsm_ds.outputs.zero_checkpoint import OutputFiles, OutputWindow, finished
from wsm_ds.planning.plan import LiteralSegment, Template, ZeroSegment
from wsm_ds.planning.streams import SourceTables, whole_tensors

METADATA = "__metadata__"
"""The entry of a safetensors header that is no tensor."""
KIND_OF_ROLE = {"parameter": "master", "frozen": "frozen", "buffer": "buffer"}


@dataclass(frozen=True)
class _Shard:
    name: str
    header: bytes
    offsets: dict[str, int]  # of each tensor in the file
    nbytes: int


def plan_safetensors(
    tables: SourceTables, window: OutputWindow, dtype: DType | None, max_shard_bytes: int, rename: dict[str, str]
) -> tuple[OutputFiles, dict[str, str]]:
    """The shards, and the index as a text file if there is more than one.

    Args:
        dtype: of all parameters, trained and frozen; None keeps the dtype that each has in the module.
            Buffers keep their own. Tied parameters are stored once, under the name that owns them.
        max_shard_bytes: a shard closes before it would grow beyond this; a larger tensor gets its own.
        rename: regular expressions → replacements, for every name, in order.

    Raises:
        RecipeError: two tensors would get one name, or one a name that is none.
        UnsupportedLayout: the checkpoints are model-parallel.
    """
    newest = window.newest(tables)
    if newest.model_parallel_size > 1:
        raise UnsupportedLayout(
            f"{newest.path} is held by {newest.model_parallel_size} model-parallel ranks together, and "
            "its files do not say how each tensor is split; merge into a zero checkpoint, and export that with the "
            "training code's own converter."
        )
    names = _renamed(newest.tensors, rename)
    dtypes = {n: info.dtype if info.role == "buffer" or dtype is None else dtype for n, info in newest.tensors.items()}
    shards = _shards(newest.tensors, dtypes, max_shard_bytes, names)
    wanted = []
    for role, kind in KIND_OF_ROLE.items():
        placed = [
            (number, info.numel, file, shard.offsets[name], CODES[dtypes[name].name])
            for file, shard in enumerate(shards)
            for number, (name, info) in enumerate(newest.tensors.items())
            if info.role == role and name in shard.offsets
        ]
        table = whole_tensors(placed)
        if len(table):
            wanted.append(window.wanted(kind, tables.renumbered(table, newest)))
    templates = []
    for shard in shards:
        room = ZeroSegment(len(shard.header), shard.nbytes - len(shard.header))
        templates.append(Template(shard.name, shard.nbytes, [LiteralSegment(0, shard.header), room], ()))
    outputs = finished(window, templates, wanted)
    return OutputFiles(outputs, tuple(wanted)), _index(newest.tensors, dtypes, shards, names)


def _renamed(tensors: dict[str, TensorInfo], rename: dict[str, str]) -> dict[str, str]:
    """The name of each tensor in the output."""
    names = {}
    for fqn in tensors:
        names[fqn] = fqn
        for pattern, replacement in rename.items():
            names[fqn] = re.sub(pattern, replacement, names[fqn])
    taken: dict[str, str] = {}
    for fqn, name in names.items():
        if name in ("", METADATA):
            raise RecipeError(f"{fqn} would be called {name!r} in safetensors, which is no tensor's name; use rename.")
        if name in taken:
            raise RecipeError(f"rename gives {fqn} the name {name!r}, which {taken[name]} has already.")
        taken[name] = fqn
    return names


def _shards(
    tensors: dict[str, TensorInfo], dtypes: dict[str, DType], max_bytes: int, renamed: dict[str, str]
) -> list[_Shard]:
    groups: list[list[str]] = [[]]
    used = 0
    for name, info in tensors.items():
        nbytes = info.numel * dtypes[name].itemsize
        if groups[-1] and used + nbytes > max_bytes:
            groups.append([])
            used = 0
        groups[-1].append(name)
        used += nbytes
    if len(groups) == 1:
        return [_shard("model.safetensors", groups[0], tensors, dtypes, renamed)]
    return [
        _shard(f"model-{number:05d}-of-{len(groups):05d}.safetensors", names, tensors, dtypes, renamed)
        for number, names in enumerate(groups, start=1)
    ]


def _shard(
    file: str, names: list[str], tensors: dict[str, TensorInfo], dtypes: dict[str, DType], renamed: dict[str, str]
) -> _Shard:
    """Tensors of wider dtypes first, so that each is aligned to its element size."""
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
    text += b" " * (-len(text) % 8)
    header = len(text).to_bytes(8, "little") + text
    return _Shard(file, header, {n: o + len(header) for n, o in offsets.items()}, len(header) + position)


def _index(
    tensors: dict[str, TensorInfo], dtypes: dict[str, DType], shards: list[_Shard], renamed: dict[str, str]
) -> dict[str, str]:
    if len(shards) == 1:
        return {}
    total = sum(info.numel * dtypes[name].itemsize for name, info in tensors.items())
    weights = {renamed[name]: shard.name for shard in shards for name in shard.offsets}
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weights.items()))}
    return {"model.safetensors.index.json": json.dumps(index, indent=2) + "\n"}

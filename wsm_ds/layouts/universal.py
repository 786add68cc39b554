"""Universal checkpoints: `zero/NAME/{fp32,exp_avg,…}.pt` hold whole parameters, model files all the rest.

`checkpoint/ds_to_universal.py` writes a tensor in its shape inside a dict (stages 1 and 2) or flat and bare (stage 3).
"""

from pathlib import Path
from typing import Any

from wsm_ds.errors import BrokenCheckpoint, UnsupportedLayout, brief
from wsm_ds.layouts import zero3, zero12
from wsm_ds.layouts.layout import TableBuilder
from wsm_ds.layouts.rank_files import RankFiles
from wsm_ds.torchfile import Tensor, TorchFile, open_torch_file

OPTIMIZER_STATE = "zero/optimizer_state.pt"


def is_universal(path: Path) -> bool:
    """Whether a checkpoint's folder is a universal one."""
    return (path / OPTIMIZER_STATE).is_file()


def open_parameters(path: Path, names: list[str], allowed_globals: frozenset[str]) -> dict[str, dict[str, TorchFile]]:
    """The opened files of every parameter, by name and kind (the name of the file).

    Raises:
        BrokenCheckpoint: a parameter has no fp32.pt.
    """
    opened = {}
    for name in names:
        if {"", ".", ".."} & set(name.split("/")) or "\0" in name:
            raise BrokenCheckpoint(f"{path}: the parameter {brief(name)} cannot be the name of a folder in it.")
        files = sorted((path / "zero" / name).glob("*.pt"))
        opened[name] = {file.stem: open_torch_file(file, allowed_globals) for file in files}
        if "fp32" not in opened[name]:
            raise BrokenCheckpoint(f"{path} is incomplete: zero/{name}/fp32.pt is missing.")
    return opened


def place(builder: TableBuilder, files: RankFiles, parameters: dict[str, dict[str, TorchFile]]) -> None:
    """Adds every fragment of a universal checkpoint to `builder`.

    Raises:
        UnsupportedLayout: a parameter is stored in another size (a vocabulary without its padding).
    """
    if "zero_pp_rank_" in files.models[0].path.name:
        for rank, model in files.models.items():
            zero3.place_model(builder, files, model, rank)
    else:
        zero12.place_module(builder, files)
    for name, kinds in parameters.items():
        for kind, file in kinds.items():
            held = whole(file.tree)
            if held is None or kind == "step":
                continue
            info = files.tensors[name]
            if held.numel != info.numel:
                raise UnsupportedLayout(
                    f"{file.path} holds {held.numel} elements, the model's {name} has {info.numel}: it was cut for "
                    "another degree of tensor parallelism, which this version does not read."
                )
            place_of = {"file": files.indices[file.path], "offset": file.byte_offset(held)}
            builder.add(
                "master" if kind == "fp32" else kind, files.numbers[name], 0, info.numel, **place_of, dtype=held.dtype
            )


def whole(tree: Any) -> Tensor | None:
    """The tensor that a parameter's file holds."""
    held = tree.get("param") if isinstance(tree, dict) else tree
    return held if isinstance(held, Tensor) else None

"""The generator of large runs, for two ranks, against the files that DeepSpeed itself wrote."""

import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.many_ranks.forms import ARGUMENTS, STEP, Form
from benchmarks.many_ranks.rank_files import write_moe, write_zero2, write_zero3
from benchmarks.many_ranks.run import make_run
from benchmarks.many_ranks.values import EXPERT, Shapes, Values, groups_of
from wsm_ds.layouts import find_checkpoints, read_layout
from wsm_ds.merging import merge
from wsm_ds.verification import verify

KINDS = {"master": None, "exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_sq"}


def records(path: Path) -> dict[str, tuple[bytes, int]]:
    """Content and position of every record of a torch file; the folder's name in it is the file's."""
    with zipfile.ZipFile(path) as file:
        return {
            info.filename.split("/", 1)[1]: (file.read(info), info.header_offset)
            for info in file.infolist()
            if not info.filename.endswith("serialization_id")  # a hash of the records' names and sizes, and a number
        }


def values_of(of: Form, kind: str) -> Values:
    """What DeepSpeed's checkpoint of two ranks holds, put together by its ranks' rules."""
    trees = [torch.load(path, weights_only=False) for path in sorted(of.folder.glob("*_optim_states.pt"))]
    states = [tree["optimizer_state_dict"] for tree in trees]
    shapes = shapes_of(of, kind)
    whole: dict[str, dict[str, Any]] = {name: {} for name in KINDS}
    for number, group in enumerate(groups_of(shapes)):
        for name, state in KINDS.items():
            parts = [parts_of(state_dict, number, state) for state_dict in states]
            if kind == "zero3":
                whole[name] |= from_parts(parts, group, shapes)
            elif kind == "moe" and number:
                half = len(group) // 2
                for part, rank in zip(parts, range(2), strict=True):
                    own = [n for n in group if int(n.split(EXPERT)[1].split(".")[0]) // 2 == rank]
                    assert len(own) == half
                    whole[name] |= from_line(part, own, shapes)
            else:
                whole[name] |= from_line(torch.cat(parts), group, shapes)
    return Values(STEP, shapes, whole)


def shapes_of(of: Form, kind: str) -> Shapes:
    model = of.model()
    shapes = {name: shape for group in model["param_shapes"] for name, shape in group.items()}
    names = list(model["module"])
    if kind != "moe":
        return {name: tuple(shapes[name]) for name in names}
    ordered: Shapes = {}
    for name in names:
        ordered[name] = tuple(shapes[name])
        if name.endswith("gate.wg.weight"):
            prefix = name.removesuffix("gate.wg.weight") + f"experts{EXPERT}"
            ordered |= {f"{prefix}{e}.{w}_proj.weight": (16, 16) for e in range(4) for w in ("gate", "up", "down")}
    return ordered


def parts_of(state: dict[str, Any], group: int, name: str | None) -> Any:
    base = state.get("base_optimizer_state") or state["optimizer_state_dict"]
    if name is not None:
        return base["state"][group][name]
    masters = state.get("fp32_flat_groups") or state["single_partition_of_fp32_groups"]
    whole = torch.zeros_like(base["state"][group]["exp_avg"])
    whole[: len(masters[group])] = masters[group].detach()
    return whole


def from_line(line: Any, names: list[str], shapes: Shapes) -> dict[str, Any]:
    found, begin = {}, 0
    for name in names:
        numel = int(np.prod(shapes[name]))
        found[name], begin = line[begin : begin + numel], begin + numel
    return found


def from_parts(parts: list[Any], names: list[str], shapes: Shapes) -> dict[str, Any]:
    found, begin = {}, 0
    for name in names:
        numel = int(np.prod(shapes[name]))
        length = -(-numel // len(parts))
        found[name] = torch.cat([part[begin : begin + length] for part in parts])[:numel]
        begin += length
    return found


@pytest.mark.parametrize("kind", ARGUMENTS)
def test_for_two_ranks_every_record_is_deepspeeds_own(written: dict[str, Form], kind: str, tmp_path: Path) -> None:
    values, folder = values_of(written[kind], kind), tmp_path / "again"
    if kind == "zero3":
        write_zero3(folder, written[kind], values, 2, all_real=True)
    elif kind == "zero2":
        write_zero2(folder, written[kind], values, 2)
    else:
        write_moe(folder, written[kind], values, 2, 2, None)
    own = {path.name for path in written[kind].folder.glob("*.pt")}
    assert {path.name for path in folder.iterdir()} == own
    for name in own:
        assert records(folder / name) == records(written[kind].folder / name), name


@pytest.mark.parametrize(("kind", "experts"), [("zero2", 0), ("zero3", 0), ("moe", 8)])
def test_a_run_of_more_ranks_is_read_merged_and_verified(
    written: dict[str, Form], kind: str, experts: int, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    make_run(run, written[kind], kind, world_size=8, layers=2, hidden=16, experts=experts, ep=4 if experts else 1,
             checkpoints=2, all_real=False)  # fmt: skip
    layouts = [read_layout(checkpoint) for checkpoint in find_checkpoints(run)]
    assert [(layout.step, layout.world_size) for layout in layouts] == [(100, 8), (200, 8)]
    merge(run=run, last=2, out=tmp_path / "merged")
    assert verify(tmp_path / "merged", full=True).recomputed_bytes > 0

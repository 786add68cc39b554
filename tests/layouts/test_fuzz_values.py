"""Any value at any key of a real checkpoint's files: it is read, or refused by one of our errors."""

import copy
import shutil
import zipfile
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from wsm_ds.errors import WsmError
from wsm_ds.merge_planning import plan_merge
from wsm_ds.planning.recipe import make_recipe
from wsm_ds.torchfile import Stub, Tensor, open_own_tree, open_torch_file
from wsm_ds.torchfile.repickle import repickle

ABSENT = object()
VALUES: tuple[Any, ...] = (None, -1, 2**70, "x", [], {}, float("nan"), ABSENT)
FREE = ("ds_config", "lr_scheduler")
"""Not looked into: their insides are read tolerantly."""


def nodes(tree: Any, path: tuple[Any, ...] = (), kind: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """(path, kind) of every node below `tree`; of kind alike are nodes that differ in an index or a name only."""
    if isinstance(tree, Tensor | Stub) or (path and path[-1] in FREE):
        return
    held = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in held:
        named = "*" if isinstance(key, int) or "." in str(key) else key
        yield (*path, key), (*kind, named)
        yield from nodes(value, (*path, key), (*kind, named))


def write(source: Path, target: Path, tree: Any) -> None:
    records, data = open_torch_file(source).archive.records, source.read_bytes()
    pickled, storages = repickle(tree)
    with zipfile.ZipFile(target, "w") as archive:
        archive.writestr("archive/data.pkl", pickled)
        for key, storage in storages.items():
            record = records[f"data/{storage.key}"]
            archive.writestr(f"archive/data/{key}", data[record.offset : record.offset + record.nbytes])


def replace(tree: Any, path: tuple[Any, ...], value: Any) -> None:
    for key in path[:-1]:
        tree = tree[key]
    if value is ABSENT:
        del tree[path[-1]]
    else:
        tree[path[-1]] = copy.deepcopy(value)


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("what", ["model", "optim"])
def test_a_wrong_value_anywhere_is_read_or_refused(runs: Path, tmp_path: Path, stage: int, what: str) -> None:
    shutil.copytree(runs / f"w2_s{stage}_bf16/global_step6", tmp_path / "run/global_step6")
    (target,) = (tmp_path / "run/global_step6").glob(f"*mp_rank_00_{what}_states.pt" if what == "model" and stage == 2
                                                     else f"*zero_pp_rank_0_mp_rank_00_{what}_states.pt")  # fmt: skip
    source = runs / f"w2_s{stage}_bf16/global_step6" / target.name
    first_of_kind = {kind: path for path, kind in reversed(list(nodes(open_torch_file(source).tree)))}
    common: dict[str, Any] = {"run": tmp_path / "run", "tags": ["global_step6"], "coefficients": [1.0]}
    recipes = [
        make_recipe(**common, out=tmp_path / "out"),
        make_recipe(**common, out=tmp_path / "out", optimizer_states="drop", world_size=3),
    ]
    refused = 0
    for path, value in product(first_of_kind.values(), VALUES):
        tree = open_own_tree(source).tree
        replace(tree, path, value)
        write(source, target, tree)
        for recipe in recipes:
            try:
                plan_merge(recipe)
            except WsmError:
                refused += 1
    assert refused > 2 * len(first_of_kind)

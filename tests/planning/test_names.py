"""Names without the parts that wrappers add, and what is not matched."""

from dataclasses import replace
from pathlib import Path

import pytest

from wsm_ds.errors import LayoutMismatch
from wsm_ds.layouts import Checkpoint, Layout, read_layout
from wsm_ds.planning.names import with_names_of_newest, without_wrappers

GOLDEN = Path(__file__).parents[1] / "golden" / "zero2_bf16"


@pytest.mark.parametrize(
    ("name", "core"),
    [
        ("layer.weight", "layer.weight"),
        ("_orig_mod.layer.weight", "layer.weight"),
        ("_orig_mod.module._orig_mod.layer.weight", "layer.weight"),
        ("module.blocks.0._checkpoint_wrapped_module.a._fsdp_wrapped_module.weight", "blocks.0.a.weight"),
        ("_orig_mod.base_model.model.q.base_layer.weight", "q.weight"),
        ("mp_rank_01/_orig_mod.base_model.model.q.weight", "mp_rank_01/q.weight"),
        ("q.lora_A.default.weight", "q.lora_A.default.weight"),
        ("my_module.weight", "my_module.weight"),
        ("modules.weight", "modules.weight"),
        ("layer.module", "layer.module"),
        ("model.base_model.model.x", "model.base_model.model.x"),
    ],
)
def test_only_whole_parts_of_known_wrappers_are_left_out(name: str, core: str) -> None:
    assert without_wrappers(name) == core


@pytest.fixture(scope="module")
def layouts() -> list[Layout]:
    return [
        read_layout(Checkpoint(f"global_step{step}", GOLDEN / f"global_step{step}"), frozenset()) for step in (1, 2)
    ]


def named(layout: Layout, names: dict[str, str]) -> Layout:
    tensors = {names.get(name, name): info for name, info in layout.tensors.items()}
    return replace(layout, tensors=tensors, aliases={})


def test_names_that_are_equal_already_are_left_alone_even_if_wrappers_are_in_them(layouts: list[Layout]) -> None:
    older, newest = layouts
    first, second = older.names[:2]
    both = {first: "module.weight", second: "weight"}
    pair = [named(older, both), named(newest, both)]
    matched, renamed = with_names_of_newest(pair, {})
    assert (matched, renamed) == (tuple(pair), ())


def test_two_tensors_that_differ_by_a_wrapper_only_cannot_be_matched(layouts: list[Layout]) -> None:
    older, newest = layouts
    first, second = older.names[:2]
    pair = [named(older, {first: "module.weight", second: "_orig_mod.weight"}), named(newest, {first: "weight"})]
    with pytest.raises(LayoutMismatch, match=r"module\.weight and _orig_mod\.weight would both be weight"):
        with_names_of_newest(pair, {})


def test_a_rule_is_for_older_checkpoints_only(layouts: list[Layout]) -> None:
    matched, renamed = with_names_of_newest(layouts, {"global_step2": {"^": "x."}, "none*": {"^": "y."}})
    assert (matched, renamed) == (tuple(layouts), ())
    _, (change,) = with_names_of_newest(layouts, {"global_step?": {"^": "x."}})
    assert change.tag == "global_step1"
    assert len(change.names) == len({*layouts[0].tensors, *layouts[0].aliases})
    assert all(new == f"x.{old}" for old, new in change.names.items())

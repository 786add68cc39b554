"""A stream goes over fine sources in the order of their files, and alike sources share their places."""

import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from wsm_ds.engine import threads
from wsm_ds.engine.open_files import File
from wsm_ds.engine.tasks import share, tasks_of
from wsm_ds.merge_planning import plan_merge
from wsm_ds.merging import merge
from wsm_ds.planning import streams
from wsm_ds.planning.plan import InputFile, Stream
from wsm_ds.planning.recipe import make_recipe


def recipe(run: Path, out: Path, **values: Any) -> dict[str, Any]:
    return {"run": run, "last": 3, "curve": "1-sqrt", "out": out} | values


def runs_of(stream: Stream) -> int:
    return sum(len(source.files) for source in stream.sources)


def test_whole_tensors_of_fine_sources_are_read_in_long_runs(
    other_world_sizes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = recipe(other_world_sizes / "w3_s3", tmp_path / "out", format="safetensors", dtype="fp32", last=2)
    plan = plan_merge(make_recipe(**values))
    (masters,) = [stream for stream in plan.streams if stream.combine == "merge" and stream.follows_source]
    files = sum(len(source.used_files) for source in masters.sources)
    groups, padded = 2, 4  # flat tensors of a rank; parameters whose partition in the last rank has padding behind it
    assert runs_of(masters) <= groups * files + padded * len(masters.sources)
    merge(make_recipe(**values))
    monkeypatch.setattr(streams, "SHORT_RUN_BYTES", 0)
    in_order = plan_merge(make_recipe(**values | {"out": tmp_path / "other"}))
    assert not any(stream.follows_source for stream in in_order.streams)
    assert max(map(runs_of, in_order.streams)) > 2 * runs_of(masters)
    merge(make_recipe(**values | {"out": tmp_path / "other"}))
    assert (tmp_path / "out/model.safetensors").read_bytes() == (tmp_path / "other/model.safetensors").read_bytes()


def test_many_files_alone_are_a_reason_to_follow_them(
    other_world_sizes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streams, "SHORT_RUN_BYTES", 0)
    monkeypatch.setattr(streams, "MANY_FILES", 2)
    values = recipe(other_world_sizes / "w3_s3", tmp_path / "out", format="safetensors", last=2)
    assert any(stream.follows_source for stream in plan_merge(make_recipe(**values)).streams)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_an_output_of_the_sources_own_form_is_written_in_its_own_order(runs: Path, tmp_path: Path, stage: int) -> None:
    plan = plan_merge(make_recipe(**recipe(runs / f"w2_s{stage}_bf16", tmp_path / "out")))
    assert not any(stream.follows_source for stream in plan.streams)


def test_alike_checkpoints_share_their_places(runs: Path, tmp_path: Path) -> None:
    plan = plan_merge(make_recipe(**recipe(runs / "w2_s3_bf16", tmp_path / "out", format="safetensors")))
    stream = plan.streams[0]
    first, *others = stream.sources
    assert all(source.offsets is first.offsets and source.files is first.files for source in others)
    used = [source.used_files.tolist() for source in stream.sources]
    assert len({number for numbers in used for number in numbers}) == sum(map(len, used))
    for source, numbers, checkpoint in zip(stream.sources, used, plan.outputs[0].sources, strict=True):
        assert {plan.inputs[number].path.parent.resolve() for number in numbers} == {checkpoint.path}
        assert next(source.within(0, 1)).file in numbers


def test_a_task_does_not_cross_into_another_file(other_world_sizes: Path, tmp_path: Path) -> None:
    plan = plan_merge(
        make_recipe(**recipe(other_world_sizes / "w3_s3", tmp_path / "out", format="safetensors", last=2))
    )
    tasks = tasks_of(plan)
    for number, stream in enumerate(plan.streams):
        if stream.follows_source:
            own = [task for task in tasks if task.stream == number]
            places = [{place.file for place in stream.sources[-1].within(t.begin, t.end)} for t in own]
            assert all(len(files) == 1 for files in places)
            assert len(own) >= len(stream.sources[-1].used_files)
    assert sorted(share(tasks, 0, 2) + share(tasks, 1, 2), key=tasks.index) == tasks


@pytest.mark.parametrize("values", [{}, {"format": "safetensors"}], ids=["zero", "safetensors"])
def test_each_input_is_opened_once_whatever_the_number_of_threads(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, values: dict[str, Any]
) -> None:
    opens: Counter[int] = Counter()

    def counted(inputs: Sequence[InputFile], file: File) -> int:
        opens[file.number] += 1
        return os.open(inputs[file.number].path, os.O_RDONLY)

    monkeypatch.setattr(threads, "open_input", counted)
    merge(make_recipe(**recipe(runs / "w2_s3_bf16", tmp_path / "out", threads=8, **values)))
    assert opens
    assert set(opens.values()) == {1}

"""What is in a folder: a merge, a checkpoint or weights from elsewhere, each with an identity that changes with it."""

import os
from pathlib import Path

import pytest

from wsm_ds.errors import EvaluationError, VerificationFailed
from wsm_ds.evaluation.subjects import subject_of_folder, subject_of_manifest
from wsm_ds.merge_planning import plan_merge
from wsm_ds.merging import export, merge
from wsm_ds.publishing.manifest import description


def test_a_merge_says_its_sources(runs: Path, tmp_path: Path) -> None:
    run = runs / "w2_s2_bf16"
    recipe = {"run": run, "last": 3, "curve": "linear", "format": "safetensors"}
    merge(out=tmp_path / "a", **recipe)  # type: ignore[arg-type]
    merge(out=tmp_path / "b", **recipe)  # type: ignore[arg-type]
    export(run=run, out=tmp_path / "raw")
    first, second, raw = (subject_of_folder(tmp_path / name) for name in ("a", "b", "raw"))
    assert (first.kind, first.name, first.path) == ("merge", "a", str((tmp_path / "a").resolve()))
    assert [(source.tag, source.step) for source in first.sources] == [
        ("global_step2", 2), ("global_step4", 4), ("global_step6", 6),
    ]  # fmt: skip
    assert sum(source.coefficient for source in first.sources) == pytest.approx(1)
    assert first.identity == second.identity != raw.identity
    plan = plan_merge(out=tmp_path / "c", **recipe)  # type: ignore[arg-type]
    assert subject_of_manifest(description(plan, 0), run, "planned").identity == first.identity


def test_a_checkpoint_says_its_step(runs: Path) -> None:
    run = runs / "w2_s3_bf16"
    subject = subject_of_folder(run / "global_step4")
    assert (subject.kind, subject.name) == ("checkpoint", "global_step4")
    assert [(source.step, source.coefficient) for source in subject.sources] == [(4, 1.0)]
    assert subject.identity != subject_of_folder(run / "global_step6").identity
    assert subject_of_folder(run / "global_step4", "newest").identity == subject.identity


def test_weights_from_elsewhere_are_told_apart_by_their_files(tmp_path: Path) -> None:
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(b"12345678")
    (tmp_path / "README.md").write_text("a text")
    first = subject_of_folder(tmp_path)
    (tmp_path / "README.md").write_text("another text")
    assert subject_of_folder(tmp_path) == first
    assert (first.kind, first.sources) == ("folder", ())
    (tmp_path / "config.json").write_text("{}")
    assert subject_of_folder(tmp_path).identity != first.identity
    (tmp_path / "config.json").unlink()
    os.utime(weights, ns=(1, 1))
    assert subject_of_folder(tmp_path).identity != first.identity


def test_a_folder_without_weights_is_named(runs: Path, tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match="holds no weights"):
        subject_of_folder(tmp_path)
    (tmp_path / "run").symlink_to(runs / "w2_s2_bf16")
    with pytest.raises(EvaluationError, match=r"name one of them, such as .*/run/global_step2\.$"):
        subject_of_folder(tmp_path / "run")
    with pytest.raises(EvaluationError, match="absent is not a folder"):
        subject_of_folder(tmp_path / "absent")
    (tmp_path / "wsm_merge.json").write_text("{")
    with pytest.raises(VerificationFailed, match=r"wsm_merge.json"):
        subject_of_folder(tmp_path)

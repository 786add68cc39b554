"""Malformed files of every kind end in one of our errors and one line, and leave nothing."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from dying import dies_at

from wsm_ds.cli import main
from wsm_ds.engine import seals, tasks
from wsm_ds.engine.staged_files import StagedFiles
from wsm_ds.errors import CurveError, RecipeError, VerificationFailed
from wsm_ds.filesystem import small_files
from wsm_ds.layouts.frameworks import MANIFEST
from wsm_ds.merging import merge, merge_all
from wsm_ds.planning.recipe import load_recipes, make_recipes
from wsm_ds.publishing import manifest
from wsm_ds.publishing.staging_folder import PLAN, Staging
from wsm_ds.torchfile import open_torch_file
from wsm_ds.verification import verify
from wsm_ds.watching.spec import SPEC, read_spec

TEXTS = {
    "empty": "",
    "cut off": '{"format": 2, "files": {',
    "another type": "[1, 2]",
    "a number": "1e999",
    "nested too deep": "[" * 100_000,
    "no text": "\udcff",
    "another format": '{"format": 3}',
    "lists for mappings": '{"format": 2, "files": [], "recipe": [], "sources": {}, "block_bytes": 4194304}',
    "blocks of nothing": '{"format": 2, "files": {}, "recipe": {}, "sources": [], "block_bytes": 0}',
}
RECIPES = {
    "no YAML": "run: [",
    "a list": "- run",
    "a tag that makes objects": "run: !!python/object/apply:os.system ['touch made']",
    "an out that is a number": "out: 5",
    "an out of an output that is a list": "outputs: [{out: [a]}]",
    "outputs that are no mappings": "outputs: [1]",
    "no output": "outputs: []",
    "a list of lists": "curve: [[linear], [cosine]]",
    "a value twice": "last: [2, 2]",
    "more outputs than anyone wants": f"last: {list(range(1, 60))}\nto_step: {list(range(1, 60))}",
    "aliases that grow": "curve: &a [x, x]\nfloor: &b [*a, *a, *a, *a, *a, *a]\nlast: [*b, *b, *b, *b, *b, *b]",
    "more ranks than any cluster has": "world_size: 1000000000",
    "an infinite floor": "floor: .inf",
    "unknown names": "colour: red",
}
GIVEN = {"run": "run", "out": "out", "last": "2", "curve": "linear"}


def write(path: Path, text: str) -> Path:
    path.write_bytes(text.encode(errors="surrogateescape"))
    return path


@pytest.mark.parametrize("name", RECIPES)
def test_a_malformed_recipe_is_a_wrong_request(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").symlink_to(runs / "w2_s2_bf16")
    own = {line.split(":")[0] for line in RECIPES[name].splitlines()}
    lines = [f"{key}: {value}" for key, value in GIVEN.items() if key not in own] if ":" in RECIPES[name] else []
    recipe = write(tmp_path / "recipe.yaml", "\n".join([*lines, RECIPES[name]]))
    assert main(["merge", "--recipe", str(recipe)]) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith("wsm-ds: RecipeError: the recipe ")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["recipe.yaml", "run"]


def test_a_file_that_is_read_whole_has_a_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(small_files, "MOST_BYTES", 20)
    assert small_files.read_small(write(tmp_path / "small", "x" * 20)) == "x" * 20
    with pytest.raises(RecipeError, match="larger than"):
        load_recipes(write(tmp_path / "recipe.yaml", "run: run\nlast: 4\ncurve: linear\nout: out\n"))
    with pytest.raises(VerificationFailed, match="larger than"):
        verify(write(tmp_path / MANIFEST, '{"format": 2, "files": {}}').parent)
    with pytest.raises(RecipeError, match="larger than"):
        read_spec(write(tmp_path / SPEC, '{"run": "run", "recipes": {}}').parent)


@pytest.mark.parametrize("name", TEXTS)
def test_a_malformed_manifest_or_spec_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    write(tmp_path / MANIFEST, TEXTS[name])
    assert main(["verify", str(tmp_path)]) == 3
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith(f"wsm-ds: VerificationFailed: {tmp_path / MANIFEST} ")
    write(tmp_path / SPEC, TEXTS[name])
    with pytest.raises(RecipeError, match="is not what a watch has written"):
        read_spec(tmp_path)


@pytest.mark.parametrize("name", TEXTS)
def test_what_a_half_done_merge_was_is_never_guessed(runs: Path, tmp_path: Path, name: str) -> None:
    recipe: dict[str, Any] = {"run": runs / "w2_s2_bf16", "last": 2, "curve": "linear", "out": tmp_path / "out"}
    assert dies_at(40, lambda: merge_all(make_recipes(**recipe)))
    write(Staging(tmp_path / "out").folder / PLAN, TEXTS[name])
    merge(**recipe)  # from the beginning
    assert verify(tmp_path / "out", full=True).note == ""


def test_a_malformed_journal_is_passed_over(runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (seals, tasks, manifest):
        monkeypatch.setattr(module, "BLOCK_BYTES", 2048)
    recipe: dict[str, Any] = {"run": runs / "w2_s2_bf16", "last": 2, "curve": "linear", "out": tmp_path / "out"}
    assert dies_at(40, lambda: merge_all(make_recipes(**recipe)))
    journals = list(Staging(tmp_path / "out").folder.glob("journal.*"))
    assert journals
    for journal in journals:
        whole = journal.read_text()
        name, index, digest, crcs = json.loads(whole.splitlines()[0])
        lies = [[name, index, digest[:-2], crcs], [name, 10**30, digest, crcs], [name, index, digest, [2**70]],
                ["../../elsewhere", 0, digest, crcs], [name, index, "00" * 16, crcs], [[], {}, None, 1]]  # fmt: skip
        journal.write_text("\n".join(["", "[" * 50_000, *map(json.dumps, lies), whole[:40], "\x00"]))
    merge(**recipe)
    assert verify(tmp_path / "out", full=True).note == ""
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_names_that_a_terminal_would_obey_are_shown_as_escapes(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(runs / "w2_s2_bf16/global_step2", tmp_path / "run/\x1b[31m_global_step2")
    shutil.copytree(runs / "w2_s2_bf16/global_step4", tmp_path / "run/\x1b[2J\n_global_step4")
    next((tmp_path / "run").glob("*step4/*optim_states.pt")).unlink()
    assert main(["inspect", str(tmp_path / "run")]) == 3
    shown = capsys.readouterr().out
    assert all(line.isprintable() for line in shown.splitlines())
    assert r"\x1b[31m_global_step2" in shown
    assert r"\x1b[2J\n_global_step4: " in shown


def test_what_is_no_name_of_a_tensor_in_safetensors_is_refused(runs: Path, tmp_path: Path) -> None:
    for replacement in ("", "__metadata__"):
        with pytest.raises(RecipeError, match=r"embedding\.weight would be called"):
            merge(run=runs / "w2_s2_bf16", last=2, curve="linear", out=tmp_path / "out", format="safetensors",
                  rename={r"^embedding\.weight$": replacement})  # fmt: skip
    assert list(tmp_path.iterdir()) == []


def test_a_window_of_more_checkpoints_than_any_run_has_is_refused_at_once() -> None:
    from wsm_ds.schedules.coefficients import merge_coefficients

    with pytest.raises(CurveError, match="at most 1000000"):
        merge_coefficients("linear", n=10**12)
    assert main(["coefficients", "--curve", "linear", "-n", str(10**12)]) == 2


def test_an_output_that_cannot_be_read_is_not_published(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a disk that returns other bytes than were written to it."""
    finish = StagedFiles.finish

    def finish_and_damage(self: StagedFiles, output: int) -> Any:
        written = finish(self, output)
        path = self.paths[0]
        pickled = open_torch_file(path).archive.records["data.pkl"]
        data = bytearray(path.read_bytes())
        data[pickled.offset + pickled.nbytes // 2] ^= 4
        path.write_bytes(data)
        return written

    monkeypatch.setattr(StagedFiles, "finish", finish_and_damage)
    with pytest.raises(VerificationFailed, match=r"cannot be read, so nothing is published: .*data\.pkl is damaged"):
        merge(run=runs / "w2_s2_bf16", last=2, curve="linear", out=tmp_path / "out")
    assert list(tmp_path.iterdir()) == []

"""HF Trainer for real: runs that it writes, merges that it resumes from and that transformers loads."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
from deepspeed_runs import launch
from lazy import load_file, torch
from reference import load_all, merged_masters, merged_parameters, same_bits, unpadded

from wsm_ds.cli import main
from wsm_ds.errors import RecipeError
from wsm_ds.inspection import inspect_run
from wsm_ds.loading import load_merge
from wsm_ds.merge_planning import plan_merge
from wsm_ds.merging import merge, reshard
from wsm_ds.planning.recipe import make_recipe
from wsm_ds.verification import verify

Trained = tuple[Path, list[list[dict[str, Any]]]]
CASES = [(stage, tied) for stage in (2, 3) for tied in (True, False)]
COEFFICIENTS = [0.25, 0.75]
TRAINERS_OWN = {
    "config.json", "generation_config.json", "rng_state_0.pth", "rng_state_1.pth", "trainer_state.json",
    "training_args.bin", "tokenizer.json", "tokenizer_config.json", "zero_to_fp32.py", "zero_to_torch.py",
}  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """`RUNS/{stage}{tied}/checkpoint-2`, 4 and 6 from two ranks, inside the warmup; and each rank's reports."""
    root = tmp_path_factory.mktemp("trainer")
    jobs = [{"do": "trainer", "stage": s, "tied": t, "run": str(root / f"{s}{t}")} for s, t in CASES]
    return root, launch(jobs, world_size=2, folder=tmp_path_factory.mktemp("train"), worker="trainer_worker.py")


def merge_two(run: Path, out: Path, **values: Any) -> Path:
    """Checkpoints 2 and 4; the warmup is left in, so that a wrong rate shows."""
    tags = ("checkpoint-2", "checkpoint-4")
    merge(run=run, tags=tags, coefficients=COEFFICIENTS, allow=("warmup", "lr-change"), out=out, **values)
    return out


def sources(run: Path) -> list[Path]:
    return [run / f"checkpoint-{step}/global_step{step}" for step in (2, 4)]


@pytest.mark.parametrize("values", [{}, {"optimizer_states": "drop"}, {"format": "universal"}], ids=str)
def test_trainer_resumes_from_a_merge_where_the_run_stood(
    trained: Trained,
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    values: dict[str, Any],
) -> None:
    root, uninterrupted = trained
    jobs: list[dict[str, Any]] = []
    for stage, tied in CASES:
        out = merge_two(root / f"{stage}{tied}", tmp_path / f"{stage}{tied}", **values)
        resume: dict[str, Any] = {"resume": str(out), "dump": f"{out}.dump", "run": f"{out}.run"}
        resume["universal"] = "format" in values
        jobs.append({"do": "trainer", "stage": stage, "tied": tied} | resume)
    reports = launch(jobs, world_size=2, folder=tmp_path_factory.mktemp("resume"), worker="trainer_worker.py")
    for rank, reported in enumerate(reports):
        for number, ((stage, tied), report) in enumerate(zip(CASES, reported, strict=True)):
            before = uninterrupted[rank][number]
            assert report["first_step"] == [4, 4]
            assert report["global_step"] == 6
            for what in ("rates", "generators", "batches"):
                assert report[what] == before[what][4:], what
            assert report["rates"] == pytest.approx([0.01 * 5 / 8, 0.01 * 6 / 8])
            assert all(math.isfinite(loss) for loss in report["losses"])
            assert len(report["losses"]) == 2
            check_loaded(Path(f"{jobs[number]['dump']}.rank{rank}"), root / f"{stage}{tied}", stage, rank)
    for job in jobs:  # what the resumed run saves is a run that can be merged again
        assert [found.checkpoint.tag for found in inspect_run(Path(job["run"]))] == ["checkpoint-6/global_step6"]


def check_loaded(dump: Path, run: Path, stage: int, rank: int) -> None:
    """The engine holds the merged masters, and the module cast from them."""
    held, (models, _) = torch.load(dump), load_all(sources(run)[-1])
    wanted = unpadded(models, merged_masters(sources(run), COEFFICIENTS)[rank], rank, stage)
    for got, partition in zip(unpadded(models, held["masters"], rank, stage), wanted, strict=True):
        assert same_bits(got[: partition.numel()], partition)
    for name, parameter in merged_parameters(sources(run), COEFFICIENTS, stage).items():
        assert torch.equal(held["module"][name], parameter.bfloat16()), name


@pytest.mark.parametrize(("stage", "tied"), CASES)
@pytest.mark.parametrize("form", ["zero", "universal"])
def test_trainers_own_files_are_carried_byte_for_byte(
    trained: Trained, tmp_path: Path, stage: int, tied: bool, form: str
) -> None:
    run = trained[0] / f"{stage}{tied}"
    out = merge_two(run, tmp_path / "out", format=form)
    pointer = "latest_universal" if form == "universal" else "latest"
    assert {path.name for path in out.iterdir() if path.is_file()} == TRAINERS_OWN | {pointer, "wsm_merge.json"}
    for name in TRAINERS_OWN:
        assert (out / name).read_bytes() == (run / "checkpoint-4" / name).read_bytes(), name
    assert set(json.loads((out / "wsm_merge.json").read_text())["files"]) >= TRAINERS_OWN
    assert verify(out, full=True).note == ""


@pytest.mark.parametrize(("stage", "tied"), CASES)
def test_transformers_loads_the_safetensors_of_a_trainer_run_without_more_ado(
    trained: Trained, tmp_path: Path, stage: int, tied: bool
) -> None:
    run = trained[0] / f"{stage}{tied}"
    out = merge_two(run, tmp_path / "out", format="safetensors", dtype="fp32", max_shard_size="8KiB")
    names = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"}
    names |= {"model.safetensors.index.json", "wsm_merge.json"}
    assert {path.name for path in out.iterdir() if path.suffix != ".safetensors"} == names
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    wanted = merged_parameters(sources(run), COEFFICIENTS, stage)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    reference = AutoModelForCausalLM.from_config(model.config, dtype=torch.float32)
    loaded = reference.load_state_dict(wanted, strict=False)
    assert loaded.unexpected_keys == []
    assert loaded.missing_keys == (["lm_head.weight"] if tied else [])
    tokens = torch.arange(12).view(2, 6)
    assert torch.equal(model.eval()(tokens).logits, reference.eval()(tokens).logits)
    assert AutoTokenizer.from_pretrained(out).decode([3, 1]) == "t3 t1"
    assert verify(out, full=True).note == ""


@pytest.mark.parametrize(("stage", "tied"), CASES)
def test_a_model_of_transformers_is_filled_in_memory_as_from_a_file(
    trained: Trained, tmp_path: Path, stage: int, tied: bool
) -> None:
    from transformers import AutoModelForCausalLM

    run = trained[0] / f"{stage}{tied}"
    for dtype in (torch.float32, torch.bfloat16):
        out = merge_two(run, tmp_path / str(dtype), format="safetensors")
        wanted = AutoModelForCausalLM.from_pretrained(out, dtype=dtype)
        model = AutoModelForCausalLM.from_config(wanted.config, dtype=dtype)
        tags = ("checkpoint-2", "checkpoint-4")
        loaded = load_merge(model, run, tags=tags, coefficients=COEFFICIENTS, allow=("warmup", "lr-change"))
        assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
        assert (loaded.kept, loaded.left_out) == ((), ())
        for name, tensor in wanted.state_dict().items():
            assert same_bits(model.state_dict()[name], tensor), name
        tokens = torch.arange(12).view(2, 6)
        assert torch.equal(model.eval()(tokens).logits, wanted.eval()(tokens).logits)


def test_a_run_of_trainer_is_evaluated_without_a_word_about_its_model(
    trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = trained[0] / "3True"
    data, records = tmp_path / "held.bin", tmp_path / "e.jsonl"
    tokens = torch.randint(0, 13, (300,), generator=torch.Generator().manual_seed(2))
    data.write_bytes(tokens.to(torch.uint16).numpy().tobytes())
    zero = merge_two(run, tmp_path / "zero")
    exported = merge_two(run, tmp_path / "exported", format="safetensors", dtype="fp32")
    save = tmp_path / "checkpoint-4"
    shutil.copytree(run / "checkpoint-4", save)
    for weights in save.glob("*.safetensors"):  # Trainer's own, of which there are some in stage 3
        weights.unlink()
    folders = [zero, exported, save, run / "checkpoint-4/global_step4"]
    flags = ["--data", str(data), "--sequence-length", "6", "--out", str(records)]
    assert main(["evaluate", *map(str, folders), *flags]) == 0, capsys.readouterr().err
    made = [json.loads(line) for line in records.read_text().splitlines()]
    assert [one["subject"]["kind"] for one in made] == ["merge", "merge", "checkpoint", "checkpoint"]
    assert made[2]["blocks"] == made[3]["blocks"]
    assert made[0]["blocks"] == made[1]["blocks"] != made[2]["blocks"]
    assert [source["coefficient"] for source in made[0]["subject"]["sources"]] == COEFFICIENTS


def test_an_included_file_wins_and_later_arrivals_beside_the_source_do_not_disturb(
    trained: Trained, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained[0] / "2True", run)
    own = tmp_path / "config.json"
    own.write_text('{"mine": true}')
    common: dict[str, Any] = {"run": run, "last": 1, "coefficients": (1.0,)}
    plan = plan_merge(make_recipe(out=tmp_path / "out", include=(own,), **common))
    described = {entry["name"]: entry["bytes"] for entry in plan.to_json()["outputs"][0]["files"]}
    assert described["config.json"] == own.stat().st_size
    assert "trainer_state.json" in described
    merge(out=tmp_path / "out", include=(own,), **common)
    assert (tmp_path / "out/config.json").read_bytes() == own.read_bytes()
    (run / "checkpoint-6/README.md").write_text("pushed to a hub later")
    assert verify(tmp_path / "out", full=True).note == ""
    merge(run=tmp_path / "out", last=1, curve="linear", out=tmp_path / "again")  # a merge is such a folder, too
    assert {path.name for path in (tmp_path / "again").iterdir()} == {p.name for p in (tmp_path / "out").iterdir()}


def test_a_run_without_trainer_carries_nothing_that_lies_about(trained: Trained, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained[0] / "2True/checkpoint-6", run)
    (run / "trainer_state.json").unlink()
    merge(run=run, last=1, curve="linear", out=tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"global_step6", "latest", "wsm_merge.json"}


def test_a_resharded_trainer_folder_keeps_trainers_files(trained: Trained, tmp_path: Path) -> None:
    reshard(trained[0] / "2True", tag="checkpoint-4", out=tmp_path / "out", world_size=3)
    assert json.loads((tmp_path / "out/trainer_state.json").read_text())["global_step"] == 4
    assert len(list((tmp_path / "out/global_step4").glob("*_optim_states.pt"))) == 3


def test_names_are_changed_by_rules_and_never_made_equal(trained: Trained, tmp_path: Path) -> None:
    run = trained[0] / "2False"
    (tmp_path / "report.json").write_text("{}")
    rules = ["--rename", r"^model\.=", "--rename", r"layers\.(\d+)=block\1", "--include", str(tmp_path / "report.json")]
    assert main(["export", str(run), "--out", str(tmp_path / "out"), *rules]) == 0
    names = set(load_file(tmp_path / "out/model.safetensors"))
    assert {"embed_tokens.weight", "block0.mlp.up_proj.weight", "block1.input_layernorm.weight", "norm.weight"} <= names
    assert (tmp_path / "out/report.json").is_file()
    common: dict[str, Any] = {"run": run, "last": 1, "curve": "linear", "format": "safetensors", "out": tmp_path / "no"}
    with pytest.raises(RecipeError, match=r"the name 'x', which .* has already"):
        merge(**common, rename={".*proj.*": "x"})
    with pytest.raises(RecipeError, match="not a regular expression"):
        merge(**common, rename={"(": "x"})
    with pytest.raises(RecipeError, match="`rename` is for safetensors"):
        merge(**common | {"format": "zero"}, rename={"a": "b"})
    with pytest.raises(RecipeError, match=r"nothing\.json is not a file"):
        merge(**common, include=(run / "nothing.json",))
    assert not (tmp_path / "no").exists()

"""`wsm-ds evaluate`: merges, raw checkpoints and folders beside each other, measured once, by any number of ranks."""

import json
import math
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ds_models import TinyModel
from forked import free_port
from made_models import save_config, save_llama
from processes import is_gone
from safetensors.torch import load_file, save_file

from wsm_ds import merge
from wsm_ds.cli import main
from wsm_ds.evaluation.evaluation import Evaluation, Subject
from wsm_ds.evaluation.loss import LossEvaluator
from wsm_ds.evaluation.records import Records

CLI = "import sys; from wsm_ds.cli import main; sys.exit(main(sys.argv[1:]))"
TINY = ["--model", "ds_models:TinyModel", "--vocabulary", "13"]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "held.bin"
    path.write_bytes(np.random.default_rng(1).integers(0, 13, 600).astype("<u2").tobytes())
    return path


def words(data: Path, *folders: Path, length: int = 16) -> list[str]:
    return ["evaluate", *map(str, folders), "--data", str(data), "--sequence-length", str(length)]


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def loss_of(model: torch.nn.Module, data: Path) -> float:
    """A literal reference."""
    tokens = torch.from_numpy(np.fromfile(data, "<u2").astype(np.int64))
    rows = [tokens[start : start + 17] for start in range(0, 16 * ((len(tokens) - 1) // 16), 16)]
    with torch.no_grad():
        losses = [torch.nn.functional.cross_entropy(model(row[None, :-1])[0].double(), row[1:]).item() for row in rows]
    return math.fsum(losses) / len(losses)


@pytest.mark.parametrize("stage", [2, 3])
def test_raw_merged_and_exported_weights_are_measured_alike(
    runs: Path, tmp_path: Path, data: Path, stage: int, capsys: pytest.CaptureFixture[str]
) -> None:
    run, zero, weights = runs / f"w2_s{stage}_bf16", tmp_path / "zero", tmp_path / "weights"
    merge(run=run, last=3, curve="linear", out=zero)
    merge(run=run, last=3, curve="linear", out=weights, format="safetensors", dtype="fp32")
    out = tmp_path / "evaluations.jsonl"
    folders = [run / "global_step6", zero, weights]
    assert main([*words(data, *folders), *TINY, "--out", str(out)]) == 0
    raw, merged, exported = Records(out).all()
    assert [made.subject.kind for made in (raw, merged, exported)] == ["checkpoint", "merge", "merge"]
    assert merged.blocks == exported.blocks != raw.blocks
    model = TinyModel()
    model.load_state_dict(load_file(weights / "model.safetensors"), strict=False)
    assert merged.metrics["loss"].value == pytest.approx(loss_of(model.eval(), data), rel=1e-6)
    printed = capsys.readouterr().out
    assert "less global_step6" in printed
    assert f"zero: loss: loss {merged.metrics['loss'].value:.6g} ±" in printed


def test_the_newest_checkpoint_of_a_merge_is_measured_beside_it(
    runs: Path, tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, out = tmp_path / "run", tmp_path / "e.jsonl"
    shutil.copytree(runs / "w2_s2_bf16", run)
    merges = [tmp_path / "long", tmp_path / "short"]
    for folder, last in zip(merges, (3, 2), strict=True):
        merge(run=run, last=last, curve="linear", out=folder)
    flags = [*TINY, "--raw", "--command", "echo 1", "--out", str(out)]
    assert main([*words(data, *merges), *flags]) == 0
    made = [(line["subject"]["name"], line["evaluator"]["kind"]) for line in lines(out)]
    assert made == [
        *((name, kind) for name in ("long", "short") for kind in ("loss", "command")),
        ("global_step6", "loss"),
    ]
    assert "long         " in capsys.readouterr().out
    shutil.rmtree(run / "global_step6")
    assert main([*words(data, *merges), *flags]) == 0
    assert len(lines(out)) == 5


def test_nothing_is_measured_twice(tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second, out = save_llama(tmp_path / "a"), save_llama(tmp_path / "b", 1), tmp_path / "e.jsonl"
    assert main([*words(data, first), "--out", str(out)]) == 0
    assert main([*words(data, first, second), "--out", str(out)]) == 0
    assert [line["subject"]["name"] for line in lines(out)] == ["a", "b"]
    assert "measured before" in capsys.readouterr().out
    assert main([*words(data, first, length=32), "--out", str(out)]) == 0
    assert main([*words(data, first), "--out", str(out), "--again"]) == 0
    assert [line["subject"]["name"] for line in lines(out)] == ["a", "b", "a", "a"]
    assert lines(out)[0]["blocks"] == lines(out)[3]["blocks"]


def test_without_a_file_the_results_are_printed_alone(
    tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(tmp_path.iterdir())
    folder = save_llama(tmp_path / "a")
    assert main([*words(data, folder), "--json"]) == 0
    made = Evaluation.model_validate_json(capsys.readouterr().out)
    subject = Subject(name="a", kind="folder", identity="", path="")
    evaluator = LossEvaluator.model_validate({"data": str(data), "sequence_length": 16})
    assert made.metrics == evaluator.measure_folder(folder, subject).metrics
    assert sorted(tmp_path.iterdir()) == sorted([*before, folder])


def test_a_model_that_fails_costs_itself_alone(tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good, short, bad = (save_llama(tmp_path / name) for name in ("good", "short", "bad"))
    tensors = load_file(short / "model.safetensors")
    missing = tensors.pop("model.norm.weight")
    save_file(tensors, short / "model.safetensors", metadata={"format": "pt"})
    tensors |= {"model.norm.weight": missing * math.nan}
    save_file(tensors, bad / "model.safetensors", metadata={"format": "pt"})
    out = tmp_path / "e.jsonl"
    capsys.readouterr()
    assert main([*words(data, short, bad, good), "--out", str(out)]) == 3
    failures = [line["failure"] for line in lines(out)]
    assert failures[0].startswith("ModelMismatch: the weights in")
    assert "the loss is not a finite number in 37 of 37 blocks" in failures[1]
    assert failures[2] is None
    error = capsys.readouterr().err
    assert error.startswith("wsm-ds: EvaluationError: 2 of 3 measurements failed: short: ModelMismatch")
    assert main([*words(data, short, bad, good), "--out", str(out)]) == 3
    assert len(lines(out)) == 5  # what failed was tried again


def on_two_ranks(*arguments: str) -> list[tuple[int, str, str]]:
    """(exit code, stdout, stderr) of both."""
    meeting = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    pipe = subprocess.PIPE
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", CLI, *arguments], env=os.environ | meeting | {"RANK": str(rank)},
            stdout=pipe, stderr=pipe, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    said = [process.communicate(timeout=300) for process in ranks]
    return [(process.returncode, *texts) for process, texts in zip(ranks, said, strict=True)]


def test_a_model_that_one_rank_alone_cannot_load_is_a_failure_on_both(tmp_path: Path, data: Path) -> None:
    folder, model, out = save_llama(tmp_path / "a"), tmp_path / "model.py", tmp_path / "e.jsonl"
    model.write_text(
        "import os, transformers\n"
        "def make():\n    assert os.environ['RANK'] == '0', 'no room on this rank'\n"
        f"    return transformers.LlamaForCausalLM(transformers.LlamaConfig.from_pretrained({str(folder)!r}))\n"
    )
    good = save_llama(tmp_path / "good")
    arguments = words(data, folder, good)
    first, second = on_two_ranks(*arguments, "--model", f"{model}:make", "--out", str(out))
    assert (first[0], second[0]) == (3, 3)
    assert "2 of 2 measurements failed: a: EvaluationError: the model" in first[2]
    assert [line["failure"].endswith("no room on this rank") for line in lines(out)] == [True, True]
    assert [code for code, _, _ in on_two_ranks(*arguments, "--out", str(out))] == [0, 0]
    assert [line["failure"] for line in lines(out)[2:]] == [None, None]


def test_several_ranks_give_the_same_bits_and_one_line(tmp_path: Path, data: Path) -> None:
    folder = save_llama(tmp_path / "a")
    assert main([*words(data, folder), "--batch-size", "2", "--out", str(tmp_path / "alone.jsonl")]) == 0
    first, second = on_two_ranks(*words(data, folder), "--batch-size", "2", "--out", str(tmp_path / "e.jsonl"))
    assert (first[0], second[0]) == (0, 0)
    assert second[1] == ""
    (alone,), (together,) = lines(tmp_path / "alone.jsonl"), lines(tmp_path / "e.jsonl")
    assert (alone["blocks"], alone["metrics"]) == (together["blocks"], together["metrics"])


def test_programs_and_generation_beside_the_loss(tmp_path: Path, data: Path) -> None:
    folder, out = save_llama(tmp_path / "a"), tmp_path / "e.jsonl"
    script = tmp_path / "measure.py"
    script.write_text("import os, sys\nprint({'files': 1.0 * len(os.listdir(sys.argv[1]))}['files'])")
    program = shlex.join([sys.executable, str(script), "{}"])
    flags = ["--generate", "--prompts", "3", "--most-tokens", "8", "--command", program, "--retries", "1"]
    assert main([*words(data, folder), *flags, "--out", str(out)]) == 0
    made = {line["evaluator"]["kind"]: line for line in lines(out)}
    assert list(made) == ["loss", "generate", "command"]
    assert made["command"]["metrics"]["value"]["value"] == len(list(folder.iterdir()))
    assert set(made["generate"]["metrics"]) == {"looping", "at_limit", "repeated_4grams", "median_length"}
    assert len(list((tmp_path / "e.output").rglob("stdout"))) == 1


@pytest.mark.parametrize(
    ("flags", "words_of_error", "code"),
    [
        ([], "one of --data, --command, --lm-eval and --evaluator must say", 2),
        (["--data", "absent.bin"], "the held-out data absent.bin does not exist", 3),
        (["--data", "{data}", "--sequence-length", "100"], "--sequence-length 100 is longer than the 64 positions", 3),
        (["--data", "{data}", "--sequence-length", "2000"], "a block of --sequence-length 2000 needs 2001", 3),
        (["--data", "{data}", "--blocks", "0"], "--blocks must be at least 1, not 0", 2),
        (
            ["--data", "{data}", "--sequence-length", "16", "--vocabulary", "5"],
            "hold token 12, and the model knows 5 tokens",
            3,
        ),
        (["--command", "no-such-program {}"], "the program no-such-program is not found", 3),
        (["--command", "echo 1", "--lm-eval", "arc", "--metric", "a"], "--metric could be of --command or of", 2),
        (["--generate"], "one of --data", 2),
        (["--data", "{data}", "--evaluator", "x.yaml"], "--evaluator says what is measured", 2),
        (["--data", "{data}@0"], "the weight must be above 0", 2),
    ],
)
def test_a_wrong_request_is_one_line_before_anything_is_measured(
    tmp_path: Path, data: Path, flags: list[str], words_of_error: str, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, out = save_llama(tmp_path / "a"), tmp_path / "e.jsonl"
    filled = [flag.replace("{data}", str(data)) for flag in flags]
    assert main(["evaluate", str(folder), *filled, "--out", str(out)]) == code
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert words_of_error in error
    assert not out.exists()


def test_folders_are_checked_before_the_first_is_measured(
    tmp_path: Path, data: Path, runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, out = save_llama(tmp_path / "a"), tmp_path / "e.jsonl"
    assert main([*words(data, folder, tmp_path / "absent"), "--out", str(out)]) == 3
    assert "absent is not a folder" in capsys.readouterr().err
    assert main([*words(data, folder, runs / "w2_s2_bf16"), "--out", str(out)]) == 3
    assert "holds no weights" in capsys.readouterr().err
    assert not out.exists()
    assert main([*words(data, runs / "w2_s2_bf16/global_step6"), "--out", str(out)]) == 3
    assert "say by --model what it is of" in capsys.readouterr().err
    config = ["--model", str(save_config(tmp_path / "c"))]
    assert main([*words(data, runs / "w2_s2_bf16/global_step6"), *config, "--out", str(out)]) == 3
    assert "ModelMismatch" in capsys.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_killed_evaluation_loses_nothing_and_goes_on(tmp_path: Path, number: int) -> None:
    folders = [tmp_path / name for name in ("a", "b", "c")]
    for folder in folders:
        folder.mkdir()
        (folder / "model.safetensors").touch()
    script, out, ready = tmp_path / "measure.py", tmp_path / "e.jsonl", tmp_path / "ready"
    script.write_text(
        "import os, pathlib, sys, time\nfolder = pathlib.Path(sys.argv[1])\n"
        f"(folder / 'runs').open('a').write('x')\nready = pathlib.Path({str(ready)!r})\n"
        "if folder.name == 'b' and not ready.exists():\n"
        "    ready.write_text(str(os.getpid())); time.sleep(600)\n"
        "print(len(folder.name))"
    )
    command = ["evaluate", *map(str, folders), "--command", shlex.join([sys.executable, str(script), "{}"])]
    process = subprocess.Popen(
        [sys.executable, "-c", CLI, *command, "--out", str(out)], stderr=subprocess.PIPE, text=True
    )
    while not (ready.exists() and ready.read_text()):
        assert process.poll() is None
        time.sleep(0.02)
    os.kill(process.pid, number)
    _, error = process.communicate(timeout=60)
    measuring = int(ready.read_text())
    if number == signal.SIGTERM:
        assert process.returncode == 130
        assert error.startswith("wsm-ds: Interrupted: SIGTERM; what was measured is kept. Run the same command again")
        assert is_gone(measuring)
    else:
        os.kill(measuring, signal.SIGKILL)
    assert [line["subject"]["name"] for line in lines(out)] == ["a"]
    assert main([*command, "--out", str(out)]) == 0
    assert [line["subject"]["name"] for line in lines(out)] == ["a", "b", "c"]
    assert [(folder / "runs").read_text() for folder in folders] == ["x", "xx", "x"]


def test_a_config_that_was_corrected_is_measured_anew(tmp_path: Path, data: Path) -> None:
    folder = save_llama(tmp_path / "model", vocab_size=13)
    config, out = folder / "config.json", tmp_path / "evaluations.jsonl"
    for count in (1, 1):
        assert main([*words(data, folder), "--out", str(out)]) == 0
        assert len(lines(out)) == count
    content = json.loads(config.read_text())
    config.write_text(json.dumps(content | {"rms_norm_eps": 0.5}))
    for count in (2, 2):
        assert main([*words(data, folder), "--out", str(out)]) == 0
        assert len(lines(out)) == count
    first, second = (line["metrics"]["loss"]["value"] for line in lines(out))
    assert first != second
    for count in (3, 3):
        (tmp_path / "own.json").write_text(json.dumps(content))
        assert main([*words(data, folder), "--out", str(out), "--model", str(tmp_path / "own.json")]) == 0
        assert len(lines(out)) == count
    assert lines(out)[-1]["metrics"] == lines(out)[0]["metrics"]

"""Every command and every Python example of the README and docs/ is run, as it stands but for the sizes of windows."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from docs.pages import DOCS, GENERATED, PAGES, ROOT, Block, blocks, for_the_tiny_run
from evaluated import make_evaluated
from made_results import put_measurements

RUNNABLE = [page for page in PAGES if page not in GENERATED]
NOT_RUN = {
    "pip install .": "the Makefile installs the package so, with --editable, before any test",
    "pip install '.[train]'": "the same, with the extras of the tests",
    "make quickstart": "tests/test_quickstart.py runs launch/quickstart.py, with fewer updates",
    "make test": "this is it",
    "torchrun --nproc-per-node 8 -- launch/pretrain.py --run RUN --config configs/zero2_bf16.json --until-step 10000 "
    "--save-every 500 --data tokens.bin": "tests/training and tests/launch run launch/pretrain.py",
    'engine.load_checkpoint("quickstart/mean")': "needs an engine; tests/test_merge_deepspeed.py loads every merge",
    "wsm-ds evaluate HF_MODEL --lm-eval arc_easy,hellaswag --limit 200 --metric arc_easy/acc_norm": "its tasks need a "
    "network; tests/evaluation/test_lm_eval.py runs lm-eval on local ones",
    "slots = wsm_ds.averaging.SlotMeans(": "tests/averaging does the same with engines of every kind",
    "trainer.add_callback(": "tests/averaging/test_trainer_slots_deepspeed.py runs it in a Trainer",
    "job = TrainingJob(": "tests/training/test_training_job_deepspeed.py runs the whole script",
}
"""Commands, and beginnings of Python examples, that are not run here; and why."""
LANGUAGES = {"sh", "python", "text", "json", "yaml"}
YAML_NUMBERS = {"8": "3", "4": "2", "2": "1", "1400": "4", "1600": "6"}
SHIMS = {
    "wsm-ds": '-m wsm_ds "$@"',
    "torchrun": '-m torch.distributed.run "$@"',
    "python": '"$@"',
}
PRELUDES = {
    "import deepspeed": "import torch; from wsm_ds.training.compilation import prepare_compilation\n"
    "prepare_compilation(); model = torch.nn.Linear(4, 1)\n"
}
"""What has been done before an example begins, by its first line."""
ONE_RANK = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}


@pytest.fixture
def folder(runs: Path, tmp_path: Path) -> Path:
    """A folder that has what the pages speak of: a run, the quickstart's run, configs/, commands on the PATH."""
    for name in ("RUN", "quickstart/run"):
        shutil.copytree(runs / "w2_s2_bf16", tmp_path / name)
    (tmp_path / "configs").mkdir()
    for recipe in (ROOT / "configs").glob("*.yaml"):
        text = re.sub(r"(?<=[ [])\d+(?=[],}\n])", lambda match: YAML_NUMBERS[match[0]], recipe.read_text())
        (tmp_path / "configs" / recipe.name).write_text(text)
    for path in (tmp_path / "ds_config.json", tmp_path / "configs/zero2_bf16.json"):
        shutil.copyfile(ROOT / "configs/zero2_bf16.json", path)
    make_evaluated(tmp_path)
    (tmp_path / "launch").mkdir()
    (tmp_path / "launch/gpt.py").write_text((tmp_path / "model.py").read_text() + "\nGPT = make\n")
    # Bytes that the model of the tests' run knows as tokens.
    (tmp_path / "quickstart/held_out.txt").write_bytes(bytes(i * i % 13 for i in range(3000)))
    (tmp_path / "eval.py").write_text("import sys; assert sys.argv[1] == '--model', sys.argv\n")
    (tmp_path / "bin").mkdir()
    for name, words in SHIMS.items():
        shim = tmp_path / "bin" / name
        shim.write_text(f"#!/bin/sh\nexec '{sys.executable}' {words}\n")
        shim.chmod(0o755)
    return tmp_path


def environment(folder: Path) -> dict[str, str]:
    paths = {"PATH": f"{folder / 'bin'}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    return os.environ | ONE_RANK | paths | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}


def run_block(block: Block, folder: Path) -> str:
    """Runs the commands of a block, or its Python; returns what they printed."""
    if block.language == "python":
        prelude = PRELUDES.get(block.text.splitlines()[0], "")
        command = [sys.executable, "-c", prelude + for_the_tiny_run(block.text)]
    else:
        commands = [for_the_tiny_run(command) for command in block.commands if command not in NOT_RUN]
        command = ["bash", "-e", "-c", "\n".join(commands)]
    variables = environment(folder)
    if block.language != "python":
        for name in ONE_RANK:
            del variables[name]
    done = subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, f"{block.page.name}: {command[-1]}\n{done.stdout[-3000:]}{done.stderr[-3000:]}"
    return done.stdout


@pytest.mark.parametrize("page", RUNNABLE, ids=lambda page: page.stem)
def test_every_example_of_a_page_runs_in_its_order(page: Path, folder: Path) -> None:
    if page.stem == "report":
        put_measurements(folder)
    for block in blocks(page, "sh", "python"):
        if any(block.text.startswith(beginning) for beginning in NOT_RUN) and block.language == "python":
            continue
        printed = run_block(block, folder).splitlines()
        if block.language == "python":
            promised = re.findall(r"^print\(.*\)\s+# (.*)$", block.text, flags=re.MULTILINE)
            assert not promised or printed == promised


def test_every_block_says_what_it_is() -> None:
    for page in RUNNABLE:
        assert {block.language for block in blocks(page)} <= LANGUAGES, page


def test_what_is_not_run_stands_on_a_page() -> None:
    commands = [command for page in RUNNABLE for block in blocks(page, "sh") for command in block.commands]
    examples = [block.text for page in RUNNABLE for block in blocks(page, "python")]
    for words in NOT_RUN:
        assert words in commands or any(example.startswith(words) for example in examples), words


def test_the_recipe_of_the_page_is_that_of_the_repository() -> None:
    (block,) = blocks(DOCS / "merge.md", "yaml")
    assert yaml.safe_load(block.text) == yaml.safe_load((ROOT / "configs/merge_sweep.yaml").read_text())

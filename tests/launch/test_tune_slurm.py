"""A tuning as an array of Slurm jobs: the recommendation of one process."""

import json
from pathlib import Path
from typing import Any

from cluster.cluster import Cluster
from pretraining import Run
from readme import do_as_readme

from wsm_ds.cli import main

MODEL_FILE = """
from launch.gpt import GPT, GPTSize


def model():
    return GPT(GPTSize(layers=2, width=32, heads=2, context=32))
"""


def result_in(folder: Path) -> dict[str, Any]:
    result: dict[str, Any] = json.loads((folder / "tuning.json").read_text())
    return result


def test_an_array_recommends_what_one_process_does(
    idle_cluster: Cluster, site: dict[str, str], uninterrupted: dict[int, Run], data: Path, tmp_path: Path
) -> None:
    here = tmp_path / 'it\'s "here"'
    here.mkdir()
    (here / "run").symlink_to(uninterrupted[3].folder)
    (tmp_path / "model.py").write_text(MODEL_FILE)
    measure = ["--data", str(data), "--tokenizer", "bytes", "--model", f"{tmp_path}/model.py:model"]
    measure += ["--sequence-length", "32", "--blocks", "40"]
    of_run = {"run": here / "run", "data": Path(), "options": ("--output", here / "%x-%A_%a.out"), **site}
    array = do_as_readme(idle_cluster, "slurm/tune.sbatch", MEASURE=" ".join(measure), **of_run).stdout.strip()
    for task in range(2):
        idle_cluster.wait(f"{array}_{task}", "COMPLETED")
    alone = ["tune", str(here / "run"), "--windows", "2,4", "--curve", "linear,1-sqrt", *measure]
    assert main([*alone, "--out", str(tmp_path / "alone")]) == 0
    made, expected = result_in(here / "run-tune"), result_in(tmp_path / "alone")
    assert made["waiting"] == []
    assert made["recommendation"] == expected["recommendation"]
    assert [one["metrics"] for one in made["candidates"]] == [one["metrics"] for one in expected["candidates"]]
    lines = [(here / f"tune-{array}_{task}.out").read_text() for task in range(2)]
    assert all("of 4" in text for text in lines)  # eight candidates, shared

"""The commands as users type them."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from wsm_ds.cli import main
from wsm_ds.planning.recipe import load_recipes

CONFIGS = Path(__file__).parent.parent / "configs"


def test_inspect_shows_every_checkpoint_and_whether_it_is_complete(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Path(shutil.copytree(runs / "w2_s3_bf16", tmp_path / "run"))
    next((run / "global_step4").glob("*rank_1*optim_states.pt")).unlink()
    assert main(["inspect", str(run)]) == 3
    shown = capsys.readouterr().out.splitlines()
    assert shown[0].split() == ["checkpoint", "step", "zero", "dtype", "ranks", "parameters", "size", "lr", "complete"]
    assert shown[1].split()[:6] == ["global_step2", "2", "3", "bf16", "2", "569"]
    assert shown[1].split()[-2:] == ["0.01", "yes"]
    assert shown[2].split()[-1] == "no"
    assert "global_step4: " in shown[-1]
    assert "1 of 2 ranks' optimizer files are missing" in shown[-1]
    assert main(["inspect", str(run), "--tag", "global_step6", "--json"]) == 0
    (described,) = json.loads(capsys.readouterr().out)
    assert described["tensors"]["hidden.weight"] == {"shape": [19, 9], "dtype": "bf16", "role": "parameter"}
    assert described["tied"] == {"head.weight": "embedding.weight"}
    assert described["optimizer_states"] == ["exp_avg", "exp_avg_sq"]


def test_the_plan_is_shown_before_anything_is_written(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["merge", str(runs / "w2_s2_bf16"), "--last", "3", "--curve", "1-sqrt", "--out", str(tmp_path / "out")]
    assert main([*arguments, "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert [line.split() for line in shown.splitlines()[1:4]] == [
        ["global_step2", "2", "0.577350"],
        ["global_step4", "4", "0.239146"],
        ["global_step6", "6", "0.183503"],
    ]
    assert "effective sample size 2.36 of 3" in shown
    assert "lag 2.78769 steps" in shown
    assert list(tmp_path.iterdir()) == []
    assert main([*arguments, "--dry-run", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["bytes_to_write"] == sum(file["bytes"] for file in plan["outputs"][0]["files"])
    assert main([*arguments, "--json"]) == 0
    events = {event.pop("event"): event for event in map(json.loads, capsys.readouterr().out.splitlines())}
    assert list(events) == ["plan", "done", "summary"]
    assert events["summary"]["bytes_written"] == plan["bytes_to_write"]
    manifest = events["done"]["manifest"]
    assert manifest == json.loads((tmp_path / "out/wsm_merge.json").read_text())
    assert [source["step"] for source in manifest["sources"]] == [2, 4, 6]
    assert main(["verify", str(tmp_path / "out"), "--full"]) == 0
    assert "identical" in capsys.readouterr().out


def test_one_recipe_or_the_same_flags_give_the_same_bytes(runs: Path, tmp_path: Path) -> None:
    recipe: dict[str, Any] = {
        "run": str(runs / "w2_s2_bf16"),
        "from_step": 2,
        "to_step": 4,
        "curve": "cosine",
        "floor": 0.1,
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe | {"out": str(tmp_path / "a")}))
    assert main(["merge", "--recipe", str(tmp_path / "recipe.yaml")]) == 0
    flags = ["--from", "2", "--to", "4", "--curve", "cosine", "--floor", "0.1", "--out", str(tmp_path / "b")]
    assert main(["merge", recipe["run"], *flags]) == 0
    for path in (tmp_path / "a/global_step4").iterdir():
        assert path.read_bytes() == (tmp_path / "b/global_step4" / path.name).read_bytes()


def of_three_checkpoints(values: dict[str, Any]) -> dict[str, Any]:
    """A recipe's values with its windows cut down to steps 2, 4 and 6."""
    last = values.get("last")
    window = {"last": [1, 2, 3][: len(last)] if isinstance(last, list) else 3} if last else {}
    return values | window | ({"from_step": 2, "to_step": 6} if "from_step" in values else {})


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_of_configs_merges(path: Path, runs: Path, tmp_path: Path) -> None:
    text = of_three_checkpoints(yaml.safe_load(path.read_text()))
    text |= {"run": str(runs / "w2_s2_bf16"), "out": str(tmp_path / "out")}
    if "outputs" in text:
        text["outputs"] = [of_three_checkpoints(entry) for entry in text["outputs"]]
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(text))
    assert main(["merge", "--recipe", str(tmp_path / "recipe.yaml")]) == 0
    outs = [recipe.out for recipe in load_recipes(tmp_path / "recipe.yaml")]
    assert all((out / "wsm_merge.json").is_file() for out in outs)
    assert len(load_recipes(path)) == len(outs)


def test_coefficients_are_printed_for_even_and_uneven_windows(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["coefficients", "--curve", "1-sqrt", "-n", "4", "--json"]) == 0
    even = json.loads(capsys.readouterr().out)
    assert [round(c, 6) for c in even["coefficients"]] == [0.5, 0.207107, 0.158919, 0.133975]
    assert main(["coefficients", "--curve", "linear", "--steps", "100,200,400"]) == 0
    assert "effective sample size" in capsys.readouterr().out


def test_wrong_requests_end_with_code_2_and_one_line(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments in (
        ["merge", str(tmp_path / "nowhere"), "--last", "2", "--out", str(tmp_path / "out")],
        ["merge", str(runs / "w2_s2_bf16"), "--last", "2", "--curve", "zigzag", "--out", str(tmp_path / "out")],
        ["merge", str(runs / "w2_s2_bf16"), "--last", "2"],
        ["inspect", str(runs / "w2_s2_bf16"), "--tag", "global_step99"],
        ["coefficients", "--curve", "linear", "-n", "0"],
    ):
        assert main(arguments) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("wsm-ds: ")


def test_help_needs_neither_numpy_nor_torch() -> None:
    code = (
        "import sys\nfrom wsm_ds.cli import main\ntry:\n    main(['--help'])\nexcept SystemExit:\n    pass\n"
        "print(sorted({'numpy', 'torch', 'deepspeed', 'pydantic'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"

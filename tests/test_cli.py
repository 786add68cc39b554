"""The commands as users type them."""

import argparse
import importlib.util
import json
import logging
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from evaluated import make_evaluated
from made_results import put_measurements

from wsm_ds.cli import main, parser
from wsm_ds.planning.recipe import load_recipes

CONFIGS = Path(__file__).parent.parent / "configs"


def test_inspect_shows_every_checkpoint_and_whether_it_is_complete(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Path(shutil.copytree(runs / "w2_s3_bf16", tmp_path / "run"))
    next((run / "global_step4").glob("*rank_1*optim_states.pt")).unlink()
    assert main(["inspect", str(run)]) == 3
    shown = capsys.readouterr().out.splitlines()
    header = ["checkpoint", "step", "zero", "dtype", "ranks", "parameters", "size", "lr", "complete", "framework"]
    assert shown[0].split() == header
    assert shown[1].split()[:6] == ["global_step2", "2", "3", "bf16", "2", "569"]
    assert shown[1].split()[-3:] == ["0.01", "yes", "DeepSpeed"]
    assert shown[2].split()[-2:] == ["no", "DeepSpeed"]
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
    assert "\nwindow 6 steps   mean age 2.788 steps   standard deviation 1.557 steps\n" in shown
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


MESSAGES = {
    "merge RUN --last 2": "--out is missing",
    "merge --out NEW": "RUN is missing",
    "merge RUN --out NEW": "choose the window in exactly one way: --last, --last-tokens or --last-samples (with "
    "--to, if it does not end at the newest checkpoint), --from with --to, or --tags; found none of them",
    "merge RUN --last two --out NEW": "--last must be a whole number, not 'two'",
    "merge RUN --last 0 --out NEW": "--last must be at least 1, not '0'",
    "merge RUN --last 2 --format safetensor --out NEW": "--format must be zero, universal or safetensors, "
    "not 'safetensor' (did you mean 'safetensors'?)",
    "merge RUN --last 2 --memory-budget lots --out NEW": "--memory-budget: 'lots' is not a size; write for "
    "example 512MiB, 5GB or 1000000",
    "merge RUN --last 2 --dtype bf16 --out NEW": "--dtype (bf16) is for safetensors, a zero output keeps the run's "
    "precision; remove it, or set --format to safetensors",
    "merge --recipe recipe.yaml": "the recipe recipe.yaml is not valid: `last` must be a whole number, not 'two'",
    "merge --recipe recipe.yaml --last three": "the recipe recipe.yaml is not valid: --last must be a whole "
    "number, not 'three'",
    "merge --recipe mistyped.yaml": "the recipe mistyped.yaml is not valid: 'lats' is not a key of a recipe "
    "(did you mean 'last'?)",
    "reshard RUN --out NEW": "one of --world-size, --stage, --sub-group-size and --like must be given",
    "watch RUN --last 2": "--out must be given",
    "watch RUN --last 2 --out NEW --poll-s 0": "--poll-s must be above 0, not 0",
    "watch RUN --last 2 --out NEW --poll-s nan": "--poll-s must be above 0, not nan",
    "watch --recipe numbered.yaml": "the recipe numbered.yaml is not valid: `out`: the path of a folder is needed, "
    "found 3",
    "merge --recipe quoted.yaml": "the recipe quoted.yaml is not valid: `stage` must be 1, 2 or 3, not '2'",
    "storage --interval 10 --last 2 --parameters nan": "parameters and world size must be 1 or more, found nan "
    "parameters on 1 ranks",
    "storage --interval 10 --last 2 --parameters inf": "parameters and world size must be 1 or more, found inf "
    "parameters on 1 ranks",
    "coefficients --curve linear": "--checkpoints or --steps must be given",
}


@pytest.mark.parametrize(
    ("arguments", "suggestion"),
    [
        ("prune RUN --keep-window 3 --del", "'--del' is not a flag of this command (did you mean '--delete'?)"),
        ("merge RUN --last 2 --out NEW --res", "'--res' is not a flag of this command"),
        ("watch RUN --last 2 --out NEW --until=4", "'--until' is not a flag of this command"),
        ("check-node RUN --free 1GB", "'--free' is not a flag of this command"),
    ],
)
def test_flags_must_be_spelled_out(arguments: str, suggestion: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments.split())
    assert ended.value.code == 2
    assert suggestion in capsys.readouterr().err


@pytest.mark.parametrize("arguments", MESSAGES)
def test_errors_name_the_flag_or_the_key_of_the_recipe_and_show_the_value(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("recipe.yaml").write_text("{run: RUN, out: NEW, last: two, curve: linear}")
    Path("mistyped.yaml").write_text("{run: RUN, out: NEW, lats: 2, curve: linear}")
    Path("numbered.yaml").write_text("{run: RUN, out: 3, last: 2}")
    Path("quoted.yaml").write_text("{run: RUN, out: NEW, last: 2, stage: '2'}")
    assert main(arguments.split()) == 2
    expected = f"wsm-ds: RecipeError: {MESSAGES[arguments]}; see wsm-ds {arguments.split()[0]} --help\n"
    assert capsys.readouterr().err == expected


PARSER_MESSAGES = {
    "merg RUN": r"wsm-ds: COMMAND must be one of inspect, .*, not 'merg' \(did you mean 'merge'\?\)",
    "merge RUN --lasst 2": r"wsm-ds merge: '--lasst' is not a flag of this command \(did you mean '--last'\?\)",
    "merge RUN --world_size=2": r"wsm-ds merge: '--world_size' .* \(did you mean '--world-size'\?\)",
    "merge RUN OTHER": r"wsm-ds merge: 'OTHER' is not an argument of this command",
    "merge RUN --dtype bf17": r"wsm-ds merge: --dtype must be one of bf16, fp16, fp32, not 'bf17' .*'bf16'\?\)",
    "merge RUN --threads a": r"wsm-ds merge: --threads must be a whole number, not 'a'",
    "merge RUN --out": r"wsm-ds merge: --out needs a value",
    "inspect": r"wsm-ds inspect: RUN must be given",
    "inspect RUN -v -q": r"wsm-ds inspect: -q/--quiet and -v/--verbose cannot be given together",
    "reshard RUN --dtype bf16": r"wsm-ds reshard: '--dtype' is not a flag of this command",
    "reshard RUN --rename a=b": r"wsm-ds reshard: '--rename' is not a flag of this command",
    "reshard RUN --max-shard-size 1GB": r"wsm-ds reshard: '--max-shard-size' is not a flag of this command",
    "storage --interval 1 --restart": r"wsm-ds storage: '--restart' is not a flag of this command",
    "storage --interval 1 --threads 1": r"wsm-ds storage: '--threads' is not a flag of this command",
    "storage --interval 1 --include a": r"wsm-ds storage: '--include' is not a flag of this command",
}


@pytest.mark.parametrize("arguments", PARSER_MESSAGES)
def test_the_parser_refuses_in_one_line_and_suggests(capsys: pytest.CaptureFixture[str], arguments: str) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments.split())
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.fullmatch(PARSER_MESSAGES[arguments] + r"; see wsm-ds( \w+)? --help", line), line


def subparsers() -> dict[str, argparse.ArgumentParser]:
    (commands,) = (action for action in parser()._actions if isinstance(action, argparse._SubParsersAction))
    return dict(commands.choices)


def examples() -> list[str]:
    """Every example line of every command's help, in the order of the commands."""
    texts = [str(command.epilog) for name, command in subparsers().items() if name != "watchdog"]
    return [line.strip() for text in texts for line in text.splitlines() if line.startswith("  wsm-ds ")]


def test_the_examples_of_every_help_work(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In a folder where RUN is a run; steps are thousands in the examples and ones in the run of the tests."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("os.setpriority", lambda *_: None)
    Path("configs").symlink_to(Path(__file__).parents[1] / "configs")
    make_evaluated(tmp_path)
    for number, line in enumerate(examples()):
        run = Path("RUN")
        if not run.is_dir() or number == 0 or "prune" in line:
            shutil.rmtree(run, ignore_errors=True)
            shutil.copytree(runs / "w2_s3_bf16", run)
        if line.startswith("wsm-ds report"):
            put_measurements(Path())
        assert main(shlex.split(re.sub(r"([246])000\b", r"\1", line))[1:]) == 0, (line, capsys.readouterr().err)
    assert {line.split()[1] for line in examples()} == {*subparsers()} - {"watchdog"}


def test_every_flag_and_positional_has_a_help_text() -> None:
    for name, command in subparsers().items():
        assert command.description, name
        for action in command._actions:
            assert action.help, (name, action.dest)


def test_tag_and_tags_are_one_flag(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, dry = str(runs / "w2_s2_bf16"), ["--dry-run", "--json", "--out", str(tmp_path / "out")]
    plans = []
    for flags in (["--tags", "global_step2,global_step6"], ["--tag", "global_step2", "--tag", "global_step6"]):
        assert main(["merge", run, *flags, *dry]) == 0
        plans.append(json.loads(capsys.readouterr().out)["outputs"])
    assert plans[0] == plans[1]
    for command in (["export"], ["reshard", "--world-size", "3"]):
        for flag in ("--tag", "--tags"):
            assert main([command[0], run, *command[1:], flag, "global_step4", *dry]) == 0
            assert [source["step"] for source in json.loads(capsys.readouterr().out)["outputs"][0]["sources"]] == [4]
    assert main(["inspect", run, "--tags", "global_step4"]) == 0


def test_quiet_and_verbose_set_the_level_of_logging(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    command = ["merge", str(runs / "w2_s2_bf16"), "--last", "2", "--json", "--out"]
    levels = {"-q": logging.ERROR, "-v": logging.INFO, "-vv": logging.DEBUG, "--quiet": logging.ERROR}
    for flag, level in levels.items():
        assert main([*command, str(tmp_path / flag), flag]) == 0
        assert logging.getLogger("wsm_ds").level == level
    assert "planned 1 output" in caplog.text
    assert main([*command, str(tmp_path / "last")]) == 0
    assert logging.getLogger("wsm_ds").level == logging.WARNING


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_completion_is_printed_or_says_what_to_install(capsys: pytest.CaptureFixture[str], shell: str) -> None:
    has_shtab = importlib.util.find_spec("shtab") is not None
    with pytest.raises(SystemExit) as ended:
        main(["--print-completion", shell])
    shown = capsys.readouterr()
    if has_shtab:
        assert ended.value.code == 0
        assert "--optimizer-states" in shown.out
    else:
        assert ended.value.code == 2
        assert "pip install 'wsm_ds[completion]'" in shown.err


def test_the_watchdog_and_the_check_of_a_node_are_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check-node", str(tmp_path / "run"), "--free-bytes", "1KB"]) == 0
    assert ": fit: folder writable, " in capsys.readouterr().out
    assert main(["check-node", str(tmp_path / "run"), "--free-bytes", "1000TB"]) == 3
    assert ": unfit: " in capsys.readouterr().out
    assert main(["check-node", str(tmp_path / "run"), "--free-bytes", "lots"]) == 2
    assert "--free-bytes: 'lots' is not a size" in capsys.readouterr().err
    assert main(["watchdog", str(tmp_path / "run"), "--timeout-s", "1", "--start-timeout-s", "0"]) == 3
    assert "no rank has sent a heartbeat" in capsys.readouterr().err


INTERRUPTED = """
import sys, time
from wsm_ds.cli.options import signals_interrupt
from wsm_ds.errors import Interrupted
try:
    with signals_interrupt("Nothing remains."):
        print("ready", flush=True)
        time.sleep(60)
except Interrupted as error:
    sys.exit(error.exit_code)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_that_are_repeated_until_the_process_is_gone_do_not_change_its_exit_code(
    number: signal.Signals,
) -> None:
    with subprocess.Popen([sys.executable, "-c", INTERRUPTED], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        while process.poll() is None:
            process.send_signal(number)
        assert process.returncode == 130

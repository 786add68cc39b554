"""A tuning on two ranks of torchrun: the figures of one, and a clear end when a rank dies."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from forked import ENVIRONMENT, ROOT, as_torchrun, fork, free_port
from processes import is_gone
from tuned import LENGTH, write_tokens

from wsm_ds.cli import main
from wsm_ds.evaluation.records import Records

PATIENCE_S = 240.0


@pytest.fixture
def command_line(request_of: Callable[..., Any], tmp_path: Path) -> list[str]:
    """All but the value of --out, which is last."""
    data = write_tokens(tmp_path / "held_out.npy")
    words = ["tune", str(request_of().run), "--data", str(data), "--model", "ds_models:TinyModel", "--vocabulary", "13"]
    return [*words, "--sequence-length", str(LENGTH), "--batch-size", "7", "--out"]


def result_in(out: Path) -> dict[str, Any]:
    result = json.loads((out / "tuning.json").read_text())
    for one in result["candidates"]:
        del one["seconds"]
    return {key: result[key] for key in ("candidates", "recommendation", "waiting", "metric", "read_bytes")}


def test_two_ranks_give_the_figures_of_one_to_the_last_bit(
    command_line: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    second = write_tokens(tmp_path / "second.npy", seed=7)
    script = tmp_path / "size.py"
    script.write_text("import pathlib, sys\nprint(len(list(pathlib.Path(sys.argv[1]).iterdir())))\n")
    more = ["--windows", "2,4", "--curve", "linear,1-sqrt", "--confirm", str(second)]
    more += ["--final", f"{sys.executable} {script} {{}}", "--finalists", "2"]
    alone, together, log = tmp_path / "alone", tmp_path / "together", tmp_path / "log"
    assert main([*command_line, str(alone), *more]) == 0
    common = os.environ | ENVIRONMENT | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    ranks = [
        fork(ROOT / "wsm_ds/__main__.py", [*command_line, str(together), *more], common | as_torchrun(rank, 2),
             folder=tmp_path, log=log)
        for rank in range(2)
    ]  # fmt: skip
    for rank in ranks:
        rank.join(PATIENCE_S)
        rank.kill()
    assert [rank.exitcode for rank in ranks] == [0, 0], log.read_text()[-3000:]
    assert result_in(together) == result_in(alone)
    blocks = [
        {one.subject.name: one.blocks for one in Records(out / "evaluations.jsonl").all() if one.blocks is not None}
        for out in (alone, together)
    ]
    assert blocks[0] == blocks[1]
    assert log.read_text().count("  1 of ") == 1  # one rank speaks
    assert (together / "report.html").is_file()
    capsys.readouterr()


@pytest.mark.parametrize("dying", [0, 1])
def test_the_death_of_a_rank_ends_the_other_with_a_clear_error(
    command_line: list[str], tmp_path: Path, dying: int
) -> None:
    script, out, log = tmp_path / "slow.py", tmp_path / "tune", tmp_path / "log"
    script.write_text(
        f"import os, pathlib, time\npathlib.Path({str(tmp_path / 'program')!r}).write_text(str(os.getpid()))\n"
        "time.sleep(600)\n"
    )
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", free_port()]
    words = [*command_line, str(out), "--windows", "2", "--final", f"{sys.executable} {script} {{}}"]
    with log.open("wb") as file:
        launcher = subprocess.Popen([*torchrun, "-m", "wsm_ds", *words], stdout=file, stderr=subprocess.STDOUT,
                                    env=os.environ | ENVIRONMENT, cwd=tmp_path)  # fmt: skip
    try:
        wait_for(lambda: (tmp_path / "program").exists() and (tmp_path / "program").read_text() != "", launcher, log)
        os.kill(rank_of(launcher.pid, dying), signal.SIGKILL)
        launcher.wait(PATIENCE_S)
    finally:
        launcher.kill()
    said = log.read_text()
    assert launcher.returncode != 0
    words_of_end = [line for line in said.splitlines() if line.startswith("wsm-ds: ")]
    assert len(words_of_end) == 1, said[-3000:]
    assert any(word in words_of_end[0] for word in ("Interrupted: SIGTERM", "PeerFailed")), words_of_end
    assert len(Records(out / "evaluations.jsonl").all()) == 3  # what was measured is kept
    if dying == 1:
        assert is_gone(int((tmp_path / "program").read_text()))
    else:
        os.kill(int((tmp_path / "program").read_text()), signal.SIGKILL)


def wait_for(is_so: Callable[[], bool], process: subprocess.Popen[bytes], log: Path) -> None:
    deadline_s = time.monotonic() + PATIENCE_S
    while not is_so():
        assert process.poll() is None, log.read_text()[-3000:]
        assert time.monotonic() < deadline_s, log.read_text()[-3000:]
        time.sleep(0.05)


def rank_of(launcher: int, rank: int) -> int:
    """The process of a rank, among the launcher's children."""
    for child in Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split():
        if f"\0RANK={rank}\0".encode() in b"\0" + Path(f"/proc/{child}/environ").read_bytes():
            return int(child)
    raise AssertionError(f"the launcher {launcher} has no rank {rank}")

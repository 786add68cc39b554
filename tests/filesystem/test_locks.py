"""One holder at a time, who is named; a lock ends with its process."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from wsm_ds.errors import OutputLocked
from wsm_ds.filesystem.locks import hold_lock


def test_the_second_holder_is_refused_and_the_first_is_named(tmp_path: Path) -> None:
    with hold_lock(tmp_path / "lock", "another merge is writing OUT"):
        named = rf"another merge is writing OUT \(process {os.getpid()} on {os.uname().nodename}\)\."
        with pytest.raises(OutputLocked, match=named), hold_lock(tmp_path / "lock", "another merge is writing OUT"):
            pass
    with hold_lock(tmp_path / "lock", "nobody"):
        pass


def test_a_lock_ends_with_its_process_however_that_ends(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from wsm_ds.filesystem.locks import hold_lock\n"
        "with hold_lock(Path(sys.argv[1]), 'x'):\n    print('held', flush=True); time.sleep(60)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "lock")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    with pytest.raises(OutputLocked, match=f"process {process.pid} on"), hold_lock(tmp_path / "lock", "x"):
        pass
    process.send_signal(signal.SIGKILL)
    process.communicate()
    with hold_lock(tmp_path / "lock", "x"):
        pass

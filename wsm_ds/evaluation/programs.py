"""Runs a program that measures a model: with a time limit, in a process group of its own, its output kept in files."""

import contextlib
import hashlib
import os
import shlex
import shutil
import signal
import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path

from wsm_ds.errors import EvaluationError
from wsm_ds.evaluation.evaluator import MeasurementFailed

FOLDER, OUT = "{}", "{out}"
"""Stand in a word for the folder of the model, and for an empty folder where the program may write its results."""
STOP_S = 5.0
"""Seconds that a program has to end after SIGTERM, before SIGKILL."""
LAUNCHERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "ROLE_RANK", "MASTER_ADDR",
             "MASTER_PORT")  # fmt: skip
LAUNCHER_PREFIXES = ("TORCHELASTIC_", "SLURM_STEP", "SLURM_PROCID", "SLURM_LOCALID")
"""Variables that would make the program take itself for a rank of this process's launch."""
MOST_HASHED_BYTES = 1 << 22
TAIL_BYTES = 600
"""Of what a failed program printed, for the message."""


def words_of(command: str) -> tuple[str, ...]:
    """The words of a command line, split as a shell splits them. No shell runs it.

    Args:
        command: the line.

    Raises:
        EvaluationError: a quote is not closed, or the program is not found.
    """
    try:
        words = tuple(shlex.split(command))
    except ValueError as error:
        raise EvaluationError(f"the command {command!r} cannot be split into words: {error}.") from error
    if not words:
        raise EvaluationError("the command is empty.")
    require_program(words[0])
    return words


def require_program(name: str, cure: str = "Give its path, or set PATH.") -> None:
    """Raises EvaluationError if there is no such program.

    Args:
        name: of the program, or its path.
        cure: a sentence that says what to do.
    """
    if FOLDER not in name and shutil.which(name) is None:
        raise EvaluationError(f"the program {name} is not found. {cure}")


def hashes_of(words: Iterable[str]) -> dict[str, str]:
    """SHA-256 of the small files that the words of a command name, such as scripts: they decide what it measures."""
    hashes = {}
    for word in words:
        path = Path(word)
        with contextlib.suppress(OSError):
            if path.is_file() and path.stat().st_size <= MOST_HASHED_BYTES:
                hashes[word] = hashlib.sha256(path.read_bytes()).hexdigest()
    return hashes


def filled(words: Sequence[str], folder: Path, out: Path) -> list[str]:
    """The words with the two folders in their places."""
    return [word.replace(OUT, str(out)).replace(FOLDER, str(folder)) for word in words]


def run_program(words: Sequence[str], place: Path, timeout_s: float | None, variables: dict[str, str]) -> Path:
    """Runs a program to its end.

    Args:
        words: the program and its arguments.
        place: a folder, which exists; what it prints is kept in `stdout` and `stderr` there.
        timeout_s: after so many seconds the program and all its processes are ended; None: it may take any time.
        variables: added to its environment.

    Returns:
        The file with its output.

    Raises:
        MeasurementFailed: it cannot be started, takes too long, or ends with another code than 0.
    """
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in LAUNCHERS and not name.startswith(LAUNCHER_PREFIXES)
    }
    out, err = place / "stdout", place / "stderr"
    with out.open("wb") as out_file, err.open("wb") as err_file:
        try:
            process = subprocess.Popen(
                words, env=environment | variables, stdin=subprocess.DEVNULL, stdout=out_file, stderr=err_file,
                start_new_session=True,
            )  # fmt: skip
        except OSError as error:
            raise MeasurementFailed(f"{words[0]} cannot be started: {error.strerror}") from error
        try:
            code = process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise MeasurementFailed(f"{words[0]} took more than {timeout_s:g} s and was ended{_tail(err)}") from None
        finally:
            _stop(process)
    if code:
        how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        raise MeasurementFailed(f"{words[0]} ended with {how}{_tail(err)}")
    return out


def _stop(process: "subprocess.Popen[bytes]") -> None:
    """Ends what is left of a program: itself, and processes that it has started."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(STOP_S)
            return


def _tail(path: Path) -> str:
    """What a program printed last, for a message."""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - TAIL_BYTES))
        lines = file.read().decode(errors="replace").strip().splitlines()
    lines = [line for line in lines if line.strip(" ^~")]  # Python marks a place in the line above
    return f": {' | '.join(line.strip() for line in lines[-3:])}" if lines else ""

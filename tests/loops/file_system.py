"""Rounds of bad luck with processes and the file system: `python tests/loops/file_system.py LOOP --count N --seed S`.

A loop does real commands on copies of tests/golden, and stops at the first round that did not end as promised:

    kills   SIGKILL at a random moment, again and again until the command ends by itself: the output's bytes are those
            of an undisturbed merge, nothing else is left, no source has changed
    races   several processes make one output: one makes it, the others say so, and its bytes are right
    limits  ulimit -n, -f and -v of random sizes: the output is right, or an error and nothing are there
    paths   runs and outputs with odd names: the output is right, or the name is refused

The suite does a short round of each (`tests/loops/test_file_system.py`); the last long ones are in docs/guarantees.md.
"""

import argparse
import hashlib
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import wsm_ds.engine.worker
import wsm_ds.merging
import wsm_ds.watching  # noqa: F401 (a forked command has them at once)
from wsm_ds import cli
from wsm_ds.watching.kept_layouts import KEPT

GOLDEN = Path(__file__).parents[1] / "golden"
RUNS = ("zero1_bf16", "zero2_bf16", "zero3_bf16", "stage0_fp32")
LAUNCHER = ("torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m")
KINDS: dict[str, tuple[str, ...]] = {
    "zero": ("merge", "--last", "2"),
    "states": ("merge", "--last", "2", "--optimizer-states", "merge"),
    "universal": ("merge", "--last", "2", "--format", "universal"),
    "safetensors": ("merge", "--last", "2", "--format", "safetensors"),
    "several": ("merge", "--last", "1,2", "--curve", "linear,1-sqrt", "--format", "zero,safetensors"),
    "reshard": ("reshard", "--world-size", "3"),
    "export": ("export",),
    "watch": ("watch", "--last", "1,2", "--once"),
    "ranks": (*LAUNCHER, "wsm_ds", "merge", "--last", "2"),
}
NEEDS_ZERO = ("universal", "states", "reshard", "several", "ranks")
"""Kinds for which the run without ZeRO is left out."""
MANIFEST = "wsm_merge.json"
OF_A_RUN = (MANIFEST, "watch.json", ".wsm-watch.lock")
"""Files that hold a time, a path or a process."""
PATIENCE_S = 300.0
LONG_NAME = "n" * 240
ODD_NAMES = (
    "a b", "new\nline", "tab\t", "-dash", ".dot", "ä", "\udcff\udcfe", "'quote'", '"', "$HOME", "*", "a;b", "%s", "{}",
    "~", "#x", "back\\slash", "x" * 200, LONG_NAME, "\x1b[31m",
)  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A run in a folder of its own, a command on it, and what the command makes when nobody disturbs it."""

    kind: str
    run: Path
    right: dict[str, str]


def command(kind: str, run: Path, out: Path) -> list[str]:
    words = list(KINDS[kind])
    at = words.index("wsm_ds") + 2 if "wsm_ds" in words else 1
    words[at:at] = [f"{run}"]
    # `=`: a name may begin with a dash.
    return [sys.executable, "-m", *([] if "wsm_ds" in words else ["wsm_ds"]), *words, f"--out={out}"]


def start(words: list[str], limit: Callable[[], None] | None = None) -> "subprocess.Popen[bytes]":
    """Starts a command in a session of its own; its memory of files is the caller's."""
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": os.environ.get("PYTHONPATH", ""), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True, preexec_fn=limit,
        stdin=subprocess.DEVNULL, env=environment,
    )  # fmt: skip


def done(words: list[str], limit: Callable[[], None] | None = None) -> tuple[int, str]:
    process = start(words, limit)
    output, _ = process.communicate(timeout=PATIENCE_S)
    return process.returncode, output.decode(errors="replace")


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every file that holds no time and no path, by name, and the kind of everything that is no file."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if KEPT in path.relative_to(folder).parts:  # what a watch keeps of a run has its paths and times
            continue
        name = os.fsencode(path.relative_to(folder)).decode("utf-8", "backslashreplace")
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            found[name] = "neither file nor folder"
        elif path.is_file():
            found[name] = "" if path.name in OF_A_RUN else hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def cases(folder: Path, kinds: tuple[str, ...]) -> list[Case]:
    made = []
    for name in RUNS:
        run = Path(shutil.copytree(GOLDEN / name, folder / name))
        for kind in kinds:
            if name == "stage0_fp32" and kind in NEEDS_ZERO:
                continue
            right = folder / f"right-{name}-{kind}"
            # Several ranks write the same bytes as one process.
            words = command("zero" if kind == "ranks" else kind, run, right)
            code = Forked(words[3:], folder / "log").ends_within(PATIENCE_S)
            require(code == 0, f"{kind} of {name} ended with {code} although nobody disturbed it: {folder / 'log'}")
            made.append(Case(kind, run, digests(right)))
            shutil.rmtree(right)
    return made


def require(is_right: bool, words: str) -> None:
    if not is_right:
        raise SystemExit(f"NOT AS PROMISED: {words}")


def require_right(case: Case, place: Path, sources: dict[str, str], words: str) -> None:
    """The output is right, nothing is beside it, and the run is as it was."""
    require(digests(place / "out") == case.right, f"{words}: wrong bytes in {place / 'out'}")
    require([path.name for path in place.iterdir()] == ["out"], f"{words}: {place} holds {list(place.iterdir())}")
    require(digests(case.run) == sources, f"{words}: the sources changed")


class Forked:
    """A command in a fork of this process, which has imported everything: it starts in milliseconds."""

    def __init__(self, words: list[str], log: Path) -> None:
        self.log = log
        self.pid = os.fork()
        if self.pid:
            return
        code = 70
        try:
            os.setsid()
            output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(output, 1)
            os.dup2(output, 2)
            code = cli.main(words)
        finally:
            os._exit(code)

    def ends_within(self, seconds: float) -> int | None:
        """The exit code, or None if the command was still running and has been killed."""
        deadline_s = time.monotonic() + seconds
        while time.monotonic() < deadline_s:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.0005)
        os.kill(self.pid, signal.SIGKILL)
        _, status = os.waitpid(self.pid, 0)
        return None if os.WIFSIGNALED(status) else os.waitstatus_to_exitcode(status)


def ends_within(case: Case, out: Path, seconds: float, log: Path) -> int | None:
    """Runs a command for some time. Returns its exit code, or None if it has been killed."""
    words = command(case.kind, case.run, out)
    if case.kind != "ranks":
        return Forked(words[3:], log).ends_within(seconds)
    process = start(words)
    try:
        process.communicate(timeout=seconds * 10)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        return None
    return process.returncode


def kills(dice: random.Random, folder: Path, count: int) -> Counter[str]:
    everything = cases(folder, tuple(KINDS))
    # torchrun needs seconds to start, a forked command milliseconds.
    weights = [1 if case.kind == "ranks" else 20 for case in everything]
    killed: Counter[str] = Counter()
    while killed.total() < count:
        (case,) = dice.choices(everything, weights)
        place = folder / f"kill{killed.total()}"
        place.mkdir()
        sources = digests(case.run)
        lasts_s, code, log = 0.3, None, folder / "log"
        while code is None:
            code = ends_within(case, place / "out", dice.uniform(0.0, lasts_s), log)
            killed[case.kind] += code is None
            lasts_s *= 1.1  # so that it ends
        # Once more: it is known as done.
        again = ends_within(case, place / "out", PATIENCE_S, log)
        text = log.read_text(errors="replace") if log.exists() else ""
        require((code, again) == (0, 0), f"{case.kind} of {case.run} after kills: {code}, {again}\n{text}")
        require_right(case, place, sources, f"{case.kind} of {case.run} after kills")
        shutil.rmtree(place)
    return killed


def races(dice: random.Random, folder: Path, count: int) -> Counter[str]:
    everything = cases(folder, ("zero", "safetensors"))
    seen: Counter[str] = Counter()
    for number in range(count):
        case = dice.choice(everything)
        place = folder / f"race{number}"
        sources = digests(case.run)
        started = []
        for _ in range(dice.randint(2, 5)):
            started.append(start(command(case.kind, case.run, place / "out")))
            time.sleep(dice.uniform(0, 0.3))
        for process in started:
            output = process.communicate(timeout=PATIENCE_S)[0].decode()
            words = ("is writing", "exists", "has just", "already made", "merged")
            require(process.returncode in (0, 2), f"a race ended with {process.returncode}:\n{output}")
            require(process.returncode == 0 or any(word in output for word in words), f"a race: {output}")
            seen["made, or found made" if process.returncode == 0 else "refused"] += 1
        require_right(case, place, sources, f"{case.kind} of {case.run}, {len(started)} at once")
        shutil.rmtree(place)
    return seen


LIMITS = {
    "open files": (resource.RLIMIT_NOFILE, (12, 128)),
    "file size": (resource.RLIMIT_FSIZE, (0, 200_000)),
    "address space": (resource.RLIMIT_AS, (50 << 20, 1200 << 20)),
}


def limits(dice: random.Random, folder: Path, count: int) -> Counter[str]:
    everything = cases(folder, tuple(kind for kind in KINDS if kind not in ("ranks", "watch")))
    seen: Counter[str] = Counter()
    for number in range(count):
        case, (name, (which, span)) = dice.choice(everything), dice.choice(list(LIMITS.items()))
        value = dice.randint(*span)
        place = folder / f"limit{number}"
        place.mkdir()
        sources = digests(case.run)

        def limit(which: int = which, value: int = value) -> None:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(which, (value, value))

        words = f"{case.kind} of {case.run} with {name} {value}"
        code, output = done(command(case.kind, case.run, place / "out"), limit)
        if code == 0:
            require_right(case, place, sources, words)
            seen[f"{name}: merged"] += 1
        else:
            require(not (place / "out").exists() or case.kind == "several", f"{words}: an output and exit {code}")
            require(digests(case.run) == sources, f"{words}: the sources changed")
            seen[f"{name}: refused"] += 1
            code, output = done(command(case.kind, case.run, place / "out"))
            require(code == 0, f"{words}, then again without: {code}\n{output}")
            require_right(case, place, sources, f"{words}, then without")
        shutil.rmtree(place)
    return seen


def paths(dice: random.Random, folder: Path, count: int) -> Counter[str]:
    everything = cases(folder, ("zero", "safetensors", "watch"))
    seen: Counter[str] = Counter()
    for number in range(count):
        case = dice.choice(everything)
        place = folder / f"path{number}"
        place.mkdir()
        name = dice.choice(ODD_NAMES)
        run = place / dice.choice((name, f"{dice.choice(ODD_NAMES)[:100]}")) / "run"
        is_made = True
        try:
            shutil.copytree(case.run, run)
        except OSError:
            is_made = False
        out = place / "outs" / (name + dice.choice(("", "/", "//", "/.")))
        words = f"{case.kind} of {str(run)!r} to {str(out)!r}"
        code, output = done(command(case.kind, run, out)) if is_made else (2, "error:")
        require("Traceback" not in output, f"{words}:\n{output}")
        if code == 0:
            require(digests(out) == case.right, f"{words}: wrong bytes")
            found = [path.name for path in out.parent.iterdir()]
            require(found == [out.name], f"{words}: {found} are there")
        else:
            require(not out.exists(), f"{words}: an output and exit {code}\n{output}")
            require(name == LONG_NAME or not is_made, f"{words} is refused: {output}")
        seen["made" if code == 0 else "refused"] += 1
        shutil.rmtree(place)
    return seen


LOOPS = {"kills": kills, "races": races, "limits": limits, "paths": paths}


def run_loop(name: str, seed: int, count: int) -> Counter[str]:
    """Runs one loop. Raises SystemExit at the first round that did not end as promised; its folder then stays."""
    folder = Path(tempfile.mkdtemp(prefix=f"wsm-{name}-"))
    seen = LOOPS[name](random.Random(seed), folder, count)
    shutil.rmtree(folder)
    return seen


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("loop", choices=LOOPS)
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    began_s = time.monotonic()
    seen = run_loop(options.loop, options.seed, options.count)
    print(f"{options.loop}: seed {options.seed}, {time.monotonic() - began_s:.0f} s, as promised: {dict(seen)}")


if __name__ == "__main__":
    main()

"""What the metadata of large runs cost: time and memory of a plan, and its calls on the file system.

    python -m benchmarks.plan --folder /tmp/plan
    python -m benchmarks.plan --folder /tmp/plan --only zero3 reshard --scale 8

Each row runs commands on a run of `many_ranks`, which is made first and kept. The columns are processor seconds of the
command (user and system), the processor seconds in which one thread reads the same metadata once (the limit), peak
memory, and calls on the run's files, counted by `latency.c`. `must` is what the row has to keep; a row that does not is
marked.

With --scale N, runs have an Nth of the ranks. What the command used beyond its start is then multiplied by N. This is
too much where a part of it does not grow with the ranks. With --latency-ms, each counted call waits.
"""

import argparse
import json
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path

from benchmarks.counted import Started, Usage, counted
from benchmarks.plan_law import GRID, fitted
from benchmarks.plan_material import Run, reading_s, tags

GIB, MIB = 1 << 30, 1 << 20
MOE = Run("moe", 512, 16, layers=64, hidden=16, experts=128, ep=8)
WATCH_TIMEOUT_S = 600
LAW_ROUNDS = 3
"""Plans of each run that the law is fitted to; the fastest counts."""


@dataclass(frozen=True)
class Line:
    """A line of the table.

    Attributes:
        what: the command in words.
        usage: what it used, at full size.
        limit_s: the time to read the same metadata; None: not measured.
        must: by quantity, (the measured value, the largest that is allowed).
    """

    what: str
    usage: Usage
    limit_s: float | None
    must: Mapping[str, tuple[float, float]]


@dataclass(frozen=True)
class Bench:
    """Where and how rows are measured.

    Attributes:
        folder: of runs and outputs.
        forms: where DeepSpeed's runs of two ranks are kept.
        scale: a number by which ranks are divided.
        latency_ms: how long each counted call waits.
    """

    folder: Path
    forms: Path
    scale: int
    latency_ms: float

    @property
    def out(self) -> Path:
        """The folder of an output. Neither it nor what a killed command has staged beside it is there."""
        shutil.rmtree(self.folder / "outputs", ignore_errors=True)
        (self.folder / "outputs").mkdir()
        return self.folder / "outputs/out"

    @cached_property
    def start(self) -> Usage:
        """What a command uses that does nothing."""
        return counted([sys.executable, "-m", "wsm_ds", "merge", "--help"], "/none", folder=self.folder)

    def made(self, run: Run) -> Path:
        """Makes a run with the ranks divided; returns its folder.

        Args:
            run: at full size.
        """
        return replace(run, ranks=run.ranks // self.scale).make(self.folder, self.forms)

    def usage(self, *words: object, files: Path, delay_ms: float | None = None) -> Usage:
        """Runs wsm-ds; returns what it used, at full size.

        Args:
            *words: command and arguments.
            files: the run whose files' calls are counted.
            delay_ms: how long each call waits; None: as the user says.
        """
        command = [sys.executable, "-m", "wsm_ds", *map(str, words)]
        delay_ms = self.latency_ms if delay_ms is None else delay_ms
        used = counted(command, f"{files}/*", folder=self.folder, delay_ms=delay_ms)
        return used.enlarged(self.scale, self.start)

    def planned(self, run: Run, what: str, words: list[object], *, cpu_s: float, peak_bytes: float) -> Line:
        """Measures a command that reads the metadata of a run.

        Args:
            run: at full size.
            what: the command in words.
            words: its arguments; the run's folder comes after the first of them.
            cpu_s: processor seconds that it may use.
            peak_bytes: memory that it may use.
        """
        made = self.made(run)
        used = self.usage(words[0], made, *words[1:], files=made)
        limit_s = self.scale * reading_s(made, tags(run.checkpoints))
        must = {"CPU s": (used.cpu_s, cpu_s), "peak MiB": (used.peak_bytes / MIB, peak_bytes / MIB)}
        return Line(what, used, limit_s, must)


def dry_runs(bench: Bench, run: Run, title: str, *, cpu_s: float, peak_bytes: float = GIB) -> Iterator[Line]:
    """Plans of a merge of all checkpoints, as a native output and as safetensors.

    Args:
        bench: where.
        run: at full size.
        title: the run in words.
        cpu_s: processor seconds that each may use.
        peak_bytes: memory that each may use.
    """
    for output in ("zero", "safetensors"):
        words = ["merge", "--last", run.checkpoints, "--format", output, "--out", bench.out, "--dry-run"]
        what = f"{title}, {run.ranks} ranks x {run.checkpoints}: plan of a merge to {output}"
        yield bench.planned(run, what, words, cpu_s=cpu_s, peak_bytes=peak_bytes)


def tours(bench: Bench, run: Run, title: str, *, cpu_s: float) -> Iterator[Line]:
    """`inspect` and `prune` of all checkpoints.

    Args:
        bench: where.
        run: at full size.
        title: the run in words.
        cpu_s: processor seconds that each may use.
    """
    commands: list[list[object]] = [["inspect"], ["prune", "--keep-window", 16]]
    for words in commands:
        what = f"{title}, {run.ranks} ranks x {run.checkpoints}: {words[0]}"
        yield bench.planned(run, what, words, cpu_s=cpu_s, peak_bytes=GIB / 2)


def data_phase(bench: Bench) -> Iterator[Line]:
    """A merge of stage 3 to safetensors: opens of rank files beyond those of the plan."""
    run = Run("zero3", 1024, 16)
    made = bench.made(run)
    words = ["merge", made, "--last", run.checkpoints, "--format", "safetensors", "--out"]
    plan = bench.usage(*words, bench.out, "--dry-run", files=made)
    whole = bench.usage(*words, bench.out, files=made)
    what = f"ZeRO-3, {run.ranks} ranks x {run.checkpoints}: merge to safetensors, beyond its plan"
    yield Line(what, whole.without(plan), None, {"opens": (whole.opens - plan.opens, 65_000)})


def model_file(bench: Bench) -> Iterator[Line]:
    """The reads of one model file of stage 3: of rank 0, in the newest checkpoint."""
    made = Run("zero3", 8, 2).make(bench.folder, bench.forms)
    file = made / tags(2)[-1] / "zero_pp_rank_0_mp_rank_00_model_states.pt"
    command = [sys.executable, "-m", "wsm_ds", "merge", str(made), "--last", "2", "--out", str(bench.out), "--dry-run"]
    used = counted(command, str(file), folder=bench.folder)
    yield Line("a stage-3 model file of 723 tensors: plan of a merge", used, None, {"reads": (used.reads, 4)})


def watch(bench: Bench) -> Iterator[Line]:
    """A watch of a window of 16, which sees a new checkpoint: what it reads again of the metadata of older ones."""
    made = Run("zero3", 8, 17, layers=2).make(bench.folder / "watch", bench.forms)
    hidden, newest, latest = made / ".newest", made / tags(17)[-1], made / "latest"
    # Of a model file of rank 1, an older checkpoint gives nothing but metadata. Steps 200 to 900 are in both windows.
    files = f"{made}/global_step[2-9]00/zero_pp_rank_1_mp_rank_00_model_states.pt"
    command = [sys.executable, "-m", "wsm_ds", "watch", str(made), "--last", "16", "--since", "1600", "--poll-s", "1"]
    newest.rename(hidden)
    latest.write_text(tags(16)[-1])
    try:
        alone = counted([*command, "--until-step", "1600", "--out", str(bench.out)], files, folder=bench.folder)
        out = bench.out
        command += ["--until-step", "1700", "--out", str(out)]
        with Started(command, files, folder=bench.folder) as started:
            deadline = time.monotonic() + WATCH_TIMEOUT_S
            while not any(out.glob("step1600/*/wsm_merge.json")):
                if started.process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError("the watch did not merge the first window")
                time.sleep(0.2)
            hidden.rename(newest)
            latest.write_text(newest.name)
            both = started.usage()
    finally:
        if hidden.exists():
            hidden.rename(newest)
    used = both.without(alone)
    what = "a watch of a window of 16 sees a new checkpoint: metadata of the older ones"
    yield Line(what, used, None, {"reads": (used.reads, 0)})


def reshard(bench: Bench) -> Iterator[Line]:
    """A checkpoint of 512 ranks for 384: the plan, and the whole."""
    run = Run("zero3", 512, 1)
    words = ["reshard", "--tag", tags(1)[0], "--world-size", 384 // bench.scale, "--out"]
    title = f"ZeRO-3, {run.ranks} ranks to 384"
    plan = [*words, bench.out, "--dry-run"]
    yield bench.planned(run, f"{title}: plan of a reshard", plan, cpu_s=15, peak_bytes=GIB / 2)
    made = bench.made(run)
    used = bench.usage(words[0], made, *words[1:], bench.out, files=made)
    yield Line(f"{title}: the whole reshard", used, None, {"peak MiB": (used.peak_bytes / MIB, 512)})


def latency(bench: Bench) -> Iterator[Line]:
    """A plan and a merge of 8 threads while each call waits, and without that."""
    run, delay_ms = Run("zero3", 256, 16), bench.latency_ms or 5
    made = bench.made(run)
    title = f"ZeRO-3, {run.ranks} ranks x {run.checkpoints}, {delay_ms:g} ms a call"
    for output in ("zero", "safetensors"):
        words = ["merge", made, "--last", run.checkpoints, "--format", output, "--threads", 8, "--out"]
        plan = bench.usage(*words, bench.out, "--dry-run", files=made, delay_ms=delay_ms)
        yield Line(f"{title}: plan of a merge to {output}", plan, None, {"wall s": (plan.wall_s, 40)})
        alone = bench.usage(*words, bench.out, files=made, delay_ms=0)
        slow = bench.usage(*words, bench.out, files=made, delay_ms=delay_ms)
        must = {"times the wall time without waiting": (slow.wall_s / alone.wall_s, 2)}
        yield Line(f"{title}: merge to {output}", slow, None, must)


def law(bench: Bench) -> Iterator[Line]:
    """Prints the law of a plan for stages 3 and 2, and what it says of 1024 ranks."""
    for kind in ("zero3", "zero2"):
        measured = []
        for run in (replace(run, kind=kind, hidden=16) for run in GRID):
            made = replace(run, checkpoints=4).make(bench.folder, bench.forms)
            words = ["merge", str(made), "--tags", ",".join(tags(run.checkpoints)), "--out", str(bench.out)]
            command = [sys.executable, "-m", "wsm_ds", *words, "--dry-run"]
            rounds = (counted(command, f"{made}/*", folder=bench.folder).cpu_s for _ in range(LAW_ROUNDS))
            measured.append((run, min(rounds)))
        found = fitted(measured)
        print(f"{kind}, plan of a merge: {found}; 1024 ranks x 16, 723 tensors: {found.of(16, 1024, 723):.0f} s")
        print(json.dumps({"law": kind, "seconds": found.seconds, "error": found.largest_error}), flush=True)
    yield from ()


ROWS: dict[str, Callable[[Bench], Iterator[Line]]] = {
    "zero3": lambda bench: dry_runs(bench, Run("zero3", 1024, 16), "ZeRO-3", cpu_s=60),
    "zero2": lambda bench: dry_runs(bench, Run("zero2", 1024, 16, hidden=16), "ZeRO-2", cpu_s=10),
    "moe": lambda bench: dry_runs(bench, MOE, "MoE, 8192 expert files", cpu_s=60),
    "tours3": lambda bench: tours(bench, Run("zero3", 512, 200), "ZeRO-3", cpu_s=120),
    "tours2": lambda bench: tours(bench, Run("zero2", 512, 200, hidden=16), "ZeRO-2", cpu_s=20),
    "opens": data_phase,
    "reads": model_file,
    "watch": watch,
    "reshard": reshard,
    "latency": latency,
    "law": law,
}


def row_of(line: Line) -> str:
    """Returns a line of the table, in Markdown.

    Args:
        line: what was measured.
    """
    used = line.usage
    must = "; ".join(
        f"{name} {value:.4g} of {most:.4g}{'' if value <= most else ' **missed**'}"
        for name, (value, most) in line.must.items()
    )
    limit = "" if line.limit_s is None else f"{line.limit_s:.2f}"
    counts = (used.peak_bytes / MIB, used.opens, used.reads, used.stats, used.read_bytes / 1e6, used.open_at_once)
    figures = (f"{used.cpu_s:.1f}", limit, *(f"{count:.0f}" for count in counts), f"{used.wall_s:.1f}")
    return f"| {line.what} | {' | '.join(figures)} | {must} |"


def main() -> None:
    """Measures the chosen rows, one after the other; prints the table and lines of JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--folder", type=Path, required=True, help="of runs and outputs; all rows need 10 GB")
    parser.add_argument(
        "--forms", type=Path, help="where DeepSpeed's runs of two ranks are kept (default: FOLDER/forms)"
    )
    parser.add_argument("--only", nargs="+", choices=ROWS, default=list(ROWS), metavar="ROW", help=", ".join(ROWS))
    parser.add_argument("--scale", type=int, default=1, help="divide ranks by this number (default 1)")
    parser.add_argument("--latency-ms", type=float, default=0, help="how long each counted call waits (default 0)")
    options = parser.parse_args()
    folder = options.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    bench = Bench(folder, (options.forms or folder / "forms").resolve(), options.scale, options.latency_ms)
    if options.scale > 1:
        print(f"Ranks are divided by {options.scale}. What grows with them is multiplied by {options.scale}.")
    print("| | CPU s | reading only, s | peak MiB | opens | reads | stats | MB read | open at once | wall s | must |")
    print("|---|---|---|---|---|---|---|---|---|---|---|", flush=True)
    lines = []
    for name in options.only:
        for line in ROWS[name](bench):
            lines.append(line)
            print(row_of(line), flush=True)
    print(json.dumps({"scale": options.scale, "latency_ms": options.latency_ms, "lines": [asdict(x) for x in lines]}))
    shutil.rmtree(folder / "outputs", ignore_errors=True)


if __name__ == "__main__":
    main()

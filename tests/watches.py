"""Watches of a played run: in this process, or in a process of their own."""

import json
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

from played_run import PlayedRun

from wsm_ds.watching import EndPoints, Event, WatchOptions, WatchSpec, make_spec, watch

POLL_S = 0.2
PATIENCE_S = 60.0


def spec_for(run: PlayedRun, out: Path, ends: EndPoints | None = None, **values: Any) -> WatchSpec:
    return make_spec({"curve": "linear", "run": run.folder, "out": out} | values, ends or EndPoints())


def once(spec: WatchSpec, **options: Any) -> list[Event]:
    return list(watch(spec, WatchOptions(poll_s=0.05, is_once=True, **options)))


def named(name: str, events: list[Event]) -> list[Event]:
    return [event for event in events if event.name == name]


class Watching:
    """A watch in a process of its own, and the events that it prints."""

    def __init__(self, *arguments: object, code: str = "") -> None:
        program = f"import sys\n{code}\nfrom wsm_ds.cli import main\nsys.exit(main(sys.argv[1:]))"
        self.process = subprocess.Popen(
            [sys.executable, "-c", program, "watch", *map(str, arguments), "--json", "--poll-s", str(POLL_S)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None
        assert self.process.stderr is not None
        self.out, self.err = self.process.stdout, self.process.stderr
        self.patience = threading.Timer(PATIENCE_S, self.process.kill)  # then whatever is read from it ends, too
        self.patience.start()
        self.events: list[dict[str, Any]] = []

    def until(self, name: str, **values: Any) -> dict[str, Any]:
        """Waits for an event; those before it are in `events`."""
        for line in self.out:
            self.events.append(json.loads(line))
            if self.events[-1]["event"] == name and values.items() <= self.events[-1].items():
                return self.events[-1]
        raise AssertionError(
            f"no {name} {values} in {self.events}: {self.process.stderr and self.process.stderr.read()}"
        )

    def end(self) -> tuple[int, str]:
        """Waits for its end; exit code and what it said."""
        self.events += [json.loads(line) for line in self.out]
        errors = self.err.read()
        return self.process.wait(), errors

"""Makes random pickles of a checkpoint's opcodes and names, and reads, carries and writes them anew.

    PYTHONPATH=. python tests/attacks/hostile_pickles.py RUN --count 500 --seed 1

RUN holds global_step2, made by DeepSpeed. Each round puts a random object into the client state of its model file and
lets a command read it: inspect, a merge that carries the file, one that drops the optimizer's states, one to another
number of ranks. A round ends in one of these ways:

    refused     exit code 2 or 3, one line on stderr, nothing left
    accepted    exit code 0, and torch's `weights_only=False` would call only names that `known_globals` lists
    CALLS       an output names another global
    TRACEBACK   another exit code, or an exception

The exit code is 1 if a word is in capitals.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import io
import pickletools
import random
import shutil
import sys
import tempfile
import zipfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent.parent))

from wsm_ds.cli import main as wsm_ds
from wsm_ds.torchfile.known_globals import KNOWN

TAG = "global_step2"
MODEL = "mp_rank_00_model_states.pt"
READ = frozenset({"collections.OrderedDict", "torch.Size", "torch._tensor._rebuild_from_type_v2"})
"""Names that `unpickle` gives a meaning, beside torch._utils'."""
COMMANDS = (
    ("inspect",),
    ("merge", "--last", "1"),
    ("merge", "--last", "1", "--optimizer-states", "drop"),
    ("merge", "--last", "1", "--world-size", "3"),
)
BAD = ("CALLS", "TRACEBACK")
UNKNOWN = ("os system", "builtins exec", "numpy.testing._private.utils runstring", "torch.storage _load_from_bytes")


class RandomPickle:
    """Opcodes of one object, which may hold itself, shadow methods, or be nested deeply."""

    def __init__(self, chance: random.Random) -> None:
        self.chance = chance
        self.memo = 50_000  # beyond the memo of any checkpoint of the tests

    def value(self, depth: int = 0) -> bytes:
        """A random object."""
        makers = [self._text, self._number, self._singleton, self._name]
        if depth < 5:
            makers += [self._tuple, self._list, self._dict, self._ordered, self._call, self._made, self._recursive]
        if depth == 0:
            makers += [self._deep]
        return self.chance.choice(makers)(depth)

    def _text(self, depth: int) -> bytes:
        words = ("x", "keys", "items", "get", "__setstate__", "__class__", "module", "state", "", "\udcff", "a" * 5000)
        encoded = self.chance.choice(words).encode("utf-8", "surrogatepass")
        return b"X" + len(encoded).to_bytes(4, "little") + encoded

    def _number(self, depth: int) -> bytes:
        return self.chance.choice(
            [b"K\x01", b"J\xff\xff\xff\xff", b"G\x7f\xf8" + bytes(6), b"\x8a\xff" + b"\x7f" * 255]
        )

    def _singleton(self, depth: int) -> bytes:
        return self.chance.choice([b"N", b"\x88", b"\x89", b")", b"]", b"}"])

    def _name(self, depth: int) -> bytes:
        known = self.chance.choice(sorted(KNOWN - {name for name in KNOWN if "ZoneInfo._" in name})).rpartition(".")
        chosen = f"{known[0]} {known[2]}" if self.chance.random() < 0.9 else self.chance.choice(UNKNOWN)
        return b"c" + chosen.replace(" ", "\n").encode() + b"\n"

    def _tuple(self, depth: int) -> bytes:
        return b"(" + b"".join(self.value(depth + 1) for _ in range(self.chance.randrange(4))) + b"t"

    def _list(self, depth: int) -> bytes:
        return b"](" + b"".join(self.value(depth + 1) for _ in range(self.chance.randrange(4))) + b"e"

    def _entries(self, depth: int) -> bytes:
        count = self.chance.randrange(4)
        keys = [self._text, self._number, self._name, self._singleton]
        return b"(" + b"".join(self.chance.choice(keys)(depth) + self.value(depth + 1) for _ in range(count)) + b"u"

    def _dict(self, depth: int) -> bytes:
        return b"}" + self._entries(depth)

    def _ordered(self, depth: int) -> bytes:
        return b"ccollections\nOrderedDict\n)R" + self._entries(depth) + self._dict(depth) + b"b"

    def _call(self, depth: int) -> bytes:
        return self._name(depth) + self._tuple(depth) + b"R"

    def _made(self, depth: int) -> bytes:
        made = self._name(depth) + self._tuple(depth) + b"\x81"
        if self.chance.random() < 0.5:
            made += self._entries(depth)
        return made + (self.value(depth + 1) + b"b" if self.chance.random() < 0.7 else b"")

    def _recursive(self, depth: int) -> bytes:
        self.memo += 1
        number = self.memo.to_bytes(4, "little")
        return b"]r" + number + b"(j" + number + self.value(depth + 1) + b"e"

    def _deep(self, depth: int) -> bytes:
        levels = self.chance.choice([500, 5_000, 50_000])
        kind = self.chance.choice([(b"]", b"a"), (b"}K\x01", b"s"), (b"", b"\x85")])
        return kind[0] * levels + b"N" + kind[1] * levels


def with_client_state(path: Path, value: bytes) -> None:
    """Adds an entry to the outermost dict of a torch file's pickle. CRC-32s are right."""
    with zipfile.ZipFile(path) as archive:
        records = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in records.items():
            if name.endswith("/data.pkl"):
                data = data[:-1] + b"X\x06\x00\x00\x00client" + value + b"s."
            archive.writestr(zipfile.ZipInfo(name), data)


def globals_in(path: Path) -> set[str]:
    """Names that a torch file's pickle imports."""
    with zipfile.ZipFile(path) as archive:
        data = archive.read(next(name for name in archive.namelist() if name.endswith("/data.pkl")))
    return {str(argument).replace(" ", ".") for code, argument, _ in pickletools.genops(data) if code.name == "GLOBAL"}


def one_round(run: Path, out: Path, command: tuple[str, ...]) -> tuple[str, str]:
    """Runs a command; returns how it ended, and why."""
    stdout, stderr = io.StringIO(), io.StringIO()
    words = [
        command[0],
        str(run),
        *command[1:],
        *(["--out", str(out), "--allow", "warmup"] if len(command) > 1 else []),
    ]
    try:
        with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
            code = wsm_ds(words)
    except BaseException as error:
        return "TRACEBACK", f"{words}: {type(error).__name__}: {error}"
    if code in (2, 3):
        left = [path for path in out.parent.iterdir() if path not in (run, out)]
        return ("TRACEBACK", f"left {left}") if left or out.exists() else ("refused", stderr.getvalue()[-300:])
    if code:
        return "TRACEBACK", f"exit code {code}: {stderr.getvalue()[-300:]}"
    named = set().union(*(globals_in(path) for path in out.rglob("*.pt"))) if out.exists() else set[str]()
    foreign = {name for name in named - KNOWN - READ if not name.startswith("torch._utils._rebuild_")}
    shutil.rmtree(out, ignore_errors=True)
    return ("CALLS", str(foreign)) if foreign else ("accepted", "")


def attack(run: Path, count: int, seed: int) -> list[tuple[str, str]]:
    """Returns how each of `count` rounds ended, and why."""
    chance, ends = random.Random(seed), []
    with tempfile.TemporaryDirectory() as folder:
        copy, out = Path(folder) / "run", Path(folder) / "out"
        shutil.copytree(run / TAG, copy / TAG)
        whole = (copy / TAG / MODEL).read_bytes()
        for number in range(count):
            with_client_state(copy / TAG / MODEL, RandomPickle(chance).value())
            ends.append(one_round(copy, out, COMMANDS[number % len(COMMANDS)]))
            (copy / TAG / MODEL).write_bytes(whole)
    return ends


def main() -> int:
    """Runs the attack and prints what came of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    ends = attack(options.run, options.count, options.seed)
    for end, number in collections.Counter(end for end, _ in ends).items():
        print(f"{end:10} {number}")
    bad = [turn for turn in ends if turn[0] in BAD]
    for turn in bad[:30]:
        print(turn)
    print(f"seed {options.seed}: {len(ends)} rounds, {len(bad)} bad")
    return bool(bad)


if __name__ == "__main__":
    sys.exit(main())

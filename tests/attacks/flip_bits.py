"""Flips bits of a checkpoint's files, or cuts them, and merges: what is published loads, and is what the files say.

    PYTHONPATH=. python tests/attacks/flip_bits.py RUN --count 5000 --seed 1

RUN holds global_step2 and global_step4, from one run of DeepSpeed. Each round damages one file in one place, merges the
two into one output, and undoes the damage. A round ends in one of these ways:

    refused     one of wsm_ds's errors, and nothing is left
    same        the output is that of the undamaged files: a merge needs none of the damaged bytes
    harmless    torch loads the same from the output as from that of the undamaged files: the damage is in bytes that
                no reader looks at, such as the padding between records
    WRONG       torch loads something else
    BROKEN      torch cannot load the output, or wsm_ds cannot
    TRACEBACK   another error than wsm_ds's

It prints how many rounds ended in each way, and by which kind of place. The exit code is 1 if a word is in capitals.
"""

from __future__ import annotations

import argparse
import collections
import random
import shutil
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))
sys.path.insert(0, str(Path(__file__).parent.parent.parent))

from reference import same_tree

from wsm_ds.errors import WsmError
from wsm_ds.merging import merge
from wsm_ds.publishing.staging_folder import Staging
from wsm_ds.torchfile import open_torch_file
from wsm_ds.verification import verify

TAGS = ("global_step2", "global_step4")
PLACES = ("anywhere", "a tensor", "the pickle", "the directory", "around records", "cut")
BAD = ("WRONG", "BROKEN", "TRACEBACK")


@dataclass(frozen=True)
class Round:
    """What was damaged, and how it ended."""

    place: str
    damage: str
    end: str
    reason: str


def tensor_bytes(path: Path) -> range:
    """Offsets of the bytes of a file's largest record."""
    records = open_torch_file(path).archive.records
    largest = max((record for name, record in records.items() if name.startswith("data/")), key=lambda r: r.nbytes)
    return range(largest.offset, largest.offset + largest.nbytes)


def around_records(path: Path) -> list[int]:
    """Offsets of a torch file that hold no record's data: headers, descriptors."""
    archive = open_torch_file(path).archive
    covered = bytearray(archive.nbytes)
    for record in archive.records.values():
        covered[record.offset : record.offset + record.nbytes] = b"\1" * record.nbytes
    return [offset for offset, byte in enumerate(covered) if not byte]


def damaged(path: Path, whole: bytes, place: str, chance: random.Random) -> tuple[bytes, str]:
    """The bytes of a file with one bit flipped, or cut; and what was done."""
    if place == "cut":
        length = chance.randrange(len(whole))
        return whole[:length], f"cut to {length}"
    with zipfile.ZipFile(path) as archive:
        directory = archive.start_dir
    pickled = open_torch_file(path).archive.records["data.pkl"]
    offset = {
        "anywhere": lambda: chance.randrange(len(whole)),
        "a tensor": lambda: chance.choice(tensor_bytes(path)),
        "the pickle": lambda: pickled.offset + chance.randrange(pickled.nbytes),
        "the directory": lambda: chance.randrange(directory, len(whole)),
        "around records": lambda: chance.choice(around_records(path)),
    }[place]()
    changed, bit = bytearray(whole), chance.randrange(8)
    changed[offset] ^= 1 << bit
    return bytes(changed), f"byte {offset}, bit {bit}"


def contents(out: Path) -> dict[str, bytes]:
    """The bytes of an output's torch files."""
    return {path.name: path.read_bytes() for path in sorted(out.rglob("*.pt"))}


def loaded(out: Path) -> dict[str, Any]:
    """What torch loads from an output; raises if torch or wsm_ds cannot."""
    import torch

    trees = {}
    for path in sorted(out.rglob("*.pt")):
        open_torch_file(path)
        trees[path.name] = torch.load(path, weights_only=False)
    assert verify(out, full=True).note == ""
    return trees


@dataclass(frozen=True)
class Expected:
    """The output of the undamaged files: its bytes, and what torch loads."""

    files: dict[str, bytes]
    trees: dict[str, Any]


def one_round(run: Path, out: Path, expected: Expected, options: dict[str, Any]) -> tuple[str, str]:
    """Merges a damaged run; returns the end and its reason."""
    try:
        merge(run=run, tags=TAGS, curve="linear", out=out, allow=("warmup", "lr-change"), **options)
    except WsmError as error:
        left = [path for path in (out, Staging(out).folder) if path.exists()]
        return ("BROKEN", f"left {left}") if left else ("refused", f"{type(error).__name__}: {error}")
    except Exception as error:
        return "TRACEBACK", f"{type(error).__name__}: {error}"
    try:
        if contents(out) == expected.files:
            return "same", ""
        return ("harmless" if same_tree(loaded(out), expected.trees) else "WRONG"), ""
    except Exception as error:
        return "BROKEN", f"{type(error).__name__}: {error}"
    finally:
        shutil.rmtree(out)


def attack(run: Path, count: int, seed: int, options: dict[str, Any] | None = None) -> list[Round]:
    """Damages a copy of a run `count` times.

    Args:
        run: holds the checkpoints TAGS.
        count: number of rounds.
        seed: of the random choices.
        options: fields of the merges' recipe, beside run, tags, curve and out.
    """
    options, chance, rounds = options or {}, random.Random(seed), []
    with tempfile.TemporaryDirectory() as folder:
        copy, out = Path(folder) / "run", Path(folder) / "out"
        for tag in TAGS:
            shutil.copytree(run / tag, copy / tag)
        merge(run=copy, tags=TAGS, curve="linear", out=out, allow=("warmup", "lr-change"), **options)
        expected = Expected(contents(out), loaded(out))
        shutil.rmtree(out)
        files = sorted(copy.rglob("*.pt"))
        for number in range(count):
            path, place = chance.choice(files), PLACES[number % len(PLACES)]
            whole = path.read_bytes()
            data, damage = damaged(path, whole, place, chance)
            path.write_bytes(data)
            end, reason = one_round(copy, out, expected, options)
            path.write_bytes(whole)
            rounds.append(Round(place, f"{path.parent.name}/{path.name}: {damage}", end, reason))
    return rounds


def main() -> int:
    """Runs the attack and prints what came of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--count", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--drop", action="store_true", help="merge with --optimizer-states drop, which writes anew")
    options = parser.parse_args()
    recipe = {"optimizer_states": "drop"} if options.drop else {}
    rounds = attack(options.run, options.count, options.seed, recipe)
    ends = collections.Counter((turn.place, turn.end) for turn in rounds)
    for (place, end), number in sorted(ends.items()):
        print(f"{place:16} {end:10} {number}")
    bad = [turn for turn in rounds if turn.end in BAD]
    for turn in bad[:50]:
        print(turn)
    print(f"seed {options.seed}: {len(rounds)} rounds, {len(bad)} bad")
    return bool(bad)


if __name__ == "__main__":
    sys.exit(main())

# ruff: noqa: E501
"""Crafted and damaged torch files end in one of our errors, soon, and in little memory."""

from __future__ import annotations

import pickle
import random
import struct
import subprocess
import sys
import time
import tracemalloc
import zipfile
from pathlib import Path

import pytest
from lazy import torch

from wsm_ds.errors import BrokenCheckpoint, WsmError
from wsm_ds.torchfile import open_torch_file, unpickle

MOST_BYTES, MOST_S = 64 << 20, 10.0
LAUGHS = b")q\x01" + b"".join(b"h%ch%c\x86q%c" % (n, n, n + 1) for n in range(1, 60))
"""Leaves (((), ()), …) of 60 levels, 2^59 leaves, on the stack."""
STORAGE = b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpu%stQ"
PICKLES = {
    "a string of 2^60 bytes": b"\x80\x04\x8d" + struct.pack("<Q", 1 << 60) + b"x.",
    "a bytearray of 2^34 bytes": b"\x80\x05\x96" + struct.pack("<Q", 1 << 34) + b"x.",
    "an integer of 2^31 bytes": b"\x80\x02\x8b\xff\xff\xff\x7f1.",
    "no STOP": b"\x80\x02N",
    "an extension code": b"\x80\x02\x82\x01.",
    "a key of 2^59 leaves": b"\x80\x02}" + LAUGHS + b"Ns.",
    "a set of 2^59 leaves": b"\x80\x04\x8f(" + LAUGHS + b"\x90.",
    "a storage key of 2^59 leaves": b"\x80\x02X\x07\x00\x00\x00storagectorch\nFloatStorage\n" + LAUGHS + b"\x87Q.",
    "keys that all have one hash": b"\x80\x02}("
    + b"".join(b"\x8a\x0b" + (n * ((1 << 61) - 1)).to_bytes(11, "little") + b"N" for n in range(2, 20_000))
    + b"u.",
    "a list as a key": b"\x80\x02}]Ns.",
    "a state for a function of ours": b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\nN}X\x0c\x00\x00\x00__defaults__)s\x86b.",
    "a state for a class of ours": b"\x80\x02ctorch\nSize\nN}X\x07\x00\x00\x00__len__Ns\x86b.",
    "a name that would be two lines of a pickle": b"\x80\x04X\x0a\x00\x00\x00torch.a\nb.X\x01\x00\x00\x00x\x93.",
    "a negative shape": b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(" + STORAGE % b"K\x04" + b"K\x00J\xff\xff\xff\xff\x85K\x01\x85tR.",
    "a storage of 2^70 elements": b"\x80\x02" + STORAGE % (b"\x8a\x09" + (1 << 70).to_bytes(9, "little")) + b".",
    "a stride of another length": b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(" + STORAGE % b"K\x04" + b"K\x00K\x01\x85)tR.",
    "a shape of 2^120 elements": b"\x80\x02ctorch\nSize\n\x8a\x08" + bytes(7) + b"\x40\x8a\x08" + bytes(7) + b"\x40\x86\x85R.",
}  # fmt: skip

LIES = {
    "a memo index of 2^31": b"\x80\x02Nr\xff\xff\xff\x7f.",
    "a frame that is not there": b"\x80\x04\x95" + struct.pack("<Q", 1 << 62) + b"N.",
}
"""Opcodes that announce more than there is, and need nothing of it."""


def file_with(path: Path, data: bytes, **others: bytes) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in {"data.pkl": data, **others}.items():
            archive.writestr(f"archive/{name}", content)
    return path


@pytest.mark.parametrize("name", PICKLES)
def test_a_crafted_pickle_is_a_broken_checkpoint_at_once_and_in_little_memory(tmp_path: Path, name: str) -> None:
    path = file_with(tmp_path / "crafted.pt", PICKLES[name])
    before = (
        vars(unpickle._rebuild_tensor_v2).copy(),
        unpickle._rebuild_tensor_v2.__defaults__,
        vars(unpickle.TorchSize).keys(),
    )
    tracemalloc.start()
    begun = time.monotonic()
    try:
        with pytest.raises(BrokenCheckpoint, match=r"crafted\.pt") as raised:
            open_torch_file(path)
        assert tracemalloc.get_traced_memory()[1] < MOST_BYTES
    finally:
        tracemalloc.stop()
    assert time.monotonic() - begun < MOST_S
    assert len(str(raised.value)) < 1000
    assert before == (
        vars(unpickle._rebuild_tensor_v2),
        unpickle._rebuild_tensor_v2.__defaults__,
        vars(unpickle.TorchSize).keys(),
    )


@pytest.mark.parametrize("name", LIES)
def test_what_an_opcode_announces_is_not_allocated(tmp_path: Path, name: str) -> None:
    path = file_with(tmp_path / "lies.pt", LIES[name])
    tracemalloc.start()
    try:
        assert open_torch_file(path).tree is None
        assert tracemalloc.get_traced_memory()[1] < MOST_BYTES
    finally:
        tracemalloc.stop()


LARGE = {
    "marks": (b"(", 29_000_000),
    "sets": (b"\x8f", 20_000_000),
    "references": (b"\x94", 20_000_000),
    "numbers": (b"M\x00\x10", 20_000_000),
}
"""Opcodes that take far more memory than bytes, after one that puts None on the stack."""


@pytest.mark.parametrize("name", LARGE)
def test_a_pickle_that_would_fill_the_memory_is_refused(tmp_path: Path, name: str) -> None:
    opcode, count = LARGE[name]
    path = file_with(tmp_path / "large.pt", b"\x80\x04N" + opcode * count + b".")
    code = (
        "import resource, sys; from pathlib import Path; from wsm_ds.torchfile import open_torch_file\n"
        f"try: open_torch_file(Path({str(path)!r}))\n"
        "except Exception as error: print(type(error).__name__, str(error).count('save client state'))\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10)"
    )
    command = [sys.executable, "-c", code]
    said, peak_mib = subprocess.run(
        command, capture_output=True, text=True, check=True, timeout=300
    ).stdout.splitlines()
    assert said == "UnsupportedLayout 1"
    assert int(peak_mib) < 1200


def test_a_million_nested_lists_are_read_and_freed(tmp_path: Path) -> None:
    path = file_with(tmp_path / "deep.pt", b"\x80\x02" + b"]" * 1_000_000 + b"a" * 999_999 + b".")
    code = (
        f"from pathlib import Path; from wsm_ds.torchfile import open_torch_file; open_torch_file(Path({str(path)!r}))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0


def test_every_damage_to_a_real_file_is_read_or_is_one_of_our_errors(tmp_path: Path) -> None:
    path, damaged = tmp_path / "t.pt", tmp_path / "damaged.pt"
    torch.save({"x": torch.arange(6.0).view(2, 3), "y": {"z": [1, "a", None]}}, path)
    data, chance, refused = path.read_bytes(), random.Random(0), 0
    cuts = [data[:length] for length in range(0, len(data), 11)]
    flips = [bytearray(data) for _ in range(400)]
    for flipped in flips:
        for _ in range(chance.randint(1, 4)):
            flipped[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    for changed in [*cuts, *flips]:
        damaged.write_bytes(bytes(changed))
        try:
            file = open_torch_file(damaged)
        except WsmError:
            refused += 1
        else:
            assert file.archive.records
    assert refused > len(cuts)


@pytest.mark.parametrize("kind", ["duplicate", "compressed", "overlapping", "a folder"])
def test_zips_that_torch_does_not_write_are_refused(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "odd.pt"
    if kind == "a folder":
        path.mkdir()
    else:
        with zipfile.ZipFile(
            path, "w", zipfile.ZIP_DEFLATED if kind == "compressed" else zipfile.ZIP_STORED
        ) as archive:
            archive.writestr("archive/data.pkl", pickle.dumps({}, 2))
            archive.writestr("other/data.pkl" if kind == "duplicate" else "archive/version", b"3" * 50)
    if kind == "overlapping":
        data = bytearray(path.read_bytes())
        second = data.index(b"PK\x01\x02", data.index(b"PK\x01\x02") + 1)
        data[second + 42 : second + 46] = bytes(4)  # where the second record's header lies: at the first's
        path.write_bytes(data)
    with pytest.raises(WsmError, match=r"odd\.pt"):
        open_torch_file(path)


RECORDS = {
    "a TorchScript program": ({"constants.pkl": b"x"}, "TorchScript"),
    "the other byte order": ({"byteorder": b"big"}, "byte order"),
    "a version of the future": ({"version": b"77"}, "version"),
    "no number for a version": ({"version": b"3x"}, "version"),
    "an alignment of nothing": ({".storage_alignment": b"0"}, "storage_alignment"),
    "a very long version": ({"version": b"3" * 10_000}, "bytes"),
}


@pytest.mark.parametrize("name", RECORDS)
def test_records_with_which_torch_would_not_load_the_file_are_refused(tmp_path: Path, name: str) -> None:
    records, said = RECORDS[name]
    with pytest.raises(WsmError, match=rf"marks\.pt.*{said}"):
        open_torch_file(file_with(tmp_path / "marks.pt", b"\x80\x02N.", **records))


DAMAGES = {
    "bytes in front": lambda data: b"#!" + data,
    "bytes behind": lambda data: data + b"\0",
    "a comment": lambda data: data[:-2] + b"\x02\0hi",
    "a second end": lambda data: data + data[-22:],
    "another name in the directory": lambda data: data[::-1].replace(b"lkp.atad", b"lkq.atad", 1)[::-1],
    "another letter in the pickle": lambda data: data.replace(b"weights", b"weighty", 1),
    "another version, with the old CRC-32": lambda data: data.replace(b"little", b"lottle", 1),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_file_that_two_readers_could_read_differently_is_refused(tmp_path: Path, name: str) -> None:
    path = tmp_path / "two.pt"
    torch.save({"weights": torch.ones(3)}, path)
    whole = path.read_bytes()
    path.write_bytes(DAMAGES[name](whole))
    assert path.read_bytes() != whole
    with pytest.raises(WsmError, match=r"two\.pt"):
        open_torch_file(path)


def test_a_directory_larger_than_any_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "sparse.pt"
    end = struct.pack("<4s4H2IH", b"PK\x05\x06", 0, 0, 1, 1, (3 << 30) - 22, 0, 0)
    with path.open("wb") as file:
        file.truncate(3 << 30)
        file.seek(-22, 2)
        file.write(end)
    tracemalloc.start()
    try:
        with pytest.raises(BrokenCheckpoint, match=r"its directory has 3"):
            open_torch_file(path)
        assert tracemalloc.get_traced_memory()[1] < MOST_BYTES
    finally:
        tracemalloc.stop()

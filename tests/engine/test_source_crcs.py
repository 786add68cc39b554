"""A record that a merge reads whole has the CRC-32 that torch stored, or the merge is refused."""

from __future__ import annotations

import ctypes
import shutil
from pathlib import Path
from typing import Any

import pytest
from lazy import torch

from wsm_ds.engine import crc32, source_crcs
from wsm_ds.engine.arithmetic import kernel
from wsm_ds.engine.source_crcs import CrcRuns, SourceCrcs
from wsm_ds.errors import BrokenCheckpoint
from wsm_ds.merging import merge
from wsm_ds.planning.plan import InputFile
from wsm_ds.torchfile import Record, open_torch_file
from wsm_ds.verification import verify

TAGS = ("global_step2", "global_step4")
FORMS: dict[str, dict[str, Any]] = {
    "carry": {},
    "merged states": {"optimizer_states": "merge"},
    "safetensors": {"format": "safetensors"},
    "3 ranks": {"world_size": 3},
    "small slices": {"memory_budget": "8MB"},
}


def masters_of(path: Path) -> Record:
    """The largest record of a rank's optimizer file that holds masters."""
    file = open_torch_file(path)
    state = file.tree["optimizer_state_dict"]
    (key,) = state.keys() & {"single_partition_of_fp32_groups", "fp32_flat_groups"}
    return max((file.record(tensor) for tensor in state[key]), key=lambda record: record.nbytes)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("run", ["w2_s2_bf16", "w2_s3_bf16"])
def test_one_bit_of_a_master_is_noticed_in_every_form(runs: Path, tmp_path: Path, run: str, form: str) -> None:
    if not crc32.is_fast():
        pytest.skip("the processor has no carry-less multiplication, or the kernel was not built")
    for tag in TAGS:
        shutil.copytree(runs / run / tag, tmp_path / "run" / tag)
    values: dict[str, Any] = {
        "run": tmp_path / "run",
        "last": 2,
        "curve": "linear",
        "allow": ("warmup", "lr-change"),
        **FORMS[form],
    }
    merge(**values, out=tmp_path / "whole")
    assert verify(tmp_path / "whole", full=True).note == ""
    for tag, rank in ((TAGS[0], 0), (TAGS[1], 1)):  # rank 1's last partition ends in padding, which nobody needs
        victim = next((tmp_path / "run" / tag).glob(f"*pp_rank_{rank}_*optim_states.pt"))
        whole, record = victim.read_bytes(), masters_of(victim)
        damaged = bytearray(whole)
        damaged[record.offset + 5] ^= 1
        victim.write_bytes(damaged)
        with pytest.raises(BrokenCheckpoint, match=rf"{victim.name}: record {record.name} is damaged: its CRC-32"):
            merge(**values, out=tmp_path / "out")
        assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "whole"]
        victim.write_bytes(whole)


def test_files_without_crc_32s_are_merged(runs: Path, tmp_path: Path) -> None:
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        for tag in TAGS:
            (tmp_path / "run" / tag).mkdir(parents=True)
            for path in (runs / "w2_s2_bf16" / tag).glob("*.pt"):
                torch.save(torch.load(path, weights_only=False), tmp_path / "run" / tag / path.name)
    finally:
        torch.serialization.set_crc32_options(before)
    records = open_torch_file(next((tmp_path / "run").rglob("*.pt"))).archive.records
    assert {record.crc for record in records.values()} == {0}
    merge(run=tmp_path / "run", last=2, curve="linear", out=tmp_path / "out", allow=("warmup", "lr-change"))
    merge(run=runs / "w2_s2_bf16", tags=TAGS, curve="linear", out=tmp_path / "same", allow=("warmup", "lr-change"))
    for path in (tmp_path / "same").rglob("*optim_states.pt"):
        other = tmp_path / "out" / path.relative_to(tmp_path / "same")
        masters = [torch.load(file, weights_only=False)["optimizer_state_dict"] for file in (path, other)]
        for left, right in zip(*(state["single_partition_of_fp32_groups"] for state in masters), strict=True):
            assert torch.equal(left, right)


def input_of(data: bytes, begin: int) -> InputFile:
    """An input with one record, which holds `data`, at `begin`."""
    record = Record("data/0", begin, len(data), crc32.crc_of(memoryview(data)), ())
    return InputFile(Path("file.pt"), begin + len(data), 0, 0, {"data/0": record})


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (3, 1, 0, 2), (0, 0, 1, 2, 3)])
def test_parts_in_any_order_are_joined(order: tuple[int, ...]) -> None:
    data, begin = bytes(range(256)) * 4, 100
    crcs = SourceCrcs([input_of(data, begin)])
    for number in order:
        runs = CrcRuns(crcs)
        runs.add(0, 0, begin + 256 * number, memoryview(data[256 * number : 256 * (number + 1)]))
        runs.end_all()
    assert crcs.checked_bytes == len(data)


def test_what_lies_around_a_record_does_not_count() -> None:
    data, begin = bytes(range(200)), 64
    crcs = SourceCrcs([input_of(data, begin)])
    runs = CrcRuns(crcs)
    runs.add(0, 0, 0, memoryview(bytes(64) + data + bytes(30)))
    assert crcs.checked_bytes == len(data)


def test_the_rest_of_a_record_is_read_if_it_is_small(monkeypatch: pytest.MonkeyPatch) -> None:
    data, begin = bytes(range(200)), 64
    reads: list[tuple[int, int]] = []

    def read(file: int, offset: int, into: memoryview) -> None:
        reads.append((offset, len(into)))
        into[:] = data[offset - begin :][: len(into)]

    crcs = SourceCrcs([input_of(data, begin)])
    runs = CrcRuns(crcs)
    runs.add(0, 0, begin + 10, memoryview(data[10:150]))
    runs.end_all()
    monkeypatch.setattr(source_crcs, "MOST_REST_BYTES", 59)
    crcs.check_rest(read)
    assert (reads, crcs.checked_bytes) == ([], 0)
    monkeypatch.setattr(source_crcs, "MOST_REST_BYTES", 60)
    crcs.check_rest(read)
    assert reads == [(begin, 10), (begin + 150, 50)]
    assert crcs.checked_bytes == len(data)


@pytest.mark.parametrize("bits", [512, 128, 0])
def test_the_kernel_has_zlibs_crc_32_for_every_length(bits: int) -> None:
    import random
    import zlib

    library = kernel()
    if library is None:
        pytest.skip("the kernel was not built")
    most = ctypes.c_int.in_dll(library, "wsm_crc_bits")
    before = most.value
    if bits > before:
        pytest.skip("the processor has no such instructions")
    try:
        most.value = bits
        chance = random.Random(bits)
        for nbytes in [*range(600), 4096, 100_003]:
            data, start = chance.randbytes(nbytes), chance.getrandbits(32)
            assert library.wsm_crc32(start, data, nbytes) == zlib.crc32(data, start), nbytes
            assert crc32.crc_of(memoryview(data), start) == zlib.crc32(data, start), nbytes
    finally:
        most.value = before

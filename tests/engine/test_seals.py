"""Seals do not depend on how the bytes of a block were cut, and give the CRC-32s of a zip's entries."""

import os
import zlib

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from wsm_ds.engine import seals
from wsm_ds.engine.seals import BlockHasher, CrcFields, block_count, block_of, block_range, block_sizes, read_seal
from wsm_ds.filesystem import checksum
from wsm_ds.planning.plan import CrcField, OutputFile, OutputNumber

NBYTES = 100
FIELDS = (CrcField(5, 20, (60,)), CrcField(30, 0, (64,)), CrcField(25, 30, (68, 90)))
FILE = OutputFile(OutputNumber(0), "x.pt", NBYTES, (), FIELDS)


@pytest.fixture
def blocks_of_16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seals, "BLOCK_BYTES", 16)


@pytest.mark.usefixtures("blocks_of_16")
def test_blocks_tile_a_file() -> None:
    ranges = [block_range(FILE, block) for block in range(block_count(FILE))]
    assert ranges == [(0, 16), (16, 32), (32, 48), (48, 64), (64, 80), (80, 96), (96, 100)]
    assert block_sizes(FILE).tolist() == [end - begin for begin, end in ranges]
    assert [block_of(offset) for offset in (0, 15, 16, 99)] == [0, 0, 1, 6]
    assert block_sizes(OutputFile(OutputNumber(0), "empty", 0, (), ())).tolist() == []


@pytest.mark.usefixtures("blocks_of_16")
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(min_size=NBYTES, max_size=NBYTES), st.integers(0, 2**32 - 1))
def test_a_seal_is_the_same_for_any_cuts_and_gives_the_crcs_of_the_fields(data: bytes, seed: int) -> None:
    random = np.random.default_rng(seed)
    fields = CrcFields(FILE)
    file = os.memfd_create("staged")
    os.write(file, data)
    sealed = []
    for block in range(block_count(FILE)):
        _, end = block_range(FILE, block)
        block_hasher = BlockHasher(fields, block)
        while block_hasher.offset < end:
            cut = int(random.integers(block_hasher.offset + 1, end + 1))
            block_hasher.update(memoryview(data)[block_hasher.offset : cut])
        sealed.append(block_hasher.seal())
        assert sealed[-1] == read_seal(file, fields, block)
    os.close(file)
    assert fields.values(sealed) == {field: zlib.crc32(data[field.offset :][: field.nbytes]) for field in FIELDS[::2]}
    filled = bytearray(data)
    for field in FIELDS:
        for offset in field.crc_offsets:
            filled[offset : offset + 4] = b"\0\0\0\0"
    digests = [checksum.Hasher(bytes(filled[slice(*block_range(FILE, b))])).digest() for b in range(7)]
    assert [seal.digest for seal in sealed] == digests


@pytest.mark.usefixtures("blocks_of_16")
def test_a_staged_file_that_was_truncated_is_an_error() -> None:
    file = os.memfd_create("staged")
    os.write(file, bytes(40))
    with pytest.raises(OSError, match="ends at byte 40, before the end of a block at byte 48"):
        read_seal(file, CrcFields(FILE), 2)
    os.close(file)

"""Compares what a merge reads with the CRC-32s that torch stored: a damaged record must not be merged and sealed anew.

A CRC-32 is one of a whole record. So it can be compared only if this process reads all of the record, in any order and
by any of its threads; a record that is divided among processes, or that an earlier attempt has read in part, is not
checked. Beside what a merge needs, only the padding at the end of partitions is read for it.
"""

import threading
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from wsm_ds.engine import crc32
from wsm_ds.errors import BrokenCheckpoint
from wsm_ds.planning.plan import InputFile
from wsm_ds.torchfile import Record

MOST_REST_BYTES = 1 << 20
"""Bytes of a record that are read for the comparison alone: DeepSpeed pads partitions, and nobody needs the padding."""
Read = Callable[[int, int, memoryview], None]
"""Fills memory with the bytes of an input: its number, the offset, the memory."""


class Part(NamedTuple):
    """Bytes [begin, end) of an input, and their CRC-32."""

    begin: int
    end: int
    crc: int


class SourceCrcs:
    """The CRC-32s of what all threads of a process have read.

    Args:
        inputs: the plan's.

    Attributes:
        checked_bytes: bytes of the records whose CRC-32s are right.

    Memory: about 150 bytes for each run of bytes (some 4 MiB) of the records that are not whole yet.
    """

    def __init__(self, inputs: Sequence[InputFile]) -> None:
        self.inputs = inputs
        self.checked_bytes = 0
        self._records: dict[int, tuple[list[int], list[Record]]] = {}
        self._parts: dict[tuple[int, int], dict[int, Part]] = {}
        self._lock = threading.Lock()

    def within(self, file: int, begin: int, end: int) -> Iterator[tuple[int, int, Record]]:
        """The parts of a range of an input that lie in records: (begin, end, record), by rising offset.

        Records without a CRC-32 (`torch.serialization.set_crc32_options(False)`) are left out.
        """
        begins, records = self._records_of(file)
        index = max(0, bisect_right(begins, begin) - 1)
        while index < len(records) and begins[index] < end:
            record = records[index]
            low, high = max(begin, record.offset), min(end, record.offset + record.nbytes)
            if low < high:
                yield low, high, record
            index += 1

    def add(self, file: int, part: Part) -> None:
        """Notes the CRC-32 of bytes that lie in one record. With the last bytes of a record, compares its CRC-32.

        Raises:
            BrokenCheckpoint: the CRC-32 differs; the message names file and record.
        """
        for _, _, record in self.within(file, part.begin, part.end):
            with self._lock:
                parts = self._parts.setdefault((file, record.offset), {})
                parts[part.begin] = part
                if sum(end - begin for begin, end, _ in parts.values()) < record.nbytes:
                    return
                del self._parts[file, record.offset]
            self._compare(file, record, sorted(parts.values()))

    def check_rest(self, read: Read) -> None:
        """Reads what little is missing of records, and compares their CRC-32s. Called when all threads have ended.

        Raises:
            BrokenCheckpoint: the CRC-32 differs; the message names file and record.
        """
        for (file, begin), parts in list(self._parts.items()):
            record = next(record for _, _, record in self.within(file, begin, begin + 1))
            read_bytes = sum(part.end - part.begin for part in parts.values())
            if record.nbytes - read_bytes <= MOST_REST_BYTES:
                for gap_begin, gap_end in _gaps(record, sorted(parts.values())):
                    data = memoryview(bytearray(gap_end - gap_begin))
                    read(file, gap_begin, data)
                    self.add(file, Part(gap_begin, gap_end, crc32.crc_of(data)))

    def _records_of(self, file: int) -> tuple[list[int], list[Record]]:
        if file not in self._records:
            records = [record for record in self.inputs[file].records.values() if record.crc and record.nbytes]
            records.sort(key=lambda record: record.offset)
            self._records[file] = [record.offset for record in records], records
        return self._records[file]

    def _compare(self, file: int, record: Record, parts: list[Part]) -> None:
        position, crc = record.offset, 0
        for begin, end, crc_of_part in parts:
            if begin != position:
                return  # two streams have read the same bytes in other pieces: not every byte was read
            crc, position = crc32.combine(crc, crc_of_part, end - begin), end
        if crc != record.crc:
            raise BrokenCheckpoint(
                f"{self.inputs[file].path}: record {record.name} is damaged: its CRC-32 is {crc:08x}, and the file "
                f"says {record.crc:08x}. Take the file from another copy, or leave the checkpoint out."
            )
        with self._lock:
            self.checked_bytes += record.nbytes


def _gaps(record: Record, parts: Sequence[Part]) -> Iterator[tuple[int, int]]:
    """The ranges of a record that are in none of `parts`, which are sorted."""
    position = record.offset
    for begin, end, _ in parts:
        if position < begin:
            yield position, begin
        position = max(position, end)
    if position < record.offset + record.nbytes:
        yield position, record.offset + record.nbytes


@dataclass
class _Run:
    """Bytes of one record that one thread has read in order."""

    file: int
    begin: int
    end: int
    crc: int
    record_end: int


class CrcRuns:
    """What one thread reads, joined to long runs: fewer CRC-32s have to be combined.

    Args:
        crcs: takes the runs.
    """

    def __init__(self, crcs: SourceCrcs) -> None:
        self.crcs = crcs
        self._runs: dict[int, _Run] = {}

    def before(self, source: int, file: int, offset: int, nbytes: int) -> int:
        """The CRC-32 of the bytes in front of a range of an input. A run that does not end there is ended.

        Args:
            source: number of the source in its stream; each has a run of its own.
            file: number of the input.
            offset: of the first byte.
            nbytes: length of the range, which lies in one record or in none that has a CRC-32.
        """
        run = self._runs.get(source)
        if run is None or (run.file, run.end) != (file, offset) or run.end + nbytes > run.record_end:
            self._end(source)
            record_end = next((r.offset + r.nbytes for _, _, r in self.crcs.within(file, offset, offset + nbytes)), 0)
            run = self._runs[source] = _Run(file, offset, offset, 0, record_end)
        return run.crc

    def are_wanted(self, sources: Sequence[int]) -> bool:
        """Whether the kernel should compute CRC-32s: quickly, and for a record that has one."""
        return crc32.is_fast() and any(self._runs[source].record_end for source in sources)

    def extend(self, source: int, nbytes: int, crc: int) -> None:
        """Adds bytes to the run of a source; `crc` is that of the whole run."""
        run = self._runs[source]
        run.end, run.crc = run.end + nbytes, crc
        if run.end == run.record_end:
            self._end(source)

    def add(self, source: int, file: int, offset: int, data: memoryview) -> None:
        """Adds bytes of an input, which may lie in several records or in none."""
        for begin, end, _ in self.crcs.within(file, offset, offset + len(data)):
            before = self.before(source, file, begin, end - begin)
            self.extend(source, end - begin, crc32.crc_of(data[begin - offset : end - offset], before))

    def end_all(self) -> None:
        """Ends all runs. Raises as `SourceCrcs.add`."""
        for source in list(self._runs):
            self._end(source)

    def _end(self, source: int) -> None:
        run = self._runs.pop(source, None)
        if run is not None and run.begin < run.end <= run.record_end:
            self.crcs.add(run.file, Part(run.begin, run.end, run.crc))

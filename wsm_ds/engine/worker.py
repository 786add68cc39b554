"""The worker: reads, sums and writes the elements of a task, slice by slice.

Each source of a slice is read once, for all targets. Every target's elements are made of the same source elements,
with the arithmetic of `arithmetic`, and go to a *sink*: the staged files of a merge, or a comparison with an output
that `verify` makes. A worker never looks at another task's elements. So neither the order of tasks nor the number of
threads and ranks changes a bit of the output.
"""

import logging
import time
from collections.abc import Callable, Sequence
from itertools import islice
from typing import Protocol

import numpy as np

from wsm_ds.dtypes import DType, widen
from wsm_ds.engine import arithmetic
from wsm_ds.engine.arithmetic import Array, StoredElements
from wsm_ds.engine.reader import Reader
from wsm_ds.engine.slices import Slice, StoredKey, SumKey, slice_ranges
from wsm_ds.engine.source_crcs import CrcRuns, SourceCrcs
from wsm_ds.engine.tasks import Task
from wsm_ds.engine.timings import Timings
from wsm_ds.errors import LayoutMismatch, NonFiniteValue
from wsm_ds.planning.intersect import Place
from wsm_ds.planning.plan import Plan, Stream, Target

log = logging.getLogger(__name__)

READ_AHEAD_PLACES = 16


class Sink(Protocol):
    """Where a worker's bytes go."""

    def write(self, number: int, offset: int, data: memoryview) -> None:
        """Takes bytes of an output file.

        Args:
            number: of the output file in the plan.
            offset: of `data` in that file, in bytes.
            data: the bytes. They are valid until the call returns.
        """

    def carry(self, number: int, offset: int, data: memoryview, source: int, source_offset: int) -> None:
        """Takes bytes of an output file that are copied from an input.

        Args:
            number: of the output file in the plan.
            offset: of `data` in that file, in bytes.
            data: the bytes. They are valid until the call returns.
            source: open descriptor of the input.
            source_offset: of the same bytes in the input.
        """


class Worker:
    """Runs tasks one after the other. Each thread has a worker of its own, with its own buffers.

    Args:
        plan: the whole plan.
        reader: of the process.
        sink: takes the bytes.
        slice_numel: most elements of a slice, see `threads.workers_for`.
        already_reported: names of tensors that a warning has named. Workers share the set and add to it.
        timings: of this thread; the seconds of reading and of arithmetic are added to them.
        crcs: takes the CRC-32s of what is read. Workers share it.

    Memory: one slice of each source, and what is made of it. Nothing grows with the checkpoints.
    """

    def __init__(
        self,
        plan: Plan,
        reader: Reader,
        sink: Sink,
        slice_numel: int,
        already_reported: set[str],
        timings: Timings,
        crcs: SourceCrcs,
    ) -> None:
        self.plan, self.reader, self.sink, self.slice_numel = plan, reader, sink, slice_numel
        self.already_reported, self.timings = already_reported, timings
        self.buffers: list[bytearray] = []
        self.scratch = arithmetic.Scratch()
        self.crc_runs = CrcRuns(crcs)

    def run(self, task: Task, is_stopped: Callable[[], bool] = lambda: False) -> None:
        """Reads, sums and writes the elements of a task.

        Args:
            task: of the plan.
            is_stopped: asked before each slice; the call returns early if it is true.

        Raises:
            NonFiniteValue: a source holds a NaN or an infinity (the message names file and tensor), or a sum does not
                fit the dtype of the output.
            LayoutMismatch: a frozen tensor differs between sources; the message names it.
            BrokenCheckpoint: a source is gone, ends too early, or has a wrong CRC-32; the message names it.
            OSError: a file cannot be read, or the sink cannot write.
        """
        stream = self.plan.streams[task.stream]
        self.read_ahead(task)
        for begin, end in slice_ranges(stream, task, self.slice_numel):
            if is_stopped():
                return
            self._run_slice(stream, begin, end)
        self.crc_runs.end_all()

    def read_ahead(self, task: Task) -> None:
        """Asks the system to fetch the first ranges of a task from all sources at once, in the background.

        Raises:
            OSError: a file cannot be opened.
        """
        self.reader.will_read(
            [
                (place.file, place.offset, place.numel * source.dtype(place.element).itemsize)
                for source in self.plan.streams[task.stream].sources
                for place in islice(source.within(task.begin, task.end), READ_AHEAD_PLACES)
            ]
        )

    def _run_slice(self, stream: Stream, begin: int, end: int) -> None:
        targets = [(t, places) for t in stream.targets if (places := list(t.places.within(begin, end)))]
        sums = self._read_and_sum(stream, [target for target, _ in targets], begin, end)
        source_elements = {}
        if not sums:
            members = {member for target, _ in targets for member in target.members}
            source_elements = self._read_sources(stream, members, begin, end)
        current = Slice(stream, begin, end, source_elements, sums)
        for target, places in targets:
            began_s = time.perf_counter()
            stored = self._stored(current, target)
            self.timings.arithmetic_s += time.perf_counter() - began_s
            data = memoryview(stored.view(np.uint8))  # type: ignore[arg-type]
            itemsize = stored.itemsize
            for place in places:
                first = place.element - begin
                place_bytes = data[first * itemsize : (first + place.numel) * itemsize]
                if stream.combine == "carry":
                    self._carry(stream, place, place_bytes)
                else:
                    self.sink.write(place.file, place.offset, place_bytes)

    def _carry(self, stream: Stream, target: Place, data: memoryview) -> None:
        for source in stream.sources[0].within(target.element, target.element + len(data)):
            begin = source.element - target.element
            end = begin + source.numel
            with self.reader.descriptors([source.file]) as (descriptor,):
                self.sink.carry(target.file, target.offset + begin, data[begin:end], descriptor, source.offset)

    def _read_and_sum(self, stream: Stream, targets: Sequence[Target], begin: int, end: int) -> dict[SumKey, Array]:
        """All weighted sums of a slice, read and summed by the compiled kernel. Empty if it cannot do it.

        The kernel needs each source as one run of bytes. It also gives up if a read fails or a sum is not finite.
        `_read_sources` and `_summed` are slower and give the same bits. They try failed reads again, and their errors
        name the tensor.
        """
        members = sorted({member for target in targets for member in target.members})
        is_plain = stream.combine == "merge" and len(members) <= self.reader.most_open_files
        if not is_plain or any(target.places.dtype(begin).sums_in_fp64 for target in targets):
            return {}
        dtypes, records = [], []
        for member in members:
            source = stream.sources[member]
            places = list(islice(source.within(begin, end), 2))
            if len(places) != 1 or places[0].numel < end - begin:
                return {}
            file, offset, nbytes = places[0].file, places[0].offset, (end - begin) * source.dtype(begin).itemsize
            dtypes.append(source.dtype(begin))
            records.append((member, file, offset, nbytes))
        keys = [*dict.fromkeys(SumKey(target.members, target.coefficients, False) for target in targets)]
        wanted_sums = [(tuple(members.index(member) for member in key.members), key.coefficients) for key in keys]
        began_s = time.perf_counter()
        before = [self.crc_runs.before(*record) for record in records]
        if not self.crc_runs.are_wanted(members):
            before = []
        with self.reader.descriptors([file for _, file, _, _ in records]) as descriptors:
            sources = [
                StoredElements(descriptor, offset, dtype)
                for descriptor, (_, _, offset, _), dtype in zip(descriptors, records, dtypes, strict=True)
            ]
            fused = arithmetic.fused_sums(sources, wanted_sums, end - begin, self.scratch, before)
        if fused is None or not fused.is_finite:
            return {}
        for (member, _, _, nbytes), crc in zip(records if before else [], fused.crcs, strict=True):
            self.crc_runs.extend(member, nbytes, crc)
        self.timings.read_s += fused.read_s
        self.timings.arithmetic_s += time.perf_counter() - began_s - fused.read_s
        return dict(zip(keys, fused.sums, strict=True))

    def _read_sources(self, stream: Stream, members: set[int], begin: int, end: int) -> dict[int, Array]:
        """The stored elements of each source in `members`, by its number. Elements that a source lacks are zeros."""
        began_s = time.perf_counter()
        elements, ranges, owners = {}, [], []
        for number in sorted(members):
            source = stream.sources[number]
            dtype = source.dtype(begin)
            into = self._buffer(number, (end - begin) * dtype.itemsize)
            places = list(source.within(begin, end))
            if sum(place.numel for place in places) < end - begin:
                into[:] = bytes(len(into))
            for element, numel, file, offset in places:
                first_byte = (element - begin) * dtype.itemsize
                data = into[first_byte : first_byte + numel * dtype.itemsize]
                ranges.append((file, offset, data))
                owners.append(number)
            elements[number] = np.frombuffer(into, dtype=dtype.storage)
        self.reader.read_all(ranges)
        for number, wanted in zip(owners, ranges, strict=True):
            self.crc_runs.add(number, *wanted)
        self.timings.read_s += time.perf_counter() - began_s
        return elements

    def _buffer(self, number: int, nbytes: int) -> memoryview:
        """The buffer of a source, which every slice uses again."""
        while len(self.buffers) <= number:
            self.buffers.append(bytearray())
        if len(self.buffers[number]) < nbytes:
            self.buffers[number] = bytearray(nbytes)
        return memoryview(self.buffers[number])[:nbytes]

    def _stored(self, current: Slice, target: Target) -> Array:
        """The elements of a slice as a target stores them, [end - begin]."""
        dtype = target.places.dtype(current.begin)
        key = StoredKey(target.members, target.coefficients, target.cast_from, dtype.name)
        if key not in current.stored:
            if current.stream.combine == "carry":
                current.stored[key] = current.source_elements[0]
            elif current.stream.combine == "merge":
                current.stored[key] = self._merged(current, target, dtype)
            else:
                current.stored[key] = self._newest(current, target, dtype)
        return current.stored[key]

    def _merged(self, current: Slice, target: Target, dtype: DType) -> Array:
        merged = self._summed(current, target, keeps_fp64=dtype.sums_in_fp64)
        if target.cast_from is not None:
            # DeepSpeed casts module weights from the masters that it stores, so they are rounded as the masters are.
            master_dtype = current.stream.targets[target.cast_from].places.dtype(current.begin)
            merged = widen(arithmetic.rounded(merged, master_dtype), master_dtype)
        stored = arithmetic.rounded(merged, dtype, self.scratch, len(current.stored))
        if dtype.name == "fp16" and not np.isfinite(stored).all():
            element = current.begin + int(np.flatnonzero(~np.isfinite(stored))[0])
            raise NonFiniteValue(
                f"{current.stream.name(element, self.plan.names)} overflows fp16 in {self._file_at(target, element)}; "
                "write bf16 or fp32 instead."
            )
        return stored

    def _summed(self, current: Slice, target: Target, *, keeps_fp64: bool) -> Array:
        """Σ c_j θ_j over the target's members, as float32, or as float64 if `keeps_fp64`."""
        key = SumKey(target.members, target.coefficients, keeps_fp64)
        if key not in current.sums:
            elements = [current.source_elements[member] for member in target.members]
            dtypes = [current.source_dtype(member) for member in target.members]
            summed, is_finite = arithmetic.weighted_sum(elements, dtypes, target.coefficients, keeps_fp64=keeps_fp64)
            if not is_finite:
                raise self._non_finite(current, target)
            current.sums[key] = summed
        return current.sums[key]

    def _newest(self, current: Slice, target: Target, dtype: DType) -> Array:
        """The elements of the newest source of the window. Those of the other sources are compared with them."""
        last = target.members[-1]
        newest, newest_dtype = current.source_elements[last], current.source_dtype(last)
        for member in target.members[:-1]:
            older = current.source_elements[member]
            is_equal = current.source_dtype(member) == newest_dtype and np.array_equal(
                older.view(np.uint8),
                newest.view(np.uint8),  # as bytes: a NaN is equal to itself
            )
            if not is_equal:
                self._report_difference(current, target, member)
        return newest if dtype == newest_dtype else arithmetic.rounded(widen(newest, newest_dtype), dtype)

    def _report_difference(self, current: Slice, target: Target, member: int) -> None:
        """Raises LayoutMismatch for a frozen tensor that differs from the newest; warns once of any other tensor."""
        older, newest = current.source_elements[member], current.source_elements[target.members[-1]]
        first = 0
        if older.dtype == newest.dtype:
            shape = (len(newest), newest.itemsize)
            differs = (older.view(np.uint8) != newest.view(np.uint8)).reshape(shape).any(axis=1)
            first = int(np.flatnonzero(differs)[0])
        name = current.stream.name(current.begin + first, self.plan.names)
        sources = self.plan.outputs[target.output].sources
        tags = f"{sources[target.members.index(member)].tag} and {sources[-1].tag}"
        if current.stream.combine == "equal":
            raise LayoutMismatch(f"the frozen tensor {name} differs between {tags}: they are not one model.")
        if name not in self.already_reported:
            self.already_reported.add(name)
            log.warning("%s differs between %s; it cannot be averaged, the newest is kept", name, tags)

    def _non_finite(self, current: Slice, target: Target) -> NonFiniteValue:
        """The error for a sum that is not finite. It names the first source that is not."""
        for member in target.members:
            values = widen(current.source_elements[member], current.source_dtype(member))
            non_finite = np.flatnonzero(~np.isfinite(values))
            if len(non_finite):
                values_per_element = len(values) // (current.end - current.begin)  # 2 if the element is complex
                element = current.begin + int(non_finite[0]) // values_per_element
                place = next(current.stream.sources[member].within(element, element + 1))
                name = current.stream.name(element, self.plan.names)
                return NonFiniteValue(
                    f"{self.plan.inputs[place.file].path} holds {values[non_finite[0]]} in {name} "
                    f"({len(non_finite)} such values nearby): that run had diverged, or the file is damaged. Leave the "
                    "checkpoint out of the window."
                )
        name = current.stream.name(current.begin, self.plan.names)
        return NonFiniteValue(
            f"the merge of {name} overflows {self._file_at(target, current.begin)}, although every source is finite."
        )

    def _file_at(self, target: Target, element: int) -> str:
        """The output file that holds an element, or the next one that the target has, for a message."""
        for place in target.places.within(element, int(target.places.starts[-1])):
            return self.plan.files[place.file].name
        return str(self.plan.outputs[target.output].out)

"""Records which bytes of the sources a merge reads."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from wsm_ds.engine import arithmetic, reader

Range = tuple[str, int, int]
"""(path, begin, end) in bytes."""


def record_source_reads(monkeypatch: pytest.MonkeyPatch) -> list[Range]:
    """A list that grows by every range that this process reads, in Python or in the compiled kernel."""
    ranges: list[Range] = []
    read, fused_sums = reader.Reader.read, arithmetic.fused_sums

    def recording_read(self: reader.Reader, file: int, offset: int, into: memoryview) -> None:
        read(self, file, offset, into)
        ranges.append((str(self.inputs[file].path.resolve()), offset, offset + len(into)))

    def recording_sums(
        sources: Sequence[arithmetic.StoredElements], wanted_sums: Any, numel: int, scratch: Any = None, crcs: Any = ()
    ) -> arithmetic.FusedSums | None:
        fused = fused_sums(sources, wanted_sums, numel, scratch, crcs)
        if fused is not None:
            for source in sources:
                if source.descriptor != arithmetic.IN_MEMORY:
                    end = source.offset + numel * source.dtype.itemsize
                    ranges.append((str(Path(f"/proc/self/fd/{source.descriptor}").resolve()), source.offset, end))
        return fused

    monkeypatch.setattr(reader.Reader, "read", recording_read)
    monkeypatch.setattr(arithmetic, "fused_sums", recording_sums)
    return ranges

"""The compiled sums and those of numpy are equal bit for bit, and to sums taken element by element."""

import ctypes
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from wsm_ds.dtypes import BY_NAME, DType, narrow, widen
from wsm_ds.engine import arithmetic
from wsm_ds.engine.arithmetic import StoredElements, fused_sums, kernel, rounded, weighted_sum

FP32, BF16 = BY_NAME["fp32"], BY_NAME["bf16"]
PIECE_NUMEL = 8192
"""Of `kernel.c`, for few sources."""
NUMELS = st.sampled_from([1, 2, 7, 31, 32, 33, PIECE_NUMEL - 1, PIECE_NUMEL, PIECE_NUMEL + 1, 2 * PIECE_NUMEL + 13])


def stored(random: np.random.Generator, dtype: DType, numel: int) -> np.ndarray:
    """Elements of every size, subnormal ones and zeros of both signs included."""
    values = random.standard_normal(numel) * 10.0 ** random.integers(-44, 30, numel)
    values[random.random(numel) < 0.1] = -0.0
    return narrow(values.astype(np.float32), dtype)


def in_numpy(slices: list[np.ndarray], dtypes: list[DType], coefficients: list[float]) -> np.ndarray:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(arithmetic, "kernel", lambda: None)
        return weighted_sum(slices, dtypes, coefficients)[0]


@pytest.fixture(params=[512, 256, 0], ids=["avx512", "avx2", "portable"])
def loops(request: pytest.FixtureRequest) -> Iterator[None]:
    """Each of the kernel's versions of its loop; the best that there is in place of one that this machine has not."""
    library = kernel()
    if library is None:
        yield
        return
    flag = ctypes.c_int.in_dll(library, "wsm_vector_bits")
    found = flag.value
    flag.value = min(found, request.param)
    yield
    flag.value = found


def test_the_kernel_is_there_where_a_compiler_is() -> None:
    if shutil.which("gcc") or shutil.which("cc"):
        assert kernel() is not None


@pytest.mark.usefixtures("loops")
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 2**32 - 1), NUMELS, st.lists(st.sampled_from([FP32, BF16]), min_size=1, max_size=6))
def test_the_kernel_sums_as_numpy_does(seed: int, numel: int, dtypes: list[DType]) -> None:
    random = np.random.default_rng(seed)
    slices = [stored(random, dtype, numel) for dtype in dtypes]
    coefficients = random.dirichlet(np.ones(len(dtypes))).tolist()
    summed, is_finite = weighted_sum(slices, dtypes, coefficients)
    assert is_finite
    assert summed.tobytes() == in_numpy(slices, dtypes, coefficients).tobytes()
    literal = 0.0
    for values, dtype, coefficient in zip(slices, dtypes, coefficients, strict=True):
        literal += float(widen(values, dtype)[-1]) * coefficient
    assert np.float32(literal) == summed[-1]
    assert rounded(summed, BF16).tobytes() == narrow(summed, BF16).tobytes()


@pytest.mark.usefixtures("loops")
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 2**32 - 1), NUMELS, st.sampled_from([1, 2, 5, 11, 40]), st.integers(1, 4))
def test_sums_that_are_read_by_the_kernel_are_those_of_what_is_read(
    seed: int, numel: int, source_count: int, sum_count: int
) -> None:
    random = np.random.default_rng(seed)
    dtypes = [FP32 if flag else BF16 for flag in random.integers(0, 2, source_count)]
    slices = [stored(random, dtype, numel) for dtype in dtypes]
    sums = []
    for _ in range(sum_count):
        members = tuple(np.flatnonzero(random.integers(0, 2, source_count)).tolist()) or (0,)
        sums.append((members, tuple(random.dirichlet(np.ones(len(members))).tolist())))
    read, write = os.memfd_create("sources"), b"".join(values.tobytes() for values in slices)
    os.write(read, b"xyz!" + write)
    offsets = 4 + np.concatenate([[0], np.cumsum([values.nbytes for values in slices])])
    sources = [StoredElements(read, int(o), d) for o, d in zip(offsets[:-1], dtypes, strict=True)]
    fused = fused_sums(sources, sums, numel)
    os.close(read)
    if kernel() is None:
        assert fused is None
        return
    assert fused is not None
    assert fused.is_finite
    for summed, (members, coefficients) in zip(fused.sums, sums, strict=True):
        own = [slices[m] for m in members], [dtypes[m] for m in members]
        assert summed.tobytes() == in_numpy(*own, list(coefficients)).tobytes()


@pytest.mark.usefixtures("loops")
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_value_that_is_not_finite_is_noticed_wherever_it_is(bad: float) -> None:
    for numel in (1, 100, PIECE_NUMEL + 5):
        for place in (0, numel // 2, numel - 1):
            values = np.ones(numel, np.float32)
            values[place] = bad
            assert not weighted_sum([np.ones(numel, np.float32), values], [FP32, FP32], [0.5, 0.5])[1]
    assert not weighted_sum([np.full(3, 3e38, np.float32)] * 2, [FP32, FP32], [1.0, 1.0])[1]


def test_a_source_that_ends_early_or_cannot_be_read_is_left_to_the_caller() -> None:
    file = os.memfd_create("short")
    os.write(file, bytes(40))
    assert fused_sums([StoredElements(file, 0, FP32)], [((0,), (1.0,))], 11) is None
    assert fused_sums([StoredElements(-1, 0, FP32)], [((0,), (1.0,))], 10) is None
    assert fused_sums([StoredElements(file, 0, BY_NAME["fp16"])], [((0,), (1.0,))], 10) is None
    os.close(file)


def test_a_merge_without_the_kernel_makes_the_same_bytes(runs: Path, tmp_path: Path) -> None:
    start = "import sys; from wsm_ds import cli; from wsm_ds.engine import arithmetic; "
    end = "sys.exit(cli.main(sys.argv[1:]))"
    for name, script in (("numpy", start + "arithmetic.kernel = lambda: None; " + end), ("kernel", start + end)):
        command = ["merge", str(runs / "w2_s2_bf16"), "--last", "3", "--curve", "1-sqrt", "--out", str(tmp_path / name)]
        subprocess.run([sys.executable, "-c", script, *command], check=True, capture_output=True)
    for path in (tmp_path / "numpy/global_step6").iterdir():
        assert path.read_bytes() == (tmp_path / "kernel/global_step6" / path.name).read_bytes()

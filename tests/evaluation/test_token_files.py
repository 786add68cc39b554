"""Token files of every form give their tokens; what is none, is damaged or of another width is refused by name."""

import struct
from pathlib import Path

import numpy as np
import pytest

from wsm_ds.errors import EvaluationError
from wsm_ds.evaluation.token_files import open_tokens

TOKENS = np.arange(1000, 1040)


def write_megatron(base: Path, documents: list[np.ndarray], code: int = 8, dtype: str = "<u2") -> Path:
    """A data set as `megatron/core/datasets/indexed_dataset.py` writes it."""
    lengths = np.array([len(document) for document in documents], "<i4")
    offsets = (np.cumsum(lengths, dtype="<i8") - lengths) * np.dtype(dtype).itemsize
    base.with_suffix(".bin").write_bytes(np.concatenate(documents).astype(dtype).tobytes())
    base.with_suffix(".idx").write_bytes(
        b"MMIDIDX\x00\x00"
        + struct.pack("<QBQQ", 1, code, len(documents), len(documents) + 1)
        + lengths.tobytes()
        + offsets.astype("<i8").tobytes()
        + np.arange(len(documents) + 1, dtype="<i8").tobytes()
    )
    return base.with_suffix(".bin")


@pytest.mark.parametrize(("code", "dtype"), [(8, "<u2"), (4, "<i4"), (5, "<i8")])
def test_a_megatron_data_set_is_one_stream_whichever_of_its_files_is_named(
    tmp_path: Path, code: int, dtype: str
) -> None:
    path = write_megatron(tmp_path / "held", [TOKENS[:7], TOKENS[7:]], code, dtype)
    for named in (path, path.with_suffix(".idx")):
        assert open_tokens(named).tolist() == TOKENS.tolist()


def test_numpy_files_tell_their_dtype(tmp_path: Path) -> None:
    np.save(tmp_path / "held.npy", TOKENS.astype(np.uint32).reshape(4, 10))
    assert open_tokens(tmp_path / "held.npy").tolist() == TOKENS.tolist()
    with pytest.raises(EvaluationError, match="`token_dtype` uint16 contradicts it"):
        open_tokens(tmp_path / "held.npy", "uint16")


def test_a_bare_file_has_uint16_tokens_unless_another_dtype_is_given(tmp_path: Path) -> None:
    for name in ("held.bin", "held.npy"):  # OLMo names a bare memory map .npy
        path = tmp_path / name
        path.write_bytes(TOKENS.astype("<u2").tobytes())
        assert open_tokens(path).tolist() == TOKENS.tolist()
        path.write_bytes(TOKENS.astype("<u4").tobytes())
        assert open_tokens(path, "uint32").tolist() == TOKENS.tolist()
        with pytest.raises(EvaluationError, match=rf"{name} does not say .*probably uint32"):
            open_tokens(path)


@pytest.mark.parametrize("most", [12, 256, 50257, 65535])
def test_real_uint16_tokens_are_not_taken_for_uint32(tmp_path: Path, most: int) -> None:
    tokens = np.random.default_rng(0).integers(0, most + 1, 5000).astype("<u2")
    (tmp_path / "held.bin").write_bytes(tokens.tobytes())
    assert np.array_equal(open_tokens(tmp_path / "held.bin"), tokens)


@pytest.mark.parametrize("most", [12, 256, 50257, 128255, 256000])
def test_uint32_tokens_are_never_read_as_uint16(tmp_path: Path, most: int) -> None:
    tokens = np.random.default_rng(0).integers(0, most + 1, 5000).astype("<u4")
    (tmp_path / "held.bin").write_bytes(tokens.tobytes())
    with pytest.raises(EvaluationError, match="probably uint32"):
        open_tokens(tmp_path / "held.bin")


def test_a_file_of_llm_c_has_a_header(tmp_path: Path) -> None:
    header = np.zeros(256, "<i4")
    header[:3] = 20240520, 1, len(TOKENS)
    path = tmp_path / "held.bin"
    path.write_bytes(header.tobytes() + TOKENS.astype("<u2").tobytes())
    assert open_tokens(path).tolist() == TOKENS.tolist()
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(EvaluationError, match=r"held.bin has 39 tokens, but its header says 40"):
        open_tokens(path)


def test_damaged_and_foreign_files_are_named(tmp_path: Path) -> None:
    path = write_megatron(tmp_path / "held", [TOKENS])
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(EvaluationError, match=r"held.bin has 38 tokens, but its index held.idx describes 40"):
        open_tokens(path)
    path.with_suffix(".idx").write_bytes(b"MMIDIDX\x00\x00" + bytes(25))
    with pytest.raises(EvaluationError, match="version 0"):
        open_tokens(path)
    path.with_suffix(".idx").write_bytes(b"short")
    with pytest.raises(EvaluationError, match=r"held.bin cannot be read as tokens"):
        open_tokens(path)
    path.unlink()
    path.with_suffix(".idx").write_bytes(b"MMIDIDX\x00\x00" + bytes(60))
    with pytest.raises(EvaluationError, match="held"):
        open_tokens(path.with_suffix(".idx"))
    np.save(tmp_path / "floats.npy", np.ones(4))
    with pytest.raises(EvaluationError, match=r"floats.npy holds float64 values"):
        open_tokens(tmp_path / "floats.npy")
    np.save(tmp_path / "objects.npy", np.array([{}]), allow_pickle=True)
    with pytest.raises(EvaluationError, match=r"objects.npy cannot be read as tokens"):
        open_tokens(tmp_path / "objects.npy")
    (tmp_path / "odd.bin").write_bytes(b"abc")
    with pytest.raises(EvaluationError, match=r"odd.bin has 3 bytes"):
        open_tokens(tmp_path / "odd.bin")
    (tmp_path / "empty.bin").write_bytes(b"")
    with pytest.raises(EvaluationError, match=r"empty.bin is empty"):
        open_tokens(tmp_path / "empty.bin")

"""Files of tokens, as the tools of pretraining write them, opened without reading them whole.

    Megatron     NAME.bin with NAME.idx beside it (`megatron/core/datasets/indexed_dataset.py`)
    numpy        .npy with numpy's magic
    OLMo         .npy without it: the bare tokens of a memory map
    llm.c        .bin with a header of 256 int32
    nanoGPT      .bin, bare tokens
    bytes        any file whose bytes are the tokens

The bare ones do not say how many bytes a token has. It is 2 unless the caller says otherwise, and a file whose content
shows that this is wrong is refused.
"""

import struct
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from wsm_ds.errors import EvaluationError

Tokens = NDArray[Any]
TokenDType = Literal["uint8", "uint16", "uint32", "int32", "int64"]

TOKEN_SUFFIXES = (".bin", ".npy", ".idx")
MEGATRON_MAGIC = b"MMIDIDX\x00\x00"
MEGATRON_HEADER = struct.Struct("<9sQBQQ")
MEGATRON_DTYPES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
"""Codes 6 and 7 are floats, which are no tokens."""
NUMPY_MAGIC = b"\x93NUMPY"
LLM_C_HEADER = struct.Struct("<3i")
LLM_C_HEADER_BYTES, LLM_C_MAGICS = 1024, {20240520: "<u2", 20240801: "<u4"}
"""The magic numbers of `llmc/dataloader.h`, for GPT-2's and for Llama 3's tokens."""
LOOKED_AT = 4096
"""Tokens at the beginning of a bare file that tell whether its tokens have two bytes."""
MOST_HIGH_HALF = 15
"""The upper 16 bits of a token are at most this, in a vocabulary of up to a million."""


def open_tokens(path: Path, dtype: TokenDType | None = None) -> Tokens:
    """Opens the tokens of a file.

    Args:
        path: the file; of Megatron's two files, either one.
        dtype: of the tokens in a bare file; None: uint16. Files that tell it themselves need none.

    Returns:
        All tokens in order, shape [tokens], mapped into memory and not read.

    Raises:
        EvaluationError: it is not such a file, is damaged, or its tokens do not have the dtype; names the file.
    """
    try:
        return _open(path, dtype)
    except (OSError, ValueError, struct.error) as error:
        if isinstance(error, EvaluationError):
            raise
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise EvaluationError(f"{path} cannot be read as tokens: {reason}.") from error


def _open(path: Path, dtype: TokenDType | None) -> Tokens:
    data, index = path.with_suffix(".bin"), path.with_suffix(".idx")
    if path.suffix in (".bin", ".idx") and index.is_file():
        return _require_told(path, _open_megatron(data, index), dtype)
    with path.open("rb") as file:
        head = file.read(LLM_C_HEADER_BYTES)
    if not head:
        raise EvaluationError(f"{path} is empty. Give a file of held-out tokens.")
    if head.startswith(MEGATRON_MAGIC):
        raise EvaluationError(f"{path} is the index of a Megatron data set; its tokens, {data}, are missing.")
    if head.startswith(NUMPY_MAGIC):
        return _require_told(path, _integers(path, np.load(path, mmap_mode="r", allow_pickle=False).reshape(-1)), dtype)
    if path.suffix == ".bin" and len(head) == LLM_C_HEADER_BYTES:
        magic, _, count = LLM_C_HEADER.unpack_from(head)
        if magic in LLM_C_MAGICS:
            return _require_told(path, _open_llm_c(path, LLM_C_MAGICS[magic], count), dtype)
    return _open_bare(path, dtype)


def _open_megatron(data: Path, index: Path) -> Tokens:
    with index.open("rb") as file:
        magic, version, code, sequences, _ = MEGATRON_HEADER.unpack(file.read(MEGATRON_HEADER.size))
        lengths = np.fromfile(file, "<i4", sequences)
        offsets = np.fromfile(file, "<i8", sequences)
    if magic != MEGATRON_MAGIC or version != 1 or code not in MEGATRON_DTYPES or len(offsets) != sequences:
        raise EvaluationError(
            f"{index} is not the index of a Megatron data set: magic {magic!r}, version {version}, dtype {code}, "
            f"{len(offsets)} of {sequences} sequences. Remove it if {data} is a bare file of tokens."
        )
    tokens: Tokens = np.memmap(data, MEGATRON_DTYPES[code], mode="r")
    expected = (np.cumsum(lengths, dtype=np.int64) - lengths) * tokens.itemsize
    if not np.array_equal(offsets, expected) or int(lengths.sum(dtype=np.int64)) != len(tokens):
        raise EvaluationError(
            f"{data} has {len(tokens)} tokens, but its index {index.name} describes "
            f"{int(lengths.sum(dtype=np.int64))} in {sequences} sequences. One of both is damaged, or of another data "
            "set."
        )
    return tokens


def _open_llm_c(path: Path, dtype: str, count: int) -> Tokens:
    tokens: Tokens = np.memmap(path, dtype, mode="r", offset=LLM_C_HEADER_BYTES)
    if len(tokens) != count:
        raise EvaluationError(f"{path} has {len(tokens)} tokens, but its header says {count}. It is damaged.")
    return tokens


def _open_bare(path: Path, dtype: TokenDType | None) -> Tokens:
    kind = np.dtype(dtype or "uint16").newbyteorder("<")
    nbytes = path.stat().st_size
    if nbytes % kind.itemsize:
        raise EvaluationError(f"{path} has {nbytes} bytes, which is not a whole number of {kind.name} tokens.")
    tokens: Tokens = np.memmap(path, kind, mode="r")
    if dtype is None and _has_wider_tokens(tokens[: 2 * LOOKED_AT]):
        raise EvaluationError(
            f"{path} does not say how many bytes a token has. As uint16 every second token would be at most "
            f"{MOST_HIGH_HALF}, so its tokens are probably uint32: say `token_dtype` uint32 (or uint16)."
        )
    return tokens


def _has_wider_tokens(tokens: Tokens) -> bool:
    """Whether what was read as uint16 looks like uint32: every second value is the upper half of a token."""
    low, high = tokens[0::2], tokens[1::2]
    if not len(high) or int(high.max()) > MOST_HIGH_HALF:
        return False
    return int(low.max()) > (MOST_HIGH_HALF if int(high.max()) else 0)


def _integers(path: Path, tokens: Tokens) -> Tokens:
    if tokens.dtype.kind not in "iu":
        raise EvaluationError(f"{path} holds {tokens.dtype} values, and tokens are integers.")
    return tokens


def _require_told(path: Path, tokens: Tokens, dtype: TokenDType | None) -> Tokens:
    if dtype is not None and tokens.dtype != np.dtype(dtype):
        raise EvaluationError(
            f"{path} holds {tokens.dtype} tokens; `token_dtype` {dtype} contradicts it. Leave it out."
        )
    return tokens

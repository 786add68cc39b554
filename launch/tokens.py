"""Reads tokens from disk, and makes batches that depend on the seed and the numbers of the samples alone.

So an interrupted run goes on with the samples that it has not seen, and a run on another number of ranks sees the same
global batches. Only the number of samples used so far must be saved, and DeepSpeed does that.
"""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

MASK = (1 << 64) - 1


def open_tokens(path: Path, vocabulary: int) -> NDArray[np.integer]:
    """Opens the tokens of a file, or of all files below a folder in the order of their names.

    A `.bin` file is a flat array of little-endian uint16, or of uint32 if the vocabulary is larger than 65,536. It is
    mapped into memory and not read as a whole. Any other file is text; its bytes are the tokens.

    Args:
        path: a file or a folder.
        vocabulary: number of different tokens.

    Returns:
        All tokens, shape [tokens].

    Raises:
        SystemExit: there is no data, or there are several .bin files, or .bin files and text.
    """
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    files = [file for file in files if file.is_file() and file.stat().st_size]
    if not files:
        raise SystemExit(f"--data {path}: there is no file, or all files are empty")
    binary = [file for file in files if file.suffix == ".bin"]
    if not binary:
        return np.frombuffer(b"".join(file.read_bytes() for file in files), dtype=np.uint8)
    if len(files) > 1:
        raise SystemExit(
            f"--data {path}: it has {len(files)} files; give one .bin file (join several with cat), or text files only"
        )
    dtype = np.dtype("<u2" if vocabulary <= 1 << 16 else "<u4")
    if path.stat().st_size % dtype.itemsize:
        raise SystemExit(f"--data {path}: {path.stat().st_size} bytes are not a whole number of {dtype.name} tokens")
    return np.memmap(binary[0], dtype=dtype, mode="r")


class Samples:
    """The samples of a run: windows of `context` + 1 tokens, each once per epoch, in an order that the seed decides.

    Args:
        tokens: of all the data, shape [tokens].
        context: tokens per sample, without the last one, which is only predicted.
        vocabulary: number of different tokens.
        seed: decides the order, another one in each epoch.
    """

    def __init__(self, tokens: NDArray[np.integer], *, context: int, vocabulary: int, seed: int) -> None:
        self.tokens, self.context, self.vocabulary, self.seed = tokens, context, vocabulary, seed
        self.windows = (len(tokens) - 1) // context
        if self.windows < 1:
            raise SystemExit(f"the data has {len(tokens)} tokens; one sample needs {context + 1}")

    def batch(self, numbers: Iterable[int]) -> torch.Tensor:
        """Returns samples as a tensor, int64, shape [samples, context + 1].

        Args:
            numbers: of the samples in the run, from 0. Numbers above those of the first epoch go on with the next.
        """
        rows = []
        for number in numbers:
            epoch, index = divmod(number, self.windows)
            start = shuffled(index, self.windows, self.seed * 0x9E3779B97F4A7C15 + epoch) * self.context
            rows.append(self.tokens[start : start + self.context + 1].astype(np.int64))
        batch = np.stack(rows)
        if batch.max() >= self.vocabulary:
            raise SystemExit(f"the data holds token {batch.max()}, but --vocabulary is {self.vocabulary}")
        return torch.from_numpy(batch)


def shuffled(index: int, count: int, key: int) -> int:
    """Returns the place of `index` in a permutation of range(count) that `key` decides.

    The permutation is a Feistel network on the next even number of bits. Its output is fed back until it is below
    `count` ("cycle walking"). So a permutation of 10**9 windows needs no list of them.

    >>> sorted(shuffled(index, 5, key=1) for index in range(5))
    [0, 1, 2, 3, 4]
    """
    half = max(1, ((count - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    while True:
        left, right = index >> half, index & mask
        for turn in range(4):
            left, right = right, left ^ (_mixed(right + _mixed(key + turn)) & mask)
        index = left << half | right
        if index < count:
            return index


def _mixed(value: int) -> int:
    """The finalizer of SplitMix64: 64 bits that depend on every bit of the value."""
    value = (value & MASK) ^ (value & MASK) >> 30
    value = value * 0xBF58476D1CE4E5B9 & MASK
    value = (value ^ value >> 27) * 0x94D049BB133111EB & MASK
    return value ^ value >> 31

"""A held-out set: the blocks of tokens on which every model of a comparison is measured."""

import hashlib
import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from wsm_ds.errors import EvaluationError, RecipeError, few
from wsm_ds.evaluation.texts import BYTES, TEXT_SUFFIXES, load_tokenizer, open_text_bytes, tokenize
from wsm_ds.evaluation.token_bytes import bytes_of_tokens
from wsm_ds.evaluation.token_files import TokenDType, Tokens, open_tokens

NAMED = re.compile(r"([\w.-]+)=(.+)", re.DOTALL)
WEIGHTED = re.compile(r"(.+)@(\d+(?:\.\d*)?(?:[eE][-+]?\d+)?)", re.DOTALL)
MOST_TOKEN = (1 << 31) - 1


class DataSource(BaseModel):
    """One held-out file.

    Attributes:
        name: for people, and in the names of metrics.
        path: the file: see `token_files` and `texts`.
        weight: of its mean in the mean over all sources; None: its number of tokens.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(pattern=r"^[\w.-]+$")
    path: Path
    weight: float | None = Field(default=None, gt=0, allow_inf_nan=False)


def parse_source(text: str) -> DataSource:
    """What `--data` says.

    Example:
        >>> parse_source("web=held_out.bin@0.7")
        DataSource(name='web', path=PosixPath('held_out.bin'), weight=0.7)

    Args:
        text: [NAME=]PATH[@WEIGHT]; without a name, that of the file is taken. A file of exactly this name counts first.

    Raises:
        RecipeError: the weight is zero.
    """
    name, path, weight = None, text, None
    if not Path(text).exists():
        if match := NAMED.fullmatch(path):
            name, path = match[1], match[2]
        if not Path(path).exists() and (match := WEIGHTED.fullmatch(path)):
            path, weight = match[1], float(match[2])
    if weight == 0:
        raise RecipeError(f"--data {text}: the weight must be above 0")
    stem = re.sub(r"[^\w.-]+", "-", Path(path).stem) or "data"
    return DataSource(name=name or stem, path=Path(path), weight=weight)


@dataclass(frozen=True)
class HeldOut:
    """The blocks of all sources, one source after the other.

    Attributes:
        sources: names.
        source: each block's number in `sources`; shape [blocks].
        tokens: int64, shape [blocks, sequence_length + 1]: each but the first is predicted.
        nbytes: of the predicted tokens' text, shape [blocks]; None if a source does not tell.
        digest: SHA-256 of all of this.
    """

    sources: tuple[str, ...]
    source: Tokens
    tokens: Tokens
    nbytes: Tokens | None
    digest: str


@dataclass(frozen=True)
class Cut:
    """How held-out data are cut into blocks.

    Attributes:
        sequence_length: predicted tokens of a block.
        blocks: of each source, at most.
        tokenizer: for text; also tells the bytes of tokens. None: there is none. "bytes": bytes are the tokens.
        token_dtype: of bare token files; None: see `open_tokens`.
    """

    sequence_length: int
    blocks: int
    tokenizer: str | None = None
    token_dtype: TokenDType | None = None


@lru_cache(maxsize=4)
def read_held_out(data: tuple[DataSource, ...], cut: Cut) -> HeldOut:
    """Reads the blocks of a held-out set.

    A source's tokens are cut into blocks that follow each other. If there are more than `cut.blocks`, those that are
    taken lie at equal distances. So the choice depends on the file and on `cut` alone.

    Memory: 8 bytes a token of the blocks.

    Args:
        data: the sources.
        cut: how they are cut.

    Raises:
        EvaluationError: a file cannot be used: it is missing, empty, too short for a block, no file of tokens; or it is
            text and there is no tokenizer.
    """
    repeated = {source.name for source in data if [other.name for other in data].count(source.name) > 1}
    if repeated:
        raise RecipeError(f"two held-out sources have the name {few(sorted(repeated))}; name them: --data NAME=PATH")
    tokenizer = load_tokenizer(cut.tokenizer) if cut.tokenizer not in (None, BYTES) else None
    parts = [_read(source, cut, tokenizer) for source in data]
    tokens = np.concatenate([blocks for blocks, _ in parts])
    counts = [nbytes for _, nbytes in parts if nbytes is not None]
    nbytes = np.concatenate(counts) if len(counts) == len(parts) else None
    numbers = np.repeat(np.arange(len(parts)), [len(blocks) for blocks, _ in parts])
    hasher = hashlib.sha256(repr([source.name for source in data]).encode())
    for array in (numbers, tokens, *([] if nbytes is None else [nbytes])):
        hasher.update(repr(array.shape).encode() + array.astype("<i8", copy=False).tobytes())
    return HeldOut(tuple(source.name for source in data), numbers, tokens, nbytes, hasher.hexdigest())


def _read(source: DataSource, cut: Cut, tokenizer: Any) -> tuple[Tokens, Tokens | None]:
    """The blocks of a source, and the bytes of each block's predicted tokens."""
    path, length = source.path, cut.sequence_length
    if not path.is_file():
        what = "is a folder, a pipe or a device, and a file is needed" if path.exists() else "does not exist"
        raise EvaluationError(f"the held-out data {path} {what}.")
    is_text = path.suffix in TEXT_SUFFIXES
    bytes_each: Tokens | None = None
    if cut.tokenizer == BYTES:
        stream = open_text_bytes(path) if is_text else open_tokens(path, "uint8")
    elif not is_text:
        stream = open_tokens(path, cut.token_dtype)
    elif tokenizer is None:
        raise EvaluationError(f"{path} is text; say by `tokenizer` what makes tokens of it: a folder, or `{BYTES}`.")
    else:
        stream, bytes_each = tokenize(path, tokenizer, cut.blocks * length + 1)
    count = (len(stream) - 1) // length
    if count < 1:
        raise EvaluationError(
            f"the held-out data {path} have {len(stream)} tokens; a block of `sequence_length` {length} needs "
            f"{length + 1}. Give more data, or a smaller `sequence_length`."
        )
    taken = min(count, cut.blocks)
    starts = np.arange(taken) * count // taken * length
    blocks = np.stack([stream[start : start + length + 1] for start in starts]).astype(np.int64)
    if int(blocks.min()) < 0 or int(blocks.max()) > MOST_TOKEN:
        value = int(blocks.min()) if int(blocks.min()) < 0 else int(blocks.max())
        raise EvaluationError(f"{path} holds the value {value}, which is no token. Is `token_dtype` right?")
    if bytes_each is not None:
        return blocks, np.array([int(bytes_each[start + 1 : start + length + 1].sum()) for start in starts])
    return blocks, _bytes_of(path, blocks, cut, tokenizer)


def _bytes_of(path: Path, blocks: Tokens, cut: Cut, tokenizer: Any) -> Tokens | None:
    """The bytes of each block's predicted tokens, as their tokenizer tells."""
    if cut.tokenizer == BYTES:
        return np.full(len(blocks), cut.sequence_length, np.int64)
    if tokenizer is None:
        return None
    table = bytes_of_tokens(tokenizer)
    if int(blocks.max()) >= len(table):
        raise EvaluationError(
            f"{path} holds token {int(blocks.max())}, and the tokenizer {cut.tokenizer} has {len(table)} tokens. "
            "Give the tokenizer that made the file, or none."
        )
    sums: Tokens = table[blocks[:, 1:]].sum(axis=1)
    return sums

"""Held-out text: documents of .txt, .jsonl and .parquet files, made into tokens by a tokenizer.

Documents are read in order until there are enough tokens. Behind each stands the tokenizer's end of text, if it has
one. The bytes of a token are those of the text that it adds, so their sum over a document is the document's length.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from wsm_ds.errors import EvaluationError, few
from wsm_ds.evaluation.token_files import Tokens

BYTES = "bytes"
"""The tokenizer whose tokens are the bytes of the text."""
TEXT_SUFFIXES = (".txt", ".text", ".md", ".jsonl", ".parquet")
FIELD = "text"
"""The column, or the key of a line, that holds a document."""
PIECE_CHARACTERS = 1 << 16
"""A .txt file is one document; a tokenizer gets it in pieces of about this length, cut after line breaks."""
MOST_LINE_BYTES = 1 << 26


def open_text_bytes(path: Path) -> Tokens:
    """A text whose bytes are its tokens, mapped into memory.

    Args:
        path: a text; of a .jsonl or .parquet file its documents, each with a line break behind it.

    Returns:
        uint8, shape [bytes].
    """
    if path.suffix in (".jsonl", ".parquet"):
        joined = "".join(f"{text}\n" for text in documents(path))
        return np.frombuffer(joined.encode(), np.uint8)
    if not path.stat().st_size:
        return np.zeros(0, np.uint8)
    return np.memmap(path, np.uint8, mode="r")


def documents(path: Path) -> Iterator[str]:
    """The documents of a file in order, or the pieces of its only one.

    Raises:
        EvaluationError: the file is not what its name says; names it and the line.
    """
    try:
        if path.suffix == ".jsonl":
            yield from _lines(path)
        elif path.suffix == ".parquet":
            yield from _rows(path)
        else:
            yield from _pieces(path)
    except (OSError, UnicodeDecodeError) as error:
        raise EvaluationError(f"{path} cannot be read as text: {error}.") from error


def _lines(path: Path) -> Iterator[str]:
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(iter(lambda: file.readline(MOST_LINE_BYTES), ""), 1):
            if not line.strip():
                continue
            try:
                text = json.loads(line)[FIELD]
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                raise EvaluationError(f'{path}, line {number}: expected an object with "{FIELD}".') from error
            if not isinstance(text, str):
                raise EvaluationError(f'{path}, line {number}: "{FIELD}" must be a text.')
            yield text


def _rows(path: Path) -> Iterator[str]:
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise EvaluationError(f"{path} needs pyarrow: pip install pyarrow, or give a .jsonl file.") from error
    try:
        file = parquet.ParquetFile(path)
    except ValueError as error:  # pyarrow's ArrowInvalid is one
        raise EvaluationError(f"{path} cannot be read as text: {error}.") from error
    if FIELD not in file.schema_arrow.names:
        raise EvaluationError(f'{path} has no column "{FIELD}", but {few(file.schema_arrow.names)}.')
    for batch in file.iter_batches(columns=[FIELD]):
        yield from (text for text in batch.column(0).to_pylist() if text)


def _pieces(path: Path) -> Iterator[str]:
    with path.open(encoding="utf-8", newline="") as file:
        while lines := file.readlines(PIECE_CHARACTERS):
            yield "".join(lines)


def load_tokenizer(name: str) -> Any:
    """A tokenizer of the transformers library that says which characters a token stands for.

    Args:
        name: a folder with tokenizer.json.

    Raises:
        EvaluationError: it cannot be loaded, or is not a fast tokenizer.
    """
    folder = Path(name)
    if not folder.is_dir():
        raise EvaluationError(f"the tokenizer {name} is not a folder. Give one with tokenizer.json, or `{BYTES}`.")
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise EvaluationError("a tokenizer needs transformers: pip install 'wsm_ds[evaluate]'.") from error
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # of whatever the folder's files make transformers do
        raise EvaluationError(f"the tokenizer in {folder} cannot be loaded: {error}") from error
    if not tokenizer.is_fast:
        raise EvaluationError(f"the tokenizer in {folder} has no tokenizer.json, which tells the bytes of a token.")
    return tokenizer


def tokenize(path: Path, tokenizer: Any, most_tokens: int) -> tuple[Tokens, Tokens]:
    """The first tokens of a file of text, and how many bytes of the text each adds.

    Args:
        path: the file.
        tokenizer: of `load_tokenizer`.
        most_tokens: the number of tokens that are enough.

    Returns:
        (tokens as int64, bytes as int64), both of shape [tokens], `most_tokens` at most.
    """
    tokens: list[int] = []
    nbytes: list[int] = []
    end = tokenizer.eos_token_id if path.suffix in (".jsonl", ".parquet") else None
    for text in documents(path):
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        tokens += encoded["input_ids"]
        nbytes += _bytes_added(text, encoded["offset_mapping"])
        if end is not None:
            tokens.append(end)
            nbytes.append(0)
        if len(tokens) >= most_tokens:
            break
    return np.array(tokens[:most_tokens], np.int64), np.array(nbytes[:most_tokens], np.int64)


def _bytes_added(text: str, spans: list[tuple[int, int]]) -> list[int]:
    """The bytes that each token adds: a character of several tokens counts for its first, a dropped one for the next.

    >>> _bytes_added("é a", [(0, 1), (0, 1), (2, 3)])
    [2, 0, 2]
    """
    added, reached = [], 0
    for _, end in spans:
        added.append(len(text[reached:end].encode(errors="surrogatepass")) if end > reached else 0)
        reached = max(reached, end)
    return added

"""Held-out sets: which blocks are taken, the bytes of their text, and what is refused before anything is measured."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made_tokenizers import TEXT, save_byte_fallback, save_byte_level

from wsm_ds.errors import EvaluationError, RecipeError
from wsm_ds.evaluation.held_out import Cut, DataSource, HeldOut, parse_source, read_held_out
from wsm_ds.evaluation.token_bytes import bytes_of_tokens


def tokens_file(path: Path, count: int, first: int = 100) -> Path:
    path.write_bytes(np.arange(first, first + count).astype("<u2").tobytes())
    return path


def read(path: Path, length: int, blocks: int, **cut: Any) -> HeldOut:
    return read_held_out((DataSource(name="held", path=path),), Cut(length, blocks, **cut))


def test_blocks_follow_each_other_and_share_the_token_between_them(tmp_path: Path) -> None:
    held_out = read(tokens_file(tmp_path / "held.bin", 14), 4, 100)
    assert held_out.tokens.tolist() == [
        [100, 101, 102, 103, 104],
        [104, 105, 106, 107, 108],
        [108, 109, 110, 111, 112],
    ]
    assert held_out.nbytes is None


def test_fewer_blocks_than_there_are_lie_at_equal_distances(tmp_path: Path) -> None:
    path = tokens_file(tmp_path / "held.bin", 1 + 4 * 100)
    assert (read(path, 4, 5).tokens[:, 0] - 100).tolist() == [0, 80, 160, 240, 320]


def test_the_digest_tells_the_tokens_and_not_the_path(tmp_path: Path) -> None:
    paths = [tokens_file(tmp_path / name, 14) for name in ("held.bin", "copy.bin")]
    other = tokens_file(tmp_path / "other.bin", 14, first=101)
    first, copy, different = (read(path, 4, 3).digest for path in (*paths, other))
    assert first == copy != different
    assert first != read(paths[0], 6, 3).digest != read(paths[0], 4, 2).digest


def test_sources_stand_one_after_the_other(tmp_path: Path) -> None:
    data = tuple(
        DataSource(name=name, path=tokens_file(tmp_path / name, count)) for name, count in (("a", 9), ("b", 5))
    )
    held_out = read_held_out(data, Cut(4, 8))
    assert held_out.sources == ("a", "b")
    assert held_out.source.tolist() == [0, 0, 1]


def test_bytes_are_the_tokens_of_a_text(tmp_path: Path) -> None:
    path = tmp_path / "held.txt"
    path.write_text("abcdefghi")
    held_out = read(path, 4, 8, tokenizer="bytes")
    assert held_out.tokens.tolist() == [list(b"abcde"), list(b"efghi")]
    assert held_out.nbytes is not None
    assert held_out.nbytes.tolist() == [4, 4]
    lines = tmp_path / "held.jsonl"
    lines.write_text('{"text": "abcd"}\n\n{"text": "fgh"}\n')
    assert read(lines, 8, 8, tokenizer="bytes").tokens.tolist() == [list(b"abcd\nfgh\n")]


@pytest.mark.parametrize("save", [save_byte_level, save_byte_fallback])
def test_bytes_of_tokens_add_up_to_those_of_the_text(tmp_path: Path, save: Callable[[Path], Any]) -> None:
    tokenizer = save(tmp_path / "tokenizer")
    path = tmp_path / "held.jsonl"
    path.write_text(json.dumps({"text": TEXT}) + "\n" + json.dumps({"text": TEXT}) + "\n")
    ids = tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    length = 2 * len(ids) + 1  # and the end of the first text
    held_out = read(path, length, 1, tokenizer=str(tmp_path / "tokenizer"))
    assert held_out.tokens.tolist() == [[*ids, 0, *ids, 0]]
    table = bytes_of_tokens(tokenizer)
    first = int(table[ids[0]])
    assert held_out.nbytes is not None
    assert held_out.nbytes.tolist() == [2 * len(TEXT.encode()) - first]
    assert int(table[ids].sum()) == len(TEXT.encode())
    assert table[0] == 0
    # The same tokens as a bare file give the same bytes.
    bare = tmp_path / "held.bin"
    bare.write_bytes(held_out.tokens.astype("<u2").tobytes())
    again = read(bare, length, 1, tokenizer=str(tmp_path / "tokenizer"))
    assert again.digest == held_out.digest


def test_a_long_text_is_read_only_as_far_as_it_is_needed(tmp_path: Path) -> None:
    save_byte_level(tmp_path / "tokenizer")
    path = tmp_path / "held.jsonl"
    path.write_text(json.dumps({"text": TEXT}) + "\nthis line is no JSON\n")
    assert len(read(path, 8, 2, tokenizer=str(tmp_path / "tokenizer")).tokens) == 2
    with pytest.raises(EvaluationError, match=r"held.jsonl, line 2: expected an object"):
        read(path, 8, 1000, tokenizer=str(tmp_path / "tokenizer"))


def test_parquet_is_read_like_lines_of_json(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    lines, table = tmp_path / "held.jsonl", tmp_path / "held.parquet"
    lines.write_text("".join(json.dumps({"text": text}) + "\n" for text in (TEXT, TEXT[::-1])))
    parquet.write_table(pyarrow.table({"id": [1, 2], "text": [TEXT, TEXT[::-1]]}), table)
    save_byte_level(tmp_path / "tokenizer")
    for tokenizer in ("bytes", str(tmp_path / "tokenizer")):
        assert read(table, 8, 100, tokenizer=tokenizer).digest == read(lines, 8, 100, tokenizer=tokenizer).digest
    parquet.write_table(pyarrow.table({"content": ["a"]}), table)
    with pytest.raises(EvaluationError, match=r'held.parquet has no column "text", but content'):
        read(table, 4, 1, tokenizer="bytes")
    table.write_bytes(b"PAR1 no parquet")
    with pytest.raises(EvaluationError, match=r"held.parquet cannot be read as text"):
        read(table, 4, 1, tokenizer="bytes")


def test_what_cannot_be_used_is_named(tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match=r"none.bin does not exist"):
        read(tmp_path / "none.bin", 4, 1)
    with pytest.raises(EvaluationError, match="is a folder"):
        read(tmp_path, 4, 1)
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(EvaluationError, match=r"empty.txt have 0 tokens"):
        read(tmp_path / "empty.txt", 4, 1, tokenizer="bytes")
    with pytest.raises(EvaluationError, match=r"short.bin have 4 tokens; a block of `sequence_length` 4 needs 5"):
        read(tokens_file(tmp_path / "short.bin", 4), 4, 1)
    (tmp_path / "held.txt").write_text("a text")
    with pytest.raises(EvaluationError, match=r"held.txt is text; say by `tokenizer`"):
        read(tmp_path / "held.txt", 4, 1)
    with pytest.raises(EvaluationError, match="is not a folder"):
        read(tmp_path / "held.txt", 4, 1, tokenizer=str(tmp_path / "missing"))
    (tmp_path / "list.jsonl").write_text("[1]\n")
    save_byte_level(tmp_path / "tokenizer")
    with pytest.raises(EvaluationError, match=r"list.jsonl, line 1"):
        read(tmp_path / "list.jsonl", 4, 1, tokenizer=str(tmp_path / "tokenizer"))
    with pytest.raises(EvaluationError, match=r"high.bin holds token 60012, and the tokenizer .* has 300 tokens"):
        read(tokens_file(tmp_path / "high.bin", 14, 60000), 4, 3, tokenizer=str(tmp_path / "tokenizer"))
    np.save(tmp_path / "negative.npy", np.full(9, -3))
    with pytest.raises(EvaluationError, match="the value -3, which is no token"):
        read(tmp_path / "negative.npy", 4, 1)
    same = tuple(DataSource(name="held", path=tmp_path / "held.txt") for _ in range(2))
    with pytest.raises(RecipeError, match="two held-out sources have the name held"):
        read_held_out(same, Cut(4, 1, "bytes"))


def test_a_source_is_named_and_weighted_in_one_word(tmp_path: Path) -> None:
    def parts(text: str) -> tuple[str, str, float | None]:
        source = parse_source(text)
        return source.name, str(source.path), source.weight

    assert parts("data/held_out.bin") == ("held_out", "data/held_out.bin", None)
    assert parts("web=data/held.bin@0.25") == ("web", "data/held.bin", 0.25)
    assert parts("a@b/held.bin") == ("held", "a@b/held.bin", None)
    odd = tmp_path / "x=held.bin@2"
    odd.write_bytes(b"")
    assert parts(str(odd)) == ("x-held", str(odd), None)
    with pytest.raises(RecipeError, match="weight must be above 0"):
        parse_source("held.bin@0")

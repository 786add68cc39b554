"""Which samples make a batch depends on the seed and their numbers alone."""

from pathlib import Path

import numpy as np
import pytest
from lazy import tokens as launch_tokens


@pytest.mark.parametrize("count", [1, 2, 3, 10, 64, 1000])
def test_an_epoch_is_a_permutation(count: int) -> None:
    assert sorted(launch_tokens.shuffled(index, count, key=5) for index in range(count)) == list(range(count))


def test_seeds_and_epochs_order_the_windows_differently() -> None:
    orders = {tuple(launch_tokens.shuffled(index, 50, key) for index in range(50)) for key in range(20)}
    assert len(orders) == 20


def test_every_window_is_used_once_an_epoch_and_batches_may_be_cut_anywhere() -> None:
    tokens = np.arange(101, dtype=np.uint16)
    samples = launch_tokens.Samples(tokens, context=10, vocabulary=101, seed=3)
    first = samples.batch(range(10))
    assert sorted(first[:, 0].tolist()) == list(range(0, 100, 10))
    assert (first[:, 1:] == first[:, :-1] + 1).all()
    second = samples.batch(range(10, 20))
    assert sorted(second[:, 0].tolist()) == list(range(0, 100, 10))
    assert second.tolist() != first.tolist()
    assert samples.batch(range(8, 12)).tolist() == first[8:].tolist() + second[:2].tolist()


def test_binary_files_are_mapped_and_text_is_bytes(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    np.arange(7, dtype="<u2").tofile(path)
    assert isinstance(launch_tokens.open_tokens(path, 65536), np.memmap)
    assert launch_tokens.open_tokens(path, 65536).tolist() == list(range(7))
    with pytest.raises(SystemExit, match="14 bytes are not a whole number of uint32 tokens"):
        launch_tokens.open_tokens(path, 65537)
    np.arange(70000, 70003, dtype="<u4").tofile(path)
    assert launch_tokens.open_tokens(tmp_path, 100000).tolist() == [70000, 70001, 70002]
    path.unlink()
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub/b.txt").write_text("B")
    (tmp_path / "a.txt").write_text("A")
    assert launch_tokens.open_tokens(tmp_path, 256).tobytes() == b"AB"


def test_data_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="there is no file"):
        launch_tokens.open_tokens(tmp_path, 256)
    with pytest.raises(SystemExit, match="3 tokens; one sample needs 11"):
        launch_tokens.Samples(np.zeros(3, np.uint8), context=10, vocabulary=256, seed=0)
    samples = launch_tokens.Samples(np.full(20, 300, np.uint16), context=10, vocabulary=256, seed=0)
    with pytest.raises(SystemExit, match="holds token 300, but --vocabulary is 256"):
        samples.batch(range(1))

import threading
import time
from collections.abc import Callable

import pytest

from wsm_ds.filesystem.read_ahead import THREADS, read_ahead, reading_threads


def recorded(seen: list[str], delay_s: float, broken: int = -1) -> Callable[[int], int]:
    def read(item: int) -> int:
        seen.append(threading.current_thread().name)
        time.sleep(delay_s)
        if item == broken:
            raise OSError(f"item {item}")
        return 10 * item

    return read


def test_slow_things_are_read_by_threads_and_come_in_their_order() -> None:
    seen: list[str] = []
    assert list(read_ahead(recorded(seen, 0.003), range(60))) == [10 * item for item in range(60)]
    assert 2 < len(set(seen)) <= 1 + THREADS
    assert seen[0] == threading.current_thread().name


def test_quick_things_are_read_by_the_caller() -> None:
    assert list(read_ahead(lambda item: threading.current_thread().name, [1])) == [threading.current_thread().name]


@pytest.mark.parametrize("delay_s", [0, 0.003])
def test_an_error_comes_in_the_place_of_its_item(delay_s: float) -> None:
    results = []
    with pytest.raises(OSError, match="item 70"):
        for result in read_ahead(recorded([], delay_s, broken=70), range(200)):
            results.append(result)
    assert results == [10 * item for item in range(70)]


def test_threads_are_used_again_and_not_shut_down() -> None:
    seen: list[str] = []
    with reading_threads() as threads:
        for _ in range(3):
            assert list(read_ahead(recorded(seen, 0.003), range(30), threads)) == [10 * item for item in range(30)]
    assert len(set(seen)) <= 1 + THREADS


def test_at_most_a_bounded_number_of_things_is_read_ahead() -> None:
    seen: list[str] = []
    results = read_ahead(recorded(seen, 0.003), range(10_000))
    next(results)
    next(results)
    time.sleep(0.2)
    assert len(seen) < 500
    results.close()  # type: ignore[attr-defined]

"""Does many small things at once: a network file system answers each question after milliseconds.

What is in the page cache is read in microseconds. Handing it from thread to thread would cost more than that. So the
first things are read by the caller, and by threads as soon as an answer takes long.
"""

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from itertools import islice
from typing import TypeVar

THREADS = 32
BATCH = 4
"""Things that a thread reads before it hands them over."""
BATCHES_AHEAD = 40
SLOW_S, LOST_S = 0.0005, 0.002
"""Seconds for one thing that is not in memory, and seconds lost with such things that show that threads are needed."""
Item = TypeVar("Item")
Result = TypeVar("Result")


def reading_threads() -> ThreadPoolExecutor:
    """Threads for many calls of `read_ahead`. They start when they are first needed. The caller shuts them down."""
    return ThreadPoolExecutor(THREADS, "read-ahead")


def read_ahead(
    read: Callable[[Item], Result], items: Iterable[Item], threads: ThreadPoolExecutor | None = None
) -> Iterator[Result]:
    """Yields the result of `read` for each item, in their order. If reading is slow, threads read the next ones.

    At most BATCHES_AHEAD * BATCH results wait. An error comes in the place of its item.

    Args:
        read: waits for a file system, to read, to write or to ask. It is called by several threads.
        items: what to read.
        threads: those of `reading_threads`; None: threads of this call alone. `read` must not wait for another read
            that the same threads do.
    """
    remaining, lost_s = iter(items), 0.0
    for item in remaining:
        begun_s = time.perf_counter()
        result = read(item)
        took_s = time.perf_counter() - begun_s
        yield result
        lost_s += took_s if took_s > SLOW_S else 0
        if lost_s > LOST_S:
            break
    first, second = list(islice(remaining, BATCH)), list(islice(remaining, BATCH))
    if not second:
        yield from map(read, first)
        return
    with reading_threads() if threads is None else nullcontext(threads) as pool:
        pending: deque[Future[tuple[list[Result], Exception | None]]] = deque(
            pool.submit(_read_all, read, batch) for batch in (first, second)
        )
        try:
            while pending:
                while len(pending) < BATCHES_AHEAD and (batch := list(islice(remaining, BATCH))):
                    pending.append(pool.submit(_read_all, read, batch))
                results, error = pending.popleft().result()
                yield from results
                if error is not None:
                    raise error
        finally:
            for future in pending:
                future.cancel()


def _read_all(read: Callable[[Item], Result], batch: list[Item]) -> tuple[list[Result], Exception | None]:
    """The results before the first error, and the error."""
    results: list[Result] = []
    try:
        for item in batch:
            results.append(read(item))
    except Exception as error:
        return results, error
    return results, None

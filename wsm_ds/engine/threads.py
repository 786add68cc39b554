"""The threads of one process."""

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from wsm_ds.engine import arithmetic
from wsm_ds.engine.reader import Reader
from wsm_ds.engine.staged_files import StagedFiles
from wsm_ds.engine.tasks import Task
from wsm_ds.engine.timings import Timings
from wsm_ds.engine.worker import Worker
from wsm_ds.engine.writer import Writer
from wsm_ds.errors import BudgetTooSmall
from wsm_ds.planning.plan import Plan

MIN_SLICE_NUMEL, MAX_SLICE_NUMEL = 4096, 1 << 18
WORKER_BYTES = 1 << 20
"""What a worker needs besides its slices: buffers for reading blocks again, open files."""


@dataclass(frozen=True)
class Workers:
    """How many threads, and how many elements each takes at a time."""

    threads: int
    slice_numel: int


def workers_for(plan: Plan, memory_bytes: int, threads: int) -> Workers:
    """As many threads as asked for and as the budget holds.

    Args:
        plan: what matters of it is how many sources and targets a stream has at most.
        memory_bytes: of all threads together.
        threads: wanted.

    Raises:
        BudgetTooSmall: the budget does not hold one worker; the message has the least that does.
    """
    sources = max((len(stream.sources) for stream in plan.streams), default=1)
    targets = max((len(stream.targets) for stream in plan.streams), default=1)
    per_element = 8 * sources + 12 * targets + 2 * arithmetic.SCRATCH_BYTES_PER_ELEMENT
    own = WORKER_BYTES + arithmetic.SCRATCH_BYTES
    least = own + MIN_SLICE_NUMEL * per_element
    if memory_bytes < least:
        raise BudgetTooSmall(f"a memory budget of {memory_bytes} bytes is too small; the least is {least} bytes.")
    count = max(1, min(threads, memory_bytes // least))
    numel = (memory_bytes // count - own) // per_element
    return Workers(count, int(min(numel, MAX_SLICE_NUMEL)))


def run_tasks(
    plan: Plan,
    tasks: Sequence[Task],
    files: StagedFiles,
    workers: Workers,
    on_bytes: Callable[[int], None] = lambda nbytes: None,
    check: Callable[[], None] = lambda: None,
) -> Timings:
    """Runs tasks on threads; the first error stops all of them and is raised.

    Args:
        plan: the whole plan.
        tasks: those of this process.
        files: created and opened.
        workers: see `workers_for`.
        on_bytes: gets the bytes read and written of each finished task; called by one thread at a time.
        check: called every now and then; an error it raises stops the work.

    Raises:
        NonFiniteValue: a source holds a NaN or an infinity (file and tensor named), or fp16 overflows.
        LayoutMismatch: a frozen tensor differs between sources.
        BrokenCheckpoint: a source ended early or vanished.
        OSError: the disk is full, or a file cannot be read or written.
    """
    lock, stop = threading.Lock(), threading.Event()
    errors: list[BaseException] = []
    warned: set[str] = set()
    total = Timings()
    pending = iter(tasks)

    def work() -> None:
        timings = Timings()
        try:
            with Reader(plan.inputs) as reader, Writer(files, timings) as writer:
                worker = Worker(plan, reader, writer, workers.slice_numel, warned, timings)
                while not stop.is_set():
                    with lock:
                        task = next(pending, None)
                    if task is None:
                        break
                    if not files.is_done(task):
                        worker.run(task, stop.is_set)
                    with lock:
                        on_bytes(task.nbytes)
        except BaseException as error:
            errors.append(error)
            stop.set()
        with lock:
            total.add(timings)

    def sync() -> None:
        try:
            files.sync_early(stop)
        except BaseException as error:  # a write that the kernel had put off has failed: told once, and only here
            errors.append(error)
            stop.set()

    threads = [threading.Thread(target=work, name=f"merge-{n}") for n in range(workers.threads)]
    syncing = threading.Thread(target=sync, name="sync")
    for thread in [*threads, syncing]:
        thread.start()
    try:
        for thread in threads:
            while thread.is_alive():
                thread.join(0.2)
                check()
    finally:
        stop.set()
        for thread in [*threads, syncing]:
            thread.join()
    if errors:
        raise errors[0]
    return total

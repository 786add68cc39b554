"""The threads of one process: how many fit into the memory budget, and how they run the tasks."""

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from wsm_ds.dtypes import IS_COMPLEX
from wsm_ds.engine import arithmetic
from wsm_ds.engine.open_files import FEWEST_OPEN, File, OpenFiles, free_descriptors, most_open, raise_limit
from wsm_ds.engine.reader import Reader, open_input
from wsm_ds.engine.source_crcs import SourceCrcs
from wsm_ds.engine.staged_files import StagedFiles
from wsm_ds.engine.tasks import Task
from wsm_ds.engine.timings import Timings
from wsm_ds.engine.worker import Sink, Worker
from wsm_ds.engine.writer import Writer, open_output
from wsm_ds.errors import BudgetTooSmall, InsufficientCapacity
from wsm_ds.planning.plan import Plan

MIN_SLICE_NUMEL, MAX_SLICE_NUMEL = 4096, 1 << 18
WORKER_BYTES = 1 << 20
"""What a worker needs besides its slices: buffers for reading blocks again, open files."""
CHECK_INTERVAL_S = 0.2


@dataclass(frozen=True)
class Workers:
    """How a process divides its memory budget.

    Attributes:
        threads: number of threads, each with one worker.
        slice_numel: most elements of a slice.
    """

    threads: int
    slice_numel: int


def workers_for(plan: Plan, memory_bytes: int, threads: int) -> Workers:
    """Finds how many threads, and slices of which size, fit into the memory budget.

    Args:
        plan: gives the largest number of sources and of targets of a stream.
        memory_bytes: the budget of all threads together.
        threads: number of threads that the user asks for. It is reduced if the budget is too small for them.

    Raises:
        BudgetTooSmall: the budget is too small for one thread; the message gives the least that is enough.
    """
    sources = max((len(stream.sources) for stream in plan.streams), default=1)
    targets = max((len(stream.targets) for stream in plan.streams), default=1)
    # An element has at most 8 bytes in a source; in a target 8 as it is stored, and 4 in the float32 sum.
    bytes_per_value = 8 * sources + 12 * targets + 2 * arithmetic.SCRATCH_BYTES_PER_ELEMENT
    has_complex = any(IS_COMPLEX[t.places.dtypes].any() for stream in plan.streams for t in stream.targets)
    bytes_per_element = 2 * bytes_per_value if has_complex else bytes_per_value
    fixed_bytes = WORKER_BYTES + arithmetic.SCRATCH_BYTES
    least_bytes = fixed_bytes + MIN_SLICE_NUMEL * bytes_per_element
    if memory_bytes < least_bytes:
        raise BudgetTooSmall(f"a memory budget of {memory_bytes} bytes is too small; the least is {least_bytes} bytes.")
    count = max(1, min(threads, memory_bytes // least_bytes))
    numel = (memory_bytes // count - fixed_bytes) // bytes_per_element
    return Workers(count, int(min(numel, MAX_SLICE_NUMEL)))


def run_tasks(
    plan: Plan,
    tasks: Sequence[Task],
    files: StagedFiles,
    workers: Workers,
    on_bytes: Callable[[int], None] = lambda nbytes: None,
    check: Callable[[], None] = lambda: None,
) -> Timings:
    """Runs tasks on threads. The first error stops all threads and is raised.

    Args:
        plan: the whole plan.
        tasks: those of this process.
        files: open staged files.
        workers: see `workers_for`.
        on_bytes: called with the bytes that a finished task has read and written, by one thread at a time.
        check: called several times a second. An error that it raises stops the work.

    Returns:
        The seconds of all threads together.

    Raises:
        NonFiniteValue: a source holds a NaN or an infinity (the message names file and tensor), or a sum does not fit
            the dtype of the output.
        LayoutMismatch: a frozen tensor differs between sources; the message names it.
        BrokenCheckpoint: a source is gone, ends too early, or has a wrong CRC-32; the message names it.
        InsufficientCapacity: the system starts no more threads.
        OSError: the disk is full, or a file cannot be read or written.
    """
    raise_limit()
    workers = replace(workers, threads=min(workers.threads, max(1, free_descriptors() // FEWEST_OPEN)))

    def open_file(file: File) -> int:
        return open_input(plan.inputs, file) if file.use == "input" else open_output(files, file)

    with OpenFiles(open_file, most_open(workers.threads)) as open_files:
        queue = _TaskQueue(plan, tasks, files, workers, on_bytes, open_files)
        _run_threads(queue, workers.threads, check)
        if queue.errors:
            raise queue.errors[0]
        queue.crcs.check_rest(queue.reader.read)
    return queue.timings


def _run_threads(queue: "_TaskQueue", count: int, check: Callable[[], None]) -> None:
    """Runs the threads of a queue until all tasks are done, or an error ends them."""
    worker_threads = [threading.Thread(target=queue.work, name=f"merge-{number}") for number in range(count)]
    all_threads = [*worker_threads, threading.Thread(target=queue.sync, name="sync")]
    try:
        for thread in all_threads:
            start_thread(thread)
        for thread in worker_threads:
            while thread.is_alive():
                # With a timeout: the main thread runs signal handlers only between its own bytecodes.
                thread.join(CHECK_INTERVAL_S)
                check()
    finally:
        queue.stop.set()
        for thread in all_threads:
            if thread.ident is not None:
                thread.join()


def start_thread(thread: threading.Thread) -> None:
    """Starts a thread.

    Raises:
        InsufficientCapacity: the system starts no more threads.
    """
    try:
        thread.start()
    except RuntimeError as error:  # CPython's `_threadmodule.c`: the system call has failed
        raise InsufficientCapacity(
            "the system starts no more threads: a limit on processes (ulimit -u), on memory (ulimit -v) or of a "
            "container is reached. Raise it, or take fewer threads (--threads 1)."
        ) from error


Work = Callable[[Callable[[], Iterator[Task]], Callable[[], bool]], None]
"""The body of a thread: it takes tasks from the iterator of the first argument, and asks the second one if it ends."""


def on_threads(tasks: Sequence[Task], threads: int, work: Work, check: Callable[[], None]) -> None:
    """Runs threads that share tasks and stage no files. The first error stops all of them and is raised.

    Args:
        tasks: those of this process.
        threads: most threads; there are no more than tasks.
        work: the body of each thread.
        check: called several times a second. An error that it raises stops the work.

    Raises:
        InsufficientCapacity: the system starts no more threads.
        Exception: what `work` or `check` raises.
    """
    remaining, lock, stop = iter(tasks), threading.Lock(), threading.Event()
    errors: list[BaseException] = []

    def take() -> Iterator[Task]:
        while not stop.is_set():
            with lock:
                task = next(remaining, None)
            if task is None:
                return
            yield task

    def run() -> None:
        try:
            work(take, stop.is_set)
        except BaseException as error:
            errors.append(error)
            stop.set()

    all_threads = [threading.Thread(target=run, name=f"work-{n}") for n in range(min(threads, len(tasks)))]
    try:
        for thread in all_threads:
            start_thread(thread)
        for thread in all_threads:
            while thread.is_alive():
                thread.join(CHECK_INTERVAL_S)  # with a timeout, so that a signal is handled
                check()
    finally:
        stop.set()
        for thread in all_threads:
            if thread.ident is not None:
                thread.join()
    if errors:
        raise errors[0]


def run_into(
    plan: Plan,
    tasks: Sequence[Task],
    sink: Sink,
    workers: Workers,
    already_reported: set[str],
    on_bytes: Callable[[int], None],
    check: Callable[[], None] = lambda: None,
) -> Timings:
    """Runs tasks on threads into a sink that needs no files. The first error stops all threads and is raised.

    Args:
        plan: the whole plan.
        tasks: those of this process.
        sink: takes the bytes of all threads, of several at the same time.
        workers: see `workers_for`.
        already_reported: see `Worker`.
        on_bytes: called with the bytes that a finished task has read and made, by one thread at a time.
        check: see `on_threads`.

    Returns:
        The seconds of all threads together.

    Raises:
        Exception: see `run_tasks`; and what the sink raises.
    """
    raise_limit()
    threads = min(workers.threads, max(1, free_descriptors() // FEWEST_OPEN))
    timings, lock = Timings(), threading.Lock()
    with OpenFiles(lambda file: open_input(plan.inputs, file), most_open(threads)) as files:
        reader, crcs = Reader(plan.inputs, files), SourceCrcs(plan.inputs)

        def work(take: Callable[[], Iterator[Task]], is_stopped: Callable[[], bool]) -> None:
            own = Timings()
            worker = Worker(plan, reader, sink, workers.slice_numel, already_reported, own, crcs)
            tasks_of_thread = take()
            task = next(tasks_of_thread, None)
            while task is not None:
                # Several sums of what is read take longer than the reading, and the disk shall not wait for them.
                following = next(tasks_of_thread, None)
                if following is not None:
                    worker.read_ahead(following)
                worker.run(task, is_stopped)
                with lock:
                    on_bytes(task.nbytes)
                task = following
            with lock:
                timings.add(own)

        on_threads(tasks, threads, work, check)
        crcs.check_rest(reader.read)
    return timings


class _TaskQueue:
    """What the threads of one `run_tasks` share: the remaining tasks, the errors, the seconds.

    Attributes:
        stop: set when there is an error or nothing more to do; every thread then ends.
        errors: in the order in which they happened.
        timings: the seconds of the threads that have ended.
    """

    def __init__(
        self,
        plan: Plan,
        tasks: Sequence[Task],
        files: StagedFiles,
        workers: Workers,
        on_bytes: Callable[[int], None],
        open_files: OpenFiles,
    ) -> None:
        self.plan, self.files, self.workers, self.on_bytes = plan, files, workers, on_bytes
        self.open_files, self.reader = open_files, Reader(plan.inputs, open_files)
        self.stop = threading.Event()
        self.errors: list[BaseException] = []
        self.timings = Timings()
        self.crcs = SourceCrcs(plan.inputs)
        self._tasks = iter(tasks)
        self._lock = threading.Lock()
        self._already_reported: set[str] = set()

    def work(self) -> None:
        """Runs tasks until none is left or `stop` is set. The body of a worker's thread."""
        timings = Timings()
        try:
            self._run_tasks(timings)
        except BaseException as error:
            self._fail(error)
        with self._lock:
            self.timings.add(timings)

    def sync(self) -> None:
        """Syncs files until `stop` is set. The body of the sync thread."""
        try:
            self.files.sync_early(self.stop)
        except BaseException as error:
            # Linux reports a failed delayed write to one fsync only (man 2 fsync, EIO). A later fsync would succeed.
            self._fail(error)

    def _run_tasks(self, timings: Timings) -> None:
        writer = Writer(self.files, self.open_files, timings)
        slice_numel = self.workers.slice_numel
        worker = Worker(self.plan, self.reader, writer, slice_numel, self._already_reported, timings, self.crcs)
        while not self.stop.is_set():
            with self._lock:
                task = next(self._tasks, None)
            if task is None:
                return
            for part in self.files.unfinished(task):
                worker.run(part, self.stop.is_set)
            with self._lock:
                self.on_bytes(task.nbytes)

    def _fail(self, error: BaseException) -> None:
        self.errors.append(error)
        self.stop.set()

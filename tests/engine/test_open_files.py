"""At most so many files are open, whatever the number of threads; and none afterwards."""

import os
import random
import resource
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path

import pytest

from wsm_ds.engine.open_files import File, OpenFiles, raise_limit


def is_open(descriptor: int) -> bool:
    try:
        os.fstat(descriptor)
    except OSError:
        return False
    return True


def files_in(folder: Path, count: int) -> list[File]:
    for number in range(count):
        (folder / f"{number}").write_text(f"{number}")
    return [File("input", number) for number in range(count)]


def opener(folder: Path, opens: Counter[File] | None = None) -> "OpenFilesOpener":
    return OpenFilesOpener(folder, opens if opens is not None else Counter())


class OpenFilesOpener:
    def __init__(self, folder: Path, opens: Counter[File]) -> None:
        self.folder, self.opens = folder, opens

    def __call__(self, file: File) -> int:
        self.opens[file] += 1
        return os.open(self.folder / f"{file.number}", os.O_RDONLY)


def content(pool: OpenFiles, *files: File) -> bytes:
    with pool.use(*files) as descriptors:
        return b"".join(os.pread(descriptor, 9, 0) for descriptor in descriptors)


def test_the_least_recently_used_file_is_closed_first_and_all_at_the_end(tmp_path: Path) -> None:
    opens: Counter[File] = Counter()
    first, second, third = files_in(tmp_path, 3)
    with OpenFiles(opener(tmp_path, opens), 2) as pool:
        assert content(pool, first, second, first) == b"010"
        assert content(pool, first) == b"0"
        assert content(pool, third) == b"2"  # closes the second
        assert content(pool, first) == b"0"
        assert opens == {first: 1, second: 1, third: 1}
        assert content(pool, second) == b"1"
        assert opens[second] == 2
        with pool.use(first, second) as descriptors:
            held = list(descriptors)
    assert not any(map(is_open, held))


def test_a_file_in_use_is_not_closed_and_others_wait_for_room(tmp_path: Path) -> None:
    first, second, third = files_in(tmp_path, 3)
    read: list[bytes] = []
    with OpenFiles(opener(tmp_path), 2) as pool:
        with pool.use(first, second) as descriptors:
            waiting = threading.Thread(target=lambda: read.append(content(pool, third)))
            waiting.start()
            waiting.join(0.2)
            assert waiting.is_alive()
            assert all(map(is_open, descriptors))
        waiting.join(10)
        assert read == [b"2"]


def test_many_threads_get_what_they_ask_for_within_the_limit(tmp_path: Path) -> None:
    files, limit, wrong = files_in(tmp_path, 40), 8, list[object]()
    before = len(list(Path("/proc/self/fd").iterdir()))

    def work(pool: OpenFiles, seed: int) -> None:
        rng = random.Random(seed)
        for _ in range(200):
            wanted = rng.choices(files, k=rng.randint(1, limit))
            with pool.use(*wanted) as descriptors:
                found = [os.pread(descriptor, 9, 0) for descriptor in descriptors]
                if found != [str(file.number).encode() for file in wanted]:
                    wrong.append(found)
                if len(list(Path("/proc/self/fd").iterdir())) > before + limit + 12:  # each listing has one of its own
                    wrong.append("too many")

    with OpenFiles(opener(tmp_path), limit) as pool:
        threads = [threading.Thread(target=work, args=(pool, seed)) for seed in range(12)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
    assert not any(thread.is_alive() for thread in threads)
    assert not wrong


def test_a_renewed_file_keeps_its_descriptor(tmp_path: Path) -> None:
    (file,) = files_in(tmp_path, 1)
    with OpenFiles(opener(tmp_path), 2) as pool, pool.use(file) as (descriptor,):
        (tmp_path / "new").write_text("new")
        (tmp_path / "new").rename(tmp_path / "0")
        assert os.pread(descriptor, 9, 0) == b"0"
        pool.renew(file)
        assert os.pread(descriptor, 9, 0) == b"new"


def test_a_file_that_cannot_be_opened_is_an_error_and_blocks_nobody(tmp_path: Path) -> None:
    (file,) = files_in(tmp_path, 1)
    with OpenFiles(opener(tmp_path), 1) as pool:
        with pytest.raises(FileNotFoundError, match="7"):
            content(pool, File("input", 7))
        assert content(pool, file) == b"0"


def test_the_soft_limit_is_raised_towards_the_hard_one() -> None:
    code = (
        "import resource; from wsm_ds.engine.open_files import raise_limit; "
        "resource.setrlimit(resource.RLIMIT_NOFILE, (100, 900)); raise_limit(); "
        "print(resource.getrlimit(resource.RLIMIT_NOFILE))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "(900, 900)"
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    raise_limit()
    assert resource.getrlimit(resource.RLIMIT_NOFILE)[1] == before[1]

"""The runs that `plan.py` measures with, and the time to read their metadata and do nothing else."""

import os
import subprocess
import sys
import time
import zipfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from benchmarks.counted import ROOT

INTERVAL = 100
"""Steps between two checkpoints of `many_ranks`."""
HEAD = 64
"""Bytes before the first record of a torch file, about."""


@dataclass(frozen=True)
class Run:
    """What `benchmarks.many_ranks` is to make.

    Attributes:
        kind: "zero2", "zero3" or "moe".
        ranks: number of ranks.
        checkpoints: how many.
        layers: of the model.
        hidden: its width.
        experts: of each layer.
        ep: expert-parallel ranks.
    """

    kind: str
    ranks: int
    checkpoints: int
    layers: int = 80
    hidden: int = 64
    experts: int = 0
    ep: int = 1

    @property
    def tensors(self) -> int:
        """Number of parameters, of a model without experts."""
        return 9 * self.layers + 3

    def make(self, folder: Path, forms: Path, *, all_real: bool = False) -> Path:
        """Makes the run, or the checkpoints that are missing.

        Args:
            folder: of all runs.
            forms: where DeepSpeed's runs of two ranks are kept.
            all_real: whether no file is a hard link to that of another rank.

        Returns:
            The run's folder.
        """
        words = (self.kind, self.ranks, self.layers, self.hidden, self.experts)
        run = folder / "-".join(map(str, (*words, "real") if all_real else words))
        if not (run / f"global_step{INTERVAL * self.checkpoints}").exists():
            command = [sys.executable, "-m", "benchmarks.many_ranks", str(run), "--kind", self.kind]
            for name in ("ranks", "layers", "hidden", "experts", "ep", "checkpoints"):
                command += [f"--{name}", str(getattr(self, name))]
            command += ["--all-real"] if all_real else []
            # In a process of its own: a command that this process starts counts its peak of memory as its own.
            subprocess.run([*command, "--forms", str(forms)], check=True, cwd=ROOT, stderr=subprocess.DEVNULL)
        return run


def tags(count: int) -> list[str]:
    """Returns the names of the first checkpoints of a run.

    Args:
        count: how many.
    """
    return [f"global_step{INTERVAL * number}" for number in range(1, count + 1)]


def reading_s(run: Path, names: list[str]) -> float:
    """Returns the processor seconds in which one thread reads the metadata of all files once: the limit.

    The metadata of a torch file are its pickle, at the file's beginning, and the zip's directory, at its end. The files
    of a kind have about as many bytes of both; one of them tells how many.

    Args:
        run: the run's folder.
        names: the checkpoints.
    """
    files = [
        (os.fspath(path), *_metadata_nbytes(_kind(path))) for name in names for path in sorted((run / name).iterdir())
    ]
    _metadata_nbytes.cache_clear()
    begun = time.process_time()
    for path, head, tail in files:
        descriptor = os.open(path, os.O_RDONLY)
        os.pread(descriptor, head, 0)
        os.pread(descriptor, tail, max(0, os.fstat(descriptor).st_size - tail))
        os.close(descriptor)
    return time.process_time() - begun


def _kind(path: Path) -> Path:
    """A file of the same kind in the same checkpoint: that of rank 1, if there is one."""
    stem = path.name.partition("rank_")[2].partition("_")[2]
    beginning = path.name.partition("rank_")[0]
    alike = path.with_name(f"{beginning}rank_1_{stem}")
    if path.name.startswith("layer_"):
        alike = path.with_name("layer_0_expert_0_mp_rank_00_model_states.pt")
    return alike if alike.exists() else path


@cache
def _metadata_nbytes(path: Path) -> tuple[int, int]:
    """Bytes at the beginning and at the end of a torch file that hold its pickle and its directory."""
    with zipfile.ZipFile(path) as file:
        (pickled,) = (info for info in file.infolist() if info.filename.endswith("/data.pkl"))
        return HEAD + pickled.file_size, path.stat().st_size - file.start_dir

"""A training run, played: checkpoints that DeepSpeed wrote are copied into a fresh folder as if it were saving them."""

import shutil
from pathlib import Path

from wsm_ds.layouts.frameworks import MANIFEST
from wsm_ds.publishing.staging_folder import STAGING
from wsm_ds.watching.kept_layouts import Fingerprint, fingerprint


class PlayedRun:
    """`folder` gets the checkpoints of `source`, whole or file by file."""

    def __init__(self, source: Path, folder: Path) -> None:
        self.source, self.folder = source, folder
        folder.mkdir(parents=True)

    def save(self, *steps: int) -> "PlayedRun":
        """Whole checkpoints, and `latest` after each."""
        for step in steps:
            shutil.copytree(self.source / f"global_step{step}", self.checkpoint(step), dirs_exist_ok=True)
            self.move_latest(step)
        return self

    def move_latest(self, step: int) -> None:
        (self.folder / "latest").write_text(f"global_step{step}")

    def checkpoint(self, step: int) -> Path:
        return self.folder / f"global_step{step}"

    def files(self, step: int) -> list[Path]:
        """A checkpoint's files in the source."""
        return sorted((self.source / f"global_step{step}").iterdir())

    def write(self, file: Path, nbytes: int | None = None) -> None:
        """One file of the source's, or its beginning."""
        place = self.checkpoint(int(file.parent.name.removeprefix("global_step"))) / file.name
        place.parent.mkdir(exist_ok=True)
        place.write_bytes(file.read_bytes()[:nbytes])

    def fingerprint(self) -> Fingerprint:
        """Everything in the run's folder."""
        return fingerprint(self.folder)


def contents(out: Path) -> dict[str, bytes]:
    """Every file of an output but the manifest, which has the time."""
    return {
        path.relative_to(out).as_posix(): path.read_bytes()
        for path in sorted(out.rglob("*"))
        if path.is_file() and path.name != MANIFEST
    }


def outputs(folder: Path) -> list[str]:
    """All finished outputs below a folder."""
    found = [path.parent.relative_to(folder).as_posix() for path in folder.rglob(MANIFEST)]
    return sorted(path for path in found if STAGING not in path)

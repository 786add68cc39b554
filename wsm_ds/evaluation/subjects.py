"""Which model an evaluation is about: what is in a folder, and what makes two folders the same model."""

import hashlib
import json
from pathlib import Path
from typing import Any

from wsm_ds.errors import CheckpointNotFound, EvaluationError
from wsm_ds.evaluation.evaluation import Subject, SubjectSource
from wsm_ds.layouts.frameworks import MANIFEST
from wsm_ds.layouts.run import find_checkpoints, is_checkpoint_folder
from wsm_ds.layouts.saved_step import saved_step
from wsm_ds.planning.recipe_options import StrPath
from wsm_ds.publishing.manifest import read_manifest

SAFETENSORS, CONFIG = "*.safetensors", "config.json"
WEIGHTS = (SAFETENSORS, "pytorch_model*.bin", "consolidated*.pth")
"""What programs may load; this package loads safetensors alone."""


def subject_of_folder(folder: StrPath, name: str | None = None) -> Subject:
    """What is measured when a folder is.

    Args:
        folder: a merge's output, a checkpoint in a run (RUN/global_step4000), or any other folder of weights.
        name: for people; None: the folder's name.

    Raises:
        EvaluationError: the folder does not exist, or holds no weights.
        BrokenCheckpoint: its files do not tell their step.
        VerificationFailed: its manifest is damaged.
    """
    resolved = Path(folder).resolve()
    if not resolved.is_dir():
        raise EvaluationError(f"{folder} is not a folder.")
    if (resolved / MANIFEST).is_file():
        return subject_of_manifest(read_manifest(resolved), resolved, name or resolved.name)
    checkpoint = None if files_of(resolved, *WEIGHTS) else checkpoint_in(resolved)
    if checkpoint is not None:
        source = SubjectSource(tag=checkpoint.name, step=saved_step(checkpoint), coefficient=1.0)
        return Subject(
            name=name or resolved.name,
            kind="checkpoint",
            identity=_hashed("checkpoint", files_of(checkpoint)),
            path=str(resolved),
            sources=(source,),
        )
    files = files_of(resolved, *WEIGHTS)
    if not files:
        inner = next((path for path in sorted(resolved.iterdir()) if path.is_dir() and checkpoint_in(path)), None)
        advice = f" It holds checkpoints; name one of them, such as {Path(folder) / inner.name}." if inner else ""
        raise EvaluationError(
            f"{folder} holds no weights: it is neither a merge, nor one checkpoint, nor a folder with *.safetensors."
            f"{advice}"
        )
    return Subject(
        name=name or resolved.name,
        kind="folder",
        identity=_hashed("folder", files + files_of(resolved, CONFIG)),
        path=str(resolved),
    )


def checkpoint_in(folder: Path) -> Path | None:
    """The DeepSpeed checkpoint in a folder: itself, or the only one below it, as in a framework's folder for one save.

    Args:
        folder: a checkpoint, a save of a framework (checkpoint-500), or a merge's output.
    """
    if is_checkpoint_folder(folder):
        return folder
    try:
        found = find_checkpoints(folder)
    except CheckpointNotFound:
        return None
    return found[0].path if len(found) == 1 else None


def subject_of_manifest(manifest: dict[str, Any], folder: Path, name: str) -> Subject:
    """The merge that a manifest describes.

    Args:
        manifest: as `read_manifest` gives it, or `publishing.manifest.description` for a merge that is not made yet.
        folder: of the merge, or of the run.
        name: for people.
    """
    sources = tuple(
        SubjectSource(tag=str(source["tag"]), step=int(source["step"]), coefficient=float(source["coefficient"]))
        for source in manifest["sources"]
    )
    identity = _hashed("merge", manifest["identity"])
    return Subject(name=name, kind="merge", identity=identity, path=str(folder), sources=sources)


def files_of(folder: Path, *patterns: str) -> list[list[Any]]:
    """Path, size and time of the files in a folder: they stand for the content, which would take long to read."""
    files = sorted(path for pattern in patterns or ("*",) for path in folder.glob(pattern) if path.is_file())
    return [[str(path), path.stat().st_size, path.stat().st_mtime_ns] for path in files]


def _hashed(*content: Any) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()

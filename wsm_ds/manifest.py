"""The manifest: what an output was made of and what it must hold. Its presence means that the output is whole."""

import datetime
import hashlib
import json
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from wsm_ds.engine import BLOCK_BYTES, Written
from wsm_ds.errors import VerificationFailed
from wsm_ds.plan import Plan
from wsm_ds.publish import MANIFEST

FORMAT = 1


def make_manifest(plan: Plan, written: tuple[Written, ...]) -> dict[str, Any]:
    """Plain data: recipe, sources with steps and coefficients, files with checksums, versions."""
    described = plan.to_json()
    return {
        "format": FORMAT,
        "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "versions": {name: _version(name) for name in ("wsm_ds", "numpy")},
        "recipe": plan.recipe,
        "curve": plan.curve,
        "sources": described["sources"],
        "effective_sample_size": plan.ess,
        "lag_steps": plan.lag_steps,
        "block_bytes": BLOCK_BYTES,
        "files": {w.name: {"bytes": w.nbytes, "sha256_of_blocks": w.sha256_of_blocks} for w in written}
        | {name: text_entry(text) for name, text in plan.texts.items()},
    }


def text_entry(text: str) -> dict[str, Any]:
    """The manifest's entry of a small text file."""
    data = text.encode()
    return {"bytes": len(data), "sha256_of_blocks": hashlib.sha256(hashlib.sha256(data).digest()).hexdigest()}


def read_manifest(out: Path) -> dict[str, Any]:
    """The manifest of a merged output.

    Raises:
        VerificationFailed: there is none, or it is not ours.
    """
    path = out / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise VerificationFailed(f"{out} has no {MANIFEST}: it is not a merge's output, or not whole.") from error
    except (OSError, ValueError) as error:
        raise VerificationFailed(f"{path} cannot be read: {error}") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise VerificationFailed(f"{path} is not a manifest of format {FORMAT}.")
    return manifest


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "unknown"

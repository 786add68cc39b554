"""Saves the random states of each rank in a file of the checkpoint, and restores them.

DeepSpeed saves none. Its client state cannot hold them: in stages 1 and 2 only rank 0 of the data-parallel ranks writes
it (`runtime/engine.py`, `_save_checkpoint`). The file is JSON, so that reading it executes nothing.
"""

import base64
import hashlib
import json
import random
from pathlib import Path
from typing import Any

import numpy as np

from wsm_ds.errors import BrokenCheckpoint
from wsm_ds.filesystem.small_files import read_small


def states_file(checkpoint: Path, rank: int) -> Path:
    """Returns the path of a rank's file."""
    return checkpoint / f"random_state_rank_{rank:05d}.json"


def random_states() -> dict[str, Any]:
    """Returns the states of Python, numpy, torch and the accelerator's device, as plain data."""
    import torch
    from deepspeed.accelerator import get_accelerator

    # Plain lists of numbers, not a pickle: whoever may write the file could otherwise run code.
    version, words, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    states: dict[str, Any] = {
        "python": [version, list(words), gauss],
        "numpy": [name, keys.tolist(), int(position), int(has_gauss), float(cached)],  # type: ignore[union-attr]
        "torch": _to_text(torch.get_rng_state()),
    }
    if get_accelerator().device_name() != "cpu":
        states[get_accelerator().device_name()] = _to_text(get_accelerator().get_rng_state())
    return states


def restore_random_states(states: dict[str, Any]) -> None:
    """Restores what `random_states` returned, on this process's device."""
    import torch
    from deepspeed.accelerator import get_accelerator

    version, words, gauss = states["python"]
    random.setstate((version, tuple(words), gauss))
    name, keys, *rest = states["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(_to_tensor(states["torch"]))
    device = get_accelerator().device_name()
    if device != "cpu" and device in states:
        get_accelerator().set_rng_state(_to_tensor(states[device]))


def seed_random_states(seed: int, step: int, rank: int) -> None:
    """Sets states that the run's seed, the step and the rank decide, for a rank that has no saved ones."""
    import torch

    number = int.from_bytes(hashlib.sha256(f"{seed} {step} {rank}".encode()).digest()[:8], "little")
    random.seed(number)
    np.random.seed(number % 2**32)
    torch.manual_seed(number % 2**63)  # the accelerator's devices too


def save_random_states(checkpoint: Path, rank: int) -> None:
    """Writes this rank's file into the folder of a checkpoint, which must exist.

    Ranks: all; each writes its own file.
    """
    states_file(checkpoint, rank).write_text(json.dumps(random_states()), encoding="utf-8")


def load_random_states(checkpoint: Path, rank: int) -> bool:
    """Restores this rank's states.

    Returns:
        False if the checkpoint has none for this rank.

    Raises:
        BrokenCheckpoint: the file is damaged.
    """
    path = states_file(checkpoint, rank)
    try:
        restore_random_states(json.loads(read_small(path)))
    except FileNotFoundError:
        return False
    except (ValueError, KeyError, TypeError, RuntimeError) as error:
        raise BrokenCheckpoint(f"{path} holds no random states: {error}") from error
    return True


def _to_text(state: Any) -> str:
    return base64.b64encode(state.cpu().numpy().tobytes()).decode()


def _to_tensor(text: str) -> Any:
    import torch

    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)

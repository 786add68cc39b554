"""DeepSpeed's native mixture of experts: names of experts, and the ranks that share them.

With expert-parallel degree e, rank r holds the experts of expert-parallel rank r mod e, under local numbers; ranks
with the same one cut their expert groups as data-parallel ranks r // e of W / e (`utils/groups.py`). Each expert's
16-bit weights have a file of their own, under global numbers (`runtime/engine.py:5080-5139`).
"""

import re
from collections.abc import Iterable
from typing import Any

from wsm_ds.errors import BrokenCheckpoint, UnsupportedLayout, few

EXPERT_FILE = re.compile(r"^layer_\d+_expert_\d+_mp_rank_(?P<mp>\d+)_model_states\.pt$")
EXPERT = re.compile(r"^(?P<layer>.*\.deepspeed_moe\.experts\.deepspeed_experts\.)(?P<number>\d+)(?P<rest>\..*)$")
GROUP_NAME = re.compile(r"ep_size_(\d+)$")


def expert_parallel_sizes(where: object, groups: Any) -> list[int]:
    """The expert-parallel degree of each parameter group: 1 for those that are no experts'.

    Raises:
        UnsupportedLayout: an expert group does not tell its degree.
    """
    sizes = []
    for group in groups:
        match = GROUP_NAME.search(str(group.get("name"))) if group.get("moe") else None
        if group.get("moe") and not match:
            raise UnsupportedLayout(f"{where}: the expert group {group.get('name')!r} does not name its degree.")
        sizes.append(int(match[1]) if match else 1)
    return sizes


def require_expert_files(where: object, found: list[str], model: Any) -> None:
    """Raises BrokenCheckpoint unless each expert of each layer that `model` counts, and no other, has its file."""
    counts = [int(count) for count in model.get("num_experts") or ()]
    names = [f"layer_{n}_expert_{e}_mp_rank_00_model_states.pt" for n, count in enumerate(counts) for e in range(count)]
    missing, foreign = sorted(set(names) - set(found)), sorted(set(found) - set(names))
    if missing:
        raise BrokenCheckpoint(f"{where} is incomplete: experts' files are missing: {few(missing)}.")
    if foreign:
        raise BrokenCheckpoint(f"{where} holds experts that its model has not ({few(foreign)}): of another save?")


def global_names(names: Iterable[str], expert_rank: int) -> dict[str, str]:
    """The model-wide name of each parameter as rank `expert_rank` of its expert-parallel group calls it."""
    matches = {name: EXPERT.match(name) for name in names}
    held: dict[str, int] = {}
    for match in matches.values():
        if match:
            held[match["layer"]] = max(held.get(match["layer"], 0), int(match["number"]) + 1)
    return {
        name: f"{m['layer']}{expert_rank * held[m['layer']] + int(m['number'])}{m['rest']}" if m else name
        for name, m in matches.items()
    }

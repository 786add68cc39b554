"""Finds the ranks that torchrun, deepspeed or srun have started, or a single process.

torch is imported only inside a training job, which has imported it before.
"""

import itertools
import math
import os
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass

from wsm_ds.distributed.meeting import HIGHEST_PORT, Patience, connected_store, roll_call
from wsm_ds.distributed.parent import STARTER
from wsm_ds.distributed.ranks import Ranks, StoreRanks
from wsm_ds.errors import RecipeError, brief

NEEDED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
ALONE = "To run this process alone, set WORLD_SIZE=1 for it (`WORLD_SIZE=1 wsm-ds …`)."
NAMING = ("MASTER_PORT", "TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT")
"""Variables that are the same for all ranks of a launch."""
LAUNCHERS = ("TORCHELASTIC_RUN_ID", "CROSS_RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK")
"""Variables of launchers that are the parent of their ranks and live as long: torchrun (torch's
`elastic/agent/server/local_elastic_agent.py`), deepspeed (`launcher/launch.py`), Open MPI, and MPICH. Slurm's step
daemon is one, too. A shell that sets RANK by hand is none: it may end before its ranks do."""
_operations = itertools.count()


@dataclass(frozen=True)
class Launch:
    """One of several ranks, as the variables of its launcher describe it.

    Attributes:
        rank: of this process.
        world_size: number of ranks.
        host: where the ranks meet.
        port: where the ranks meet.
        has_outer_store: whether the launcher runs the store's server; else rank 0 does.
        has_lasting_parent: whether the parent of this process is the launcher, which lives as long as its ranks.
        variables: what the launcher has set, for messages.
        name: the same for all ranks of a launch, and another one for other launches, as far as variables tell.
    """

    rank: int
    world_size: int
    host: str
    port: int
    has_outer_store: bool
    has_lasting_parent: bool
    variables: str
    name: str


def launched_ranks(environment: Mapping[str, str] | None = None) -> Ranks:
    """The ranks that a launcher has started, or one process alone.

    Ranks: all call it, before anything else.

    Args:
        environment: the launcher's variables; `os.environ` if None.

    Raises:
        RecipeError: the launcher's variables are incomplete or not valid; the message names them.
        PeerFailed: the ranks do not find each other; the message names those that are missing.
    """
    launch = read_launch(os.environ if environment is None else environment)
    if launch is None:
        return Ranks()
    parent = STARTER if launch.has_lasting_parent else None
    about = f"This process counts as one of several ranks because of {launch.variables}. {ALONE}"
    patience = Patience(f"rank {launch.rank} of {launch.world_size}", about, parent)
    store = connected_store(
        launch.host,
        launch.port,
        launch.name,
        patience,
        serves=launch.rank == 0,
        is_port_taken=launch.has_outer_store,
    )
    members = roll_call(store, launch.rank, launch.world_size, patience)
    return StoreRanks(members, launch.rank, launch.world_size, parent=parent)


def read_launch(environment: Mapping[str, str]) -> Launch | None:
    """What the variables of a launcher say; None if this process is alone.

    Args:
        environment: the variables.

    Raises:
        RecipeError: a variable is missing or not valid. The message names it.
    """
    variables = dict(environment)
    # torchrun inside a Slurm step has both kinds of variables; those of torchrun count.
    is_step = "WORLD_SIZE" not in variables and whole_number(variables, "SLURM_STEP_NUM_TASKS", default=1) > 1
    if is_step:
        variables |= slurm_variables(variables)
    world_size = whole_number(variables, "WORLD_SIZE", default=1)
    if world_size == 1:
        return None
    missing = [name for name in NEEDED if not variables.get(name)]
    if missing:
        raise RecipeError(
            f"WORLD_SIZE is {world_size}, but {', '.join(missing)} {'is' if len(missing) == 1 else 'are'} not set: a "
            f"launcher (torchrun, deepspeed, srun) sets all of them. {ALONE}"
        )
    names = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "MASTER_ADDR", "MASTER_PORT") if is_step else NEEDED
    return Launch(
        rank=whole_number(variables, "RANK", least=0, most=world_size - 1),
        world_size=world_size,
        host=variables["MASTER_ADDR"],
        port=whole_number(variables, "MASTER_PORT", most=HIGHEST_PORT),
        # As torch.distributed decides it: `_torchelastic_use_agent_store` in rendezvous.py.
        has_outer_store=variables.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
        has_lasting_parent=is_step or any(name in variables for name in LAUNCHERS),
        variables=", ".join(f"{name}={variables[name]}" for name in names),
        name=" ".join(f"{name}={variables.get(name, '')}" for name in NAMING),
    )


def whole_number(
    environment: Mapping[str, str], name: str, *, least: int = 1, most: int | None = None, default: int | None = None
) -> int:
    """The whole number that a launcher's variable holds.

    Args:
        environment: the variables.
        name: of the variable.
        least: smallest valid value.
        most: largest valid value; None: any.
        default: the value if the variable is not set; None: it must be set.

    Raises:
        RecipeError: the variable is not set, or its value is not a whole number in the range. The message names both.
    """
    text = environment.get(name)
    if text is None and default is not None:
        return default
    # Python's `int` takes "1_0" and " 1", too, and refuses more than 4300 digits.
    if text is not None and text.isascii() and text.isdigit() and len(text) < 20:
        value = int(text)
        if value >= least and (most is None or value <= most):
            return value
    found = "it is not set" if text is None else f"it is {brief(text)}"
    limits = f"{least} or more" if most is None else f"{least} to {most}"
    raise RecipeError(f"{name} must be a whole number, {limits}, but {found}; a launcher sets it. {ALONE}")


def process_group_ranks(*, timeout_s: float = math.inf) -> Ranks:
    """The ranks of torch's process group, for one operation. Each call uses its own prefix of the group's store.

    Ranks: all, equally often, after the process group is initialized.

    Args:
        timeout_s: how long `Ranks.decide` waits for rank 0.
    """
    from torch.distributed import PrefixStore, distributed_c10d

    store = PrefixStore(f"wsm_ds/{next(_operations)}", distributed_c10d._get_default_store())
    rank, world_size = distributed_c10d.get_rank(), distributed_c10d.get_world_size()
    return StoreRanks(store, rank, world_size, timeout_s=timeout_s) if world_size > 1 else Ranks()


def local_world_size() -> int:
    """The number of ranks that share this machine's cores, from the launcher's variables; 1 without them."""
    for name in ("LOCAL_WORLD_SIZE", "SLURM_NTASKS_PER_NODE", "SLURM_STEP_TASKS_PER_NODE"):
        digits = os.environ.get(name, "").split("(")[0].split(",")[0]  # Slurm writes "4(x2),3"
        if digits.isascii() and digits.isdigit() and len(digits) < 20:
            return max(1, int(digits))
    return 1


def slurm_variables(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables that torchrun would set, for a Slurm step with one task per rank.

    Args:
        environment: the variables that srun sets.

    Raises:
        RecipeError: a variable of the step is missing or not valid, or `scontrol` does not print the hosts of the step.
    """
    tasks = whole_number(environment, "SLURM_STEP_NUM_TASKS")
    rank = whole_number(environment, "SLURM_PROCID", least=0, most=tasks - 1)
    variables = {"RANK": str(rank), "WORLD_SIZE": str(tasks)}
    if "MASTER_ADDR" not in environment:
        variables["MASTER_ADDR"] = _first_host(environment.get("SLURM_STEP_NODELIST", ""))
    if "MASTER_PORT" not in environment:
        # every rank computes the same port; steps that run at once on a host get different ones
        job, step = (whole_number(environment, f"SLURM_{name}_ID", least=0, default=0) for name in ("JOB", "STEP"))
        variables["MASTER_PORT"] = str(20000 + (job * 97 + step) % 20000)
    return variables


def _first_host(nodes: str) -> str:
    try:
        done = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=False)
        hosts = done.stdout.split()
    except OSError:
        hosts = []
    if not hosts:
        raise RecipeError(
            f"scontrol does not say which hosts {nodes!r} (SLURM_STEP_NODELIST) are; set MASTER_ADDR and MASTER_PORT. "
            f"{ALONE}"
        )
    return hosts[0]

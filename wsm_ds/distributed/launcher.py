"""Finds the ranks that torchrun, deepspeed or srun have started, or a single process.

torch is imported only where there are several processes.
"""

import datetime
import itertools
import math
import os
import subprocess
from collections.abc import Mapping

from wsm_ds.distributed.ranks import Ranks, StoreRanks
from wsm_ds.errors import RecipeError

JOIN_S = 600.0
"""Seconds that the ranks wait for each other at the start."""
_operations = itertools.count()


def launched_ranks(environment: Mapping[str, str] | None = None) -> Ranks:
    """The ranks that a launcher has started, or one process alone.

    Ranks: all call it, before anything else.

    Args:
        environment: the launcher's variables; `os.environ` if None.

    Raises:
        RecipeError: the launcher's variables are incomplete, or the ranks do not find each other.
    """
    variables = dict(os.environ if environment is None else environment)
    # torchrun inside a Slurm step has both kinds of variables; those of torchrun count.
    if "WORLD_SIZE" not in variables and int(variables.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
        variables |= slurm_variables(variables)
    if int(variables.get("WORLD_SIZE", "1")) < 2:
        return Ranks()
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in variables]
    if missing:
        raise RecipeError(
            f"WORLD_SIZE is {variables['WORLD_SIZE']}, but {', '.join(missing)} is not set; unset it, or use a "
            "launcher."
        )
    os.environ.update({name: variables[name] for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")})
    return _rendezvous()


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
        if digits.isdigit():
            return max(1, int(digits))
    return 1


def slurm_variables(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables that torchrun would set, for a Slurm step with one task per rank.

    Args:
        environment: the variables that srun sets.

    Raises:
        RecipeError: `scontrol` does not print the hosts of the step.
    """
    variables = {"RANK": environment["SLURM_PROCID"], "WORLD_SIZE": environment["SLURM_STEP_NUM_TASKS"]}
    if "MASTER_ADDR" not in environment:
        nodes = environment.get("SLURM_STEP_NODELIST", "")
        done = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=False)
        hosts = done.stdout.split()
        if not hosts:
            raise RecipeError(f"scontrol does not say which hosts {nodes!r} are; set MASTER_ADDR and MASTER_PORT.")
        variables["MASTER_ADDR"] = hosts[0]
    if "MASTER_PORT" not in environment:
        # every rank computes the same port; steps that run at once on a host get different ones
        job, step = int(environment.get("SLURM_JOB_ID", "0")), int(environment.get("SLURM_STEP_ID", "0"))
        variables["MASTER_PORT"] = str(20000 + (job * 97 + step) % 20000)
    return variables


def _rendezvous() -> Ranks:
    from torch.distributed import rendezvous

    try:
        store, rank, world_size = next(rendezvous("env://", timeout=datetime.timedelta(seconds=JOIN_S)))
    except Exception as error:
        address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise RecipeError(f"the ranks do not meet at {address}: {type(error).__name__}: {error}") from error
    return StoreRanks(store, rank, world_size)

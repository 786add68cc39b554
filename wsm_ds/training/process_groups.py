"""Starts process groups in which no collective hangs without end, under any launcher."""

import os
import socket
from datetime import timedelta

from wsm_ds.distributed.launcher import slurm_variables, whole_number
from wsm_ds.errors import RecipeError

NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def find_ranks() -> None:
    """Sets RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT in the environment, if the launcher has not.

    torchrun and `deepspeed` set them. A Slurm step with one task per rank (`srun`, `deepspeed --launcher slurm`) has
    SLURM_PROCID and similar variables instead. Without any of these the process is the only rank.

    Raises:
        RecipeError: only some of the variables are set, or one is not valid; the message names them.
    """
    if "RANK" not in os.environ and whole_number(os.environ, "SLURM_STEP_NUM_TASKS", default=1) > 1:
        local_rank = whole_number(os.environ, "SLURM_LOCALID", least=0)
        os.environ.update(slurm_variables(os.environ) | {"LOCAL_RANK": str(local_rank)})
    elif not {"RANK", "WORLD_SIZE"} & set(os.environ):
        os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=_free_port())
    missing = [name for name in NAMES if name not in os.environ]
    if missing:
        raise RecipeError(f"{', '.join(missing)} are not set; start the ranks with torchrun, deepspeed or srun.")


def _free_port() -> str:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return str(listener.getsockname()[1])


def start_process_groups(timeout_s: float) -> None:
    """Calls `deepspeed.init_distributed` so that no collective of any group waits longer than `timeout_s`.

    DeepSpeed makes groups of its own by `new_group(ranks)` without a timeout (`comm/torch.py`). Those get torch's
    defaults, 30 minutes with gloo and 10 with NCCL, whatever timeout `init_distributed` gets. So this changes torch's
    defaults.

    Args:
        timeout_s: in seconds.

    Ranks: all.
    """
    import deepspeed
    from torch.distributed import distributed_c10d

    timeout = timedelta(seconds=timeout_s)
    distributed_c10d.default_pg_timeout = timeout
    distributed_c10d.default_pg_nccl_timeout = timeout
    deepspeed.init_distributed(timeout=timeout, auto_mpi_discovery=False, verbose=False)

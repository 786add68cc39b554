"""Where an engine keeps this rank's masters, and how the module's weights are made of them.

DeepSpeed has a wrapper class for each kind of engine. Each keeps its masters under another name, and in another form:

    DeepSpeedZeroOptimizer          ZeRO-1 and 2: a flat partition of each parameter group
    BF16_Optimizer                  ZeRO-1 with gradients in fp32: the same, under other names
    DeepSpeedZeroOptimizer_Stage3   a flat partition of each sub-group
    FP16_Optimizer                  stage 0: a flat tensor of each parameter group
    FP16_UnfusedOptimizer           stage 0: a tensor of each parameter
    torch's own optimizer           stage 0 in fp32: the module's weights themselves

The masters change in `engine.step()` and at no other time. Their tensors stay the same objects for the whole run.
"""

from collections.abc import Iterable, Iterator
from typing import Any, Protocol

from wsm_ds.errors import RecipeError

Tensors = list[Any]
"""torch's tensors, in DeepSpeed's order of groups or sub-groups."""

REFUSED_CLASSES = {
    "ZenFlowZeroOptimizer": "ZenFlow updates some columns in 16 bits and gives the masters their values later",
    "SuperOffloadOptimizer_Stage3": "SuperOffload updates the masters in another process",
}
"""Optimizers whose masters are not what the last update made of them, by a class in their line of descent."""


class Masters(Protocol):
    """This rank's masters, and the module's weights that belong to them, one for one."""

    def tensors(self) -> Tensors:
        """The masters: fp32, or 16 bits with `master_weights_and_grads` in 16 bits. Padding included."""

    def weights(self) -> Tensors:
        """This rank's part of the weights that forward passes use, as flat as the masters."""

    def paddings(self) -> Iterator[tuple[int, int, int]]:
        """What in the masters is of no parameter and may hold anything: (number of the master, begin, end)."""

    def prepare(self) -> None:
        """Makes the weights ready to be written. Ranks: all."""

    def publish(self) -> None:
        """Gives what was written into `weights` to the module, on every rank. Ranks: all."""


class ZeroPartitions:
    """The flat partitions of ZeRO-1, ZeRO-2 and BF16_Optimizer.

    Args:
        optimizer: DeepSpeed's wrapper.
        masters: its attribute that holds this rank's partitions.
        partitions: its attribute that holds every rank's partitions of the 16-bit weights.
        flats: its attribute that holds the whole flat weights.
    """

    def __init__(self, optimizer: Any, masters: str, partitions: str, flats: str) -> None:
        self.optimizer, self.masters, self.partitions, self.flats = optimizer, masters, partitions, flats

    def tensors(self) -> Tensors:
        """See `Masters`."""
        return list(getattr(self.optimizer, self.masters))

    def weights(self) -> Tensors:
        """See `Masters`. Experts have process groups of their own."""
        import torch.distributed as dist

        partitions, groups = getattr(self.optimizer, self.partitions), self.optimizer.real_dp_process_group
        return [of_group[dist.get_rank(group)] for of_group, group in zip(partitions, groups, strict=True)]

    def paddings(self) -> Iterator[tuple[int, int, int]]:
        """None: DeepSpeed fills the padding at the end of a group with zeros."""
        yield from ()

    def prepare(self) -> None:
        """Nothing has to be done."""

    def publish(self) -> None:
        """Gathers the partitions as the end of an update does (`update_lp_params`, `runtime/zero/stage_1_and_2.py`)."""
        from deepspeed.runtime.utils import all_gather_dp_groups

        all_gather_dp_groups(
            groups_flat=getattr(self.optimizer, self.flats),
            partitioned_param_groups=getattr(self.optimizer, self.partitions),
            dp_process_group=self.optimizer.real_dp_process_group,
            start_alignment_factor=self.optimizer.nccl_start_alignment_factor,
            allgather_bucket_size=self.optimizer.allgather_bucket_size,
        )


class SubGroups:
    """The sub-groups of ZeRO-3. Its forward passes gather the weights by themselves.

    Args:
        optimizer: DeepSpeed's wrapper.
    """

    def __init__(self, optimizer: Any) -> None:
        self.optimizer = optimizer

    def tensors(self) -> Tensors:
        """See `Masters`."""
        return list(self.optimizer.fp32_partitioned_groups_flat)

    def weights(self) -> Tensors:
        """See `Masters`. Under autocast they are the masters themselves (`runtime/zero/stage3.py:1161`)."""
        return list(self.optimizer.fp16_partitioned_groups_flat)

    def paddings(self) -> Iterator[tuple[int, int, int]]:
        """The end of a parameter's partition, on the last ranks: DeepSpeed leaves there what was in the memory."""
        import torch.distributed as dist

        for number, parameters in enumerate(self.optimizer.fp16_groups):
            begin = 0
            for parameter in parameters:
                size = int(parameter.ds_tensor.ds_numel)
                before = dist.get_rank(parameter.ds_process_group) * size
                filled = min(max(int(parameter.ds_numel) - before, 0), size)
                if filled < size:
                    yield number, begin + filled, begin + size
                begin += size

    def prepare(self) -> None:
        """Partitions every parameter, those too that ZeRO-3 keeps whole."""
        self.optimizer.checkpoint_event_prologue()

    def publish(self) -> None:
        """Makes the parameters views of the flat weights again, drops hpZ's copies, gathers what is kept whole."""
        for number in range(len(self.optimizer.fp16_partitioned_groups_flat)):
            self.optimizer._unflatten_partitioned_parameters(number)
        self.optimizer.checkpoint_event_epilogue()


class WholeTensors:
    """The masters of stage 0: every rank has them all.

    Args:
        masters: the masters.
        weights: the module's weights, one for one; the same tensors in fp32.
    """

    def __init__(self, masters: Iterable[Any], weights: Iterable[Any]) -> None:
        self._masters, self._weights = list(masters), list(weights)

    def tensors(self) -> Tensors:
        """See `Masters`."""
        return list(self._masters)

    def weights(self) -> Tensors:
        """See `Masters`."""
        return list(self._weights)

    def paddings(self) -> Iterator[tuple[int, int, int]]:
        """None."""
        yield from ()

    def prepare(self) -> None:
        """Nothing has to be done."""

    def publish(self) -> None:
        """Nothing has to be done: the module's parameters are the weights, or views of them."""


def find_masters(engine: Any) -> Masters:
    """Returns the masters of an engine.

    Args:
        engine: DeepSpeed's, as `deepspeed.initialize` returned it.

    Raises:
        RecipeError: the engine has no optimizer, or one whose masters cannot be averaged: NVMe offload, ZenFlow,
            SuperOffload, Twin-Flow, or a class that is not known. The message names it.
    """
    optimizer = engine.optimizer
    _require_masters_at_hand(optimizer)
    names = {kind.__name__ for kind in type(optimizer).__mro__}
    if "DeepSpeedZeroOptimizer" in names:
        attributes = "single_partition_of_fp32_groups", "parallel_partitioned_bit16_groups", "bit16_groups_flat"
        return ZeroPartitions(optimizer, *attributes)
    if "BF16_Optimizer" in names:
        attributes = "fp32_groups_flat_partition", "bf16_partitioned_groups", "bf16_groups_flat"
        return ZeroPartitions(optimizer, *attributes)
    if "DeepSpeedZeroOptimizer_Stage3" in names:
        return SubGroups(optimizer)
    if "FP16_Optimizer" in names:
        return WholeTensors(optimizer.fp32_groups_flat, optimizer.fp16_groups_flat)
    if "FP16_UnfusedOptimizer" in names:
        return WholeTensors(_flattened(optimizer.fp32_groups), _flattened(optimizer.fp16_groups))
    if "Optimizer" in names and not engine.zero_optimization():  # torch's own
        parameters = _flattened(group["params"] for group in optimizer.param_groups)
        return WholeTensors(parameters, parameters)
    raise _refused(f"the optimizer {type(optimizer).__name__}", "this version does not know where its masters are")


def _require_masters_at_hand(optimizer: Any) -> None:
    for kind in type(optimizer).__mro__:
        if kind.__name__ in REFUSED_CLASSES:
            raise _refused(kind.__name__, REFUSED_CLASSES[kind.__name__])
    if getattr(optimizer, "zenflow", False):
        raise _refused("ZenFlow", REFUSED_CLASSES["ZenFlowZeroOptimizer"])
    if getattr(optimizer, "swap_optimizer", False) or getattr(optimizer, "params_in_nvme_and_cpu", False):
        raise _refused("offload to NVMe", "its masters are on the disk between the updates")
    ratio = getattr(optimizer, "partial_offload", None)
    if getattr(optimizer, "offload_optimizer", False) and ratio not in (None, 1.0):
        raise _refused(f"Twin-Flow (offload_optimizer.ratio {ratio})", "it was not tested")
    if optimizer is None or not hasattr(optimizer, "param_groups"):
        raise _refused("an engine without an optimizer", "it has no masters")


def _flattened(groups: Iterable[Iterable[Any]]) -> list[Any]:
    return [tensor for group in groups for tensor in group]


def _refused(what: str, reason: str) -> RecipeError:
    return RecipeError(
        f"averages in the running engine do not work with {what}: {reason}. Save full checkpoints more often instead, "
        "and merge those."
    )

"""Averages of this rank's masters over updates: the mean, and others that move towards the masters by a weight.

    M_n = M_{n-1} + w_n (θ_n - M_{n-1})        w_1 = 1

In fp32 each such step rounds M, and after 40 steps the sum of these errors may be several ulps. So the mean is kept as
the sum of two fp32 numbers, the second of which holds what the first one cannot.
"""

import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

from wsm_ds.averaging.masters import Tensors
from wsm_ds.engine.arithmetic import kernel
from wsm_ds.errors import RecipeError


class Rule(Protocol):
    """How far an average moves towards the masters at each of its samples."""

    def weight(self, count: int, sample: int) -> float:
        """The weight of a sample.

        Args:
            count: the sample's number, from 1; its weight is 1.
            sample: updates between two samples.
        """


@dataclass(frozen=True)
class Ema:
    """An exponential moving average: after `half_life` updates a sample counts half as much.

    Args:
        half_life: in updates, above 0.

    Raises:
        RecipeError: it is not.
    """

    half_life: float

    def __post_init__(self) -> None:
        if not 0.0 < self.half_life < math.inf:
            raise RecipeError(f"half_life must be a number of updates above 0, found {self.half_life}.")

    def weight(self, count: int, sample: int) -> float:
        """See `Rule`."""
        return 1.0 if count == 1 else 1.0 - 2.0 ** (-sample / self.half_life)


@dataclass(frozen=True)
class Anchored:
    """The merge of a window that begins at the average's first sample, with the decay curve d(s) = 1 - s^power.

    It costs one buffer, however long the window is: w_n = 1 - ((n - 1) / n)^power. With power 1 it is the mean, with
    power 1/2 it is the merge of the curve 1-sqrt.

    Args:
        power: above 0.

    Raises:
        RecipeError: it is not.
    """

    power: float

    def __post_init__(self) -> None:
        if not 0.0 < self.power < math.inf:
            raise RecipeError(f"power must be a number above 0, found {self.power}.")

    def weight(self, count: int, sample: int) -> float:
        """See `Rule`."""
        return -math.expm1(self.power * math.log((count - 1) / count)) if count > 1 else 1.0


CHUNK_ELEMENTS = {"cpu": 1 << 18}
"""Elements of the differences that are made at once: on CPUs they stay in the cache."""
MOST_CHUNK_ELEMENTS = 1 << 24


LEAST_SHARE = 1 << 18
"""Elements for which a thread is worth its start."""
RENEWED_EVERY = 8
"""Samples after which the two parts of a mean are added; at each of the first ones too, when it moves the most."""


class RunningMean:
    """The mean of all samples, within one fp32 ulp of an element's largest sample from the mean in float64.

    Memory: 4 bytes for each element from the first sample on, 8 from the second one on, if `add` may refine.

    Args:
        device: where the buffers are; None: where the masters are.

    Attributes:
        count: samples until now.
    """

    def __init__(self, device: str | None = None) -> None:
        self.device, self.count = device, 0
        self._means: Tensors = []
        self._rests: Tensors = []

    def add(self, masters: Tensors, *, may_refine: bool = True) -> None:
        """Takes a sample.

        Args:
            masters: as they are after an update.
            may_refine: whether there is memory for the second part of the mean.
        """
        import torch

        self.count += 1
        if self.count == 1:
            self._means = copies(masters, self.device)
            return
        with torch.no_grad():
            if may_refine and not self._rests:
                self._rests = [torch.zeros_like(mean) for mean in self._means]
            if self._rests:
                for master, mean, rest in zip(masters, self._means, self._rests, strict=True):
                    self._add_exactly(master, mean, rest)
            else:
                lerp(self._means, masters, 1.0 / self.count)

    def _add_exactly(self, master: Any, mean: Any, rest: Any) -> None:
        """Moves mean + rest towards a master, a part after the other."""
        import torch

        if _add_compiled(master, mean, rest, 1.0 / self.count):
            return
        size = CHUNK_ELEMENTS.get(mean.device.type, MOST_CHUNK_ELEMENTS)
        flat, mean, rest = master.detach().reshape(-1), mean.view(-1), rest.view(-1)
        scratch = torch.empty(min(size, mean.numel()), dtype=mean.dtype, device=mean.device)
        for begin in range(0, mean.numel(), size):
            part = slice(begin, begin + size)
            near, part_mean, part_rest = flat[part].to(device=mean.device, dtype=mean.dtype), mean[part], rest[part]
            made = torch.sub(near, part_mean, out=scratch[: len(near)]).sub_(part_rest)
            part_rest.add_(made, alpha=1.0 / self.count)
            if self.count <= RENEWED_EVERY or self.count % RENEWED_EVERY == 0:
                _renew(part_mean, part_rest, made)

    def values(self) -> Iterator[Any]:
        """Yields the mean, one tensor for each master. Memory: one of them."""
        for number, mean in enumerate(self._means):
            yield mean + self._rests[number] if self._rests else mean

    def take(self) -> Tensors:
        """Returns the mean and begins anew."""
        for mean, rest in zip(self._means, self._rests, strict=False):
            mean.add_(rest)
            release(rest)
        taken, self._means, self._rests, self.count = self._means, [], [], 0
        return taken


def _add_compiled(master: Any, mean: Any, rest: Any, weight: float) -> bool:
    """Moves mean + rest towards a master in one pass over the memory; False where the compiled loop cannot."""
    import torch

    library = kernel()
    if library is None or not hasattr(library, "wsm_add_to_means"):
        return False
    tensors = (mean, rest, master.detach())
    if any(t.device.type != "cpu" or t.dtype != torch.float32 or not t.is_contiguous() for t in tensors):
        return False
    addresses, numel = [tensor.data_ptr() for tensor in tensors], mean.numel()
    share = max(-(-numel // torch.get_num_threads()), LEAST_SHARE)

    def add(begin: int) -> None:
        library.wsm_add_to_means(*(a + 4 * begin for a in addresses), weight, min(share, numel - begin))

    begins = range(0, numel, share)
    if len(begins) < 2:
        for begin in begins:
            add(begin)
        return True
    with ThreadPoolExecutor(len(begins)) as pool:  # ctypes releases the global lock
        list(pool.map(add, begins))
    return True


def _renew(mean: Any, rest: Any, total: Any) -> None:
    """Makes `mean` the rounded sum of both, and `rest` what the rounding leaves (Dekker's fast two-sum)."""
    import torch

    torch.add(mean, rest, out=total)
    rest.add_(mean.sub_(total))
    mean.copy_(total)


class Average:
    """An average of this rank's masters. Memory: 4 bytes for each element, from the first sample on.

    Args:
        rule: gives the weights.
        device: where the buffers are; None: where the masters are.

    Attributes:
        count: samples until now.
    """

    def __init__(self, rule: Rule, device: str | None = None) -> None:
        self.rule, self.device = rule, device
        self.count = 0
        self._buffers: Tensors = []

    def add(self, masters: Tensors, sample: int = 1) -> None:
        """Takes a sample.

        Args:
            masters: as they are after an update.
            sample: updates since the last sample.
        """
        self.count += 1
        if self.count == 1:
            self._buffers = copies(masters, self.device)
        else:
            lerp(self._buffers, masters, self.rule.weight(self.count, sample))

    def values(self) -> Iterator[Any]:
        """Yields the average, one tensor for each master."""
        yield from self._buffers

    def state(self) -> dict[str, Any]:
        """Returns what `restore` needs; the tensors are the buffers themselves."""
        return {"rule": repr(self.rule), "count": self.count, "buffers": list(self._buffers)}

    def restore(self, state: dict[str, Any]) -> None:
        """Goes on where `state` was taken, on a rank with the same partitions.

        Raises:
            RecipeError: the state is of another rule.
        """
        if state["rule"] != repr(self.rule):
            raise RecipeError(f"the saved average is {state['rule']}, and {self.rule!r} was asked for.")
        self.count, self._buffers = int(state["count"]), copies(state["buffers"], self.device)


def release(tensor: Any) -> None:
    """Gives the memory of a tensor back, if nothing else has it, without Python's global lock.

    The system takes a tenth of a second for 400 MB. Where Python frees a tensor, all other threads wait meanwhile.
    """
    tensor.set_()


def copies(tensors: Tensors, device: str | None = None) -> Tensors:
    """Returns copies in fp32.

    Args:
        tensors: of any float dtype.
        device: of the copies; None: that of each tensor.
    """
    import torch

    return [t.detach().to(device=device or t.device, dtype=torch.float32, copy=True).contiguous() for t in tensors]


def lerp(buffers: Tensors, masters: Tensors, weight: float) -> None:
    """Moves fp32 buffers towards masters, which may have another dtype or lie on another device."""
    import torch

    near = [m.detach().to(device=b.device, dtype=b.dtype) for m, b in zip(masters, buffers, strict=True)]
    with torch.no_grad():
        torch._foreach_lerp_(buffers, near, weight)

"""How fast this machine multiplies matrices in each dtype.

A CPU without AVX-512 has no bf16 arithmetic. oneDNN then emulates it, 30 to 80 times slower than fp32. In bf16 the
quickstart took 32 minutes on such a machine, instead of three, and nothing said why.
"""

import logging
import time
from dataclasses import dataclass

log = logging.getLogger(__name__)

SHAPE = (512, 256, 256)
"""(m, k, n) of the product that is timed: [m, k] times [k, n]. About 1 ms in fp32 on one CPU core."""
REPEATS = 3
SLOW_RATIO = 2.0
"""A dtype that takes more than this multiple of fp32's time is slow."""


@dataclass(frozen=True)
class MatmulSpeed:
    """Seconds that one product of `SHAPE` takes in a dtype and in fp32, on one device."""

    dtype: str
    device: str
    seconds: float
    fp32_seconds: float

    @property
    def is_slow(self) -> bool:
        """Whether fp32 is the better choice on this device."""
        return self.seconds > SLOW_RATIO * self.fp32_seconds

    def __str__(self) -> str:
        m, k, n = SHAPE
        return (
            f"a {m}x{k} by {k}x{n} product takes {1e3 * self.seconds:.2g} ms in {self.dtype} "
            f"and {1e3 * self.fp32_seconds:.2g} ms in fp32 on this {self.device}"
        )


def measure_matmul(dtype: str) -> MatmulSpeed:
    """Times matrix products in `dtype` and in fp32 on DeepSpeed's device, with torch's current number of threads.

    It takes a fraction of a second: the fastest of REPEATS products counts, after one that is not timed.

    Args:
        dtype: "bf16" or "fp16".

    Ranks: any; it does not communicate.
    """
    import torch
    from deepspeed.accelerator import get_accelerator

    accelerator = get_accelerator()
    device = accelerator.device_name()

    def best_s(torch_dtype: torch.dtype) -> float:
        m, k, n = SHAPE
        a, b = (torch.ones(size, dtype=torch_dtype, device=device) for size in ((m, k), (k, n)))
        times_s = []
        for _ in range(1 + REPEATS):
            accelerator.synchronize()
            began_s = time.perf_counter()
            a @ b
            accelerator.synchronize()
            times_s.append(time.perf_counter() - began_s)
        # The first product includes the choice of a kernel and its compilation.
        return min(times_s[1:])

    torch_dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    return MatmulSpeed(dtype, "CPU" if device == "cpu" else device, best_s(torch_dtype), best_s(torch.float32))


def warn_if_dtype_is_slow(dtype: str) -> bool:
    """Logs a warning if training in `dtype` is slow on this CPU. Other devices are not timed.

    Args:
        dtype: of the model's weights: "bf16", "fp16" or "fp32".

    Returns:
        Whether it warned.

    Ranks: any; call it on one of them.
    """
    from deepspeed.accelerator import get_accelerator

    if dtype == "fp32" or get_accelerator().device_name() != "cpu":
        return False
    speed = measure_matmul(dtype)
    if speed.is_slow:
        log.warning(
            "%s is slow here: %s. On a CPU, use a config without %s, such as configs/zero2_fp32.json.",
            dtype,
            speed,
            dtype,
        )
    return speed.is_slow

"""The learning rate as a function of the number of the optimizer update. The first update has the number 1.

    wsm_rate    minimum + (peak - minimum) · t / T     while t < T = warmup_num_steps, then peak
    wsd_rate    the same while t <= S = decay_start_step, then  end + (peak - end) · d((t - S) / D)
                for D = decay_num_steps updates, then the rate of the last of them

d is a decay curve of `wsm_ds.schedules.curves`. The warmup is linear and reaches the peak with update T. DeepSpeed's
own `WarmupLR` is logarithmic unless the configuration says otherwise, and spends its first two updates at the minimum.

Source: docs/theory.md, "The schedule"; Tian et al., arXiv 2507.17634.
"""

from wsm_ds.schedules.curves import Curve


def wsm_rate(update: int, *, peak: float, warmup_num_steps: int, minimum: float = 0.0) -> float:
    """The rate of one optimizer update: a linear warmup, then `peak` without end.

    Args:
        update: number t of the update, from 1.
        peak: learning rate after the warmup.
        warmup_num_steps: T, in updates; 0 and 1 mean no warmup.
        minimum: learning rate from which the warmup starts, at t = 0. No update uses it.

    Returns:
        The learning rate of update t.

    Example:
        >>> [wsm_rate(t, peak=4.0, warmup_num_steps=4) for t in (1, 2, 3, 4, 5, 10**9)]
        [1.0, 2.0, 3.0, 4.0, 4.0, 4.0]
        >>> [wsm_rate(t, peak=8.0, warmup_num_steps=4, minimum=4.0) for t in (1, 2, 3, 4)]
        [5.0, 6.0, 7.0, 8.0]
    """
    if update >= warmup_num_steps:
        return peak
    return minimum + (peak - minimum) * update / warmup_num_steps


def wsd_rate(
    update: int,
    *,
    peak: float,
    warmup_num_steps: int,
    minimum: float = 0.0,
    decay_start_step: int,
    decay_num_steps: int,
    curve: Curve,
    end: float = 0.0,
) -> float:
    """The rate of one optimizer update: warmup, stable phase, decay.

    Args:
        update: number t of the update, from 1.
        peak: learning rate between the warmup and the decay.
        warmup_num_steps: T, in updates; 0 and 1 mean no warmup.
        minimum: learning rate from which the warmup starts, at t = 0.
        decay_start_step: S, the last update at the peak.
        decay_num_steps: D >= 1, the duration of the decay in updates.
        curve: d, the shape of the decay.
        end: learning rate where d = 0.

    Returns:
        The learning rate of update t; from t = S + D on, that of update S + D.

    Example:
        >>> from wsm_ds.schedules.curves import parse_curve
        >>> linear = parse_curve("linear")
        >>> [wsd_rate(t, peak=4.0, warmup_num_steps=0, decay_start_step=2, decay_num_steps=4, curve=linear)
        ...  for t in (1, 2, 3, 4, 5, 6, 7)]
        [4.0, 4.0, 3.0, 2.0, 1.0, 0.0, 0.0]
    """
    if update <= decay_start_step:
        return wsm_rate(update, peak=peak, warmup_num_steps=warmup_num_steps, minimum=minimum)
    position = min((update - decay_start_step) / decay_num_steps, 1.0)
    return end + (peak - end) * float(curve(position))

"""Averages of the masters in a running engine: slot means, and evaluation with an average without a file."""

from wsm_ds.averaging.averages import Anchored, Ema
from wsm_ds.averaging.slot_means import SlotMeans

__all__ = ["Anchored", "Ema", "SlotMeans"]

"""Layouts: files on disk → where every element of every parameter lies. No arithmetic, no output."""

from wsm_ds.layouts.layout import FRAGMENT, Fragment, Layout, TensorInfo
from wsm_ds.layouts.run import Checkpoint, find_checkpoints
from wsm_ds.layouts.zero import read_layout

__all__ = ["FRAGMENT", "Checkpoint", "Fragment", "Layout", "TensorInfo", "find_checkpoints", "read_layout"]

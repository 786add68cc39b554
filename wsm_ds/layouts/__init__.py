"""Layouts: files on disk → where every element of every parameter lies. No arithmetic, no output.

`detection.read_layout` finds out which format a folder has and calls that format's reader (`zero`, `zero0`,
`universal`). `zero12` and `zero3` say where a stage stores elements, `moe` and `pipeline` which weights lie outside
the model files. `run` lists the checkpoints of a run.
"""

from wsm_ds.layouts.detection import read_layout
from wsm_ds.layouts.layout import FRAGMENT, Layout, TensorInfo
from wsm_ds.layouts.run import Checkpoint, find_checkpoints

__all__ = ["FRAGMENT", "Checkpoint", "Layout", "TensorInfo", "find_checkpoints", "read_layout"]

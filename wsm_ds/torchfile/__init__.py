"""A torch `.pt` file as byte-addressed slots: read without executing its pickle, and written again.

`archive` reads the zip, `unpickle` turns `data.pkl` into inert stand-ins, `repickle` writes such a tree again where an
output's metadata must change, `zip_format` lays out a new zip. Neither torch nor deepspeed is imported.
"""

from wsm_ds.torchfile.archive import Archive, Record, archive_of
from wsm_ds.torchfile.stand_ins import Global, Stub
from wsm_ds.torchfile.torch_file import (
    TorchFile,
    once_per_form,
    open_own_tree,
    open_torch_file,
    open_torch_files,
    require_readable,
)
from wsm_ds.torchfile.unpickle import Tensor, record_of

__all__ = [
    "Archive",
    "Global",
    "Record",
    "Stub",
    "Tensor",
    "TorchFile",
    "archive_of",
    "once_per_form",
    "open_own_tree",
    "open_torch_file",
    "open_torch_files",
    "record_of",
    "require_readable",
]

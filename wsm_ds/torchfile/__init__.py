"""A torch `.pt` file as byte-addressed slots: read without executing it, written from the same parts.

`archive` knows the zip, `unpickle` reads `data.pkl` into inert stand-ins, `repickle` writes such a tree
anew where an output's metadata must change. Neither torch nor deepspeed is imported.
"""

from wsm_ds.torchfile.archive import Archive, Record, read_archive
from wsm_ds.torchfile.torch_file import TorchFile, open_torch_file, record_of
from wsm_ds.torchfile.unpickle import Global, Stub, Tensor

__all__ = [
    "Archive",
    "Global",
    "Record",
    "Stub",
    "Tensor",
    "TorchFile",
    "open_torch_file",
    "read_archive",
    "record_of",
]

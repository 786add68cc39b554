"""Reading executes nothing, and reads what torch wrote."""

from __future__ import annotations

import argparse
import collections
import io
import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lazy import torch

from wsm_ds.errors import BrokenCheckpoint, UnsafePickle, UnsupportedLayout
from wsm_ds.torchfile import Stub, Tensor, open_torch_file


def saved(path: Path, value: Any, **options: Any) -> Path:
    torch.save(value, path, **options)
    return path


class RunsACommand:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        import os

        return os.system, (f"touch {self.marker}",)


class OwnSettings:
    def __init__(self) -> None:
        self.answer = 42


def test_a_pickle_that_would_run_a_command_does_not_run_it_and_the_error_names_the_global(tmp_path: Path) -> None:
    marker = tmp_path / "it_ran"
    path = saved(tmp_path / "evil.pt", {"module": RunsACommand(marker)})
    with pytest.raises(UnsafePickle, match=r"evil\.pt names the global (posix|os)\.system"):
        open_torch_file(path)
    assert not marker.exists()
    with pytest.raises(UnsafePickle, match=r"builtins\.eval"):
        open_torch_file(evil_by_opcodes(tmp_path / "eval.pt", b"cbuiltins\neval\n(X\x01\x00\x00\x001tR."))


def test_an_allowed_global_is_carried_as_data_and_still_not_called(tmp_path: Path) -> None:
    marker = tmp_path / "it_ran"
    path = saved(tmp_path / "evil.pt", {"x": RunsACommand(marker)})
    tree = open_torch_file(path, frozenset({"posix.system", "os.system", "nt.system"})).tree
    assert isinstance(tree["x"], Stub)
    assert tree["x"].args == (f"touch {marker}",)
    assert not marker.exists()


def evil_by_opcodes(path: Path, data: bytes) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", data)
    return path


def test_client_state_of_any_known_kind_is_read_as_data(tmp_path: Path) -> None:
    state = {
        "args": argparse.Namespace(lr=0.1, hidden=[1, 2]),
        "rng": np.random.RandomState(0).get_state(),
        "order": collections.OrderedDict(a=1),
        "dtype": torch.bfloat16,
        "size": torch.Size([2, 3]),
        "path": tmp_path,
        "none": None,
    }
    tree = open_torch_file(saved(tmp_path / "client.pt", state)).tree
    assert tree["args"].callee.name == "Namespace"
    assert tree["args"].state == {"lr": 0.1, "hidden": [1, 2]}
    assert tree["size"] == (2, 3)
    assert tree["order"] == {"a": 1}


def test_a_class_of_the_users_own_has_to_be_allowed_by_name(tmp_path: Path) -> None:
    path = saved(tmp_path / "own.pt", {"settings": OwnSettings()})
    name = f"{OwnSettings.__module__}.OwnSettings"
    with pytest.raises(UnsafePickle, match=f"--allow-global {name}"):
        open_torch_file(path)
    assert open_torch_file(path, frozenset({name})).tree["settings"].state == {"answer": 42}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64", "int64", "uint8", "bool"])
def test_a_tensors_bytes_lie_where_the_file_says(tmp_path: Path, dtype: str) -> None:
    whole = torch.arange(24).to(getattr(torch, dtype))
    path = saved(tmp_path / "t.pt", {"view": whole[6:18].view(3, 4), "parameter": torch.nn.Parameter(torch.ones(3))})
    file = open_torch_file(path)
    view = file.tree["view"]
    assert view.shape == (3, 4)
    assert (view.storage.numel, view.offset) == (24, 6)
    stored = np.fromfile(path, np.uint8, view.numel * view.dtype.itemsize, offset=file.byte_offset(view))
    assert stored.tobytes() == whole[6:18].view(torch.uint8).numpy().tobytes()
    assert isinstance(file.tree["parameter"], Tensor)


@pytest.mark.parametrize("keep", [0, 3, 100, 700, -30, -1])
def test_a_file_that_was_cut_off_is_named(tmp_path: Path, keep: int) -> None:
    path = saved(tmp_path / "cut.pt", {"x": torch.arange(100)})
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(BrokenCheckpoint, match=r"cut\.pt"):
        open_torch_file(path)


def test_the_legacy_format_is_refused_by_name(tmp_path: Path) -> None:
    path = saved(tmp_path / "old.pt", {"x": torch.ones(2)}, _use_new_zipfile_serialization=False)
    with pytest.raises(UnsupportedLayout, match="legacy format"):
        open_torch_file(path)


def test_a_tensor_that_reaches_beyond_its_storage_is_refused(tmp_path: Path) -> None:
    path = saved(tmp_path / "t.pt", {"x": torch.arange(10)})
    file = open_torch_file(path)
    x = file.tree["x"]
    longer = Tensor(x.storage, 0, (11,), (1,), x.call)
    with pytest.raises(BrokenCheckpoint, match="beyond its storage"):
        file.byte_offset(longer)


def test_garbage_in_place_of_a_pickle_is_a_broken_checkpoint(tmp_path: Path) -> None:
    for data in (b"", b".", b"garbage", pickle.dumps({"a": 1})[:-3], b"\x80\x02X\xff\xff\xff\x7f."):
        with pytest.raises(BrokenCheckpoint):
            open_torch_file(evil_by_opcodes(tmp_path / "g.pt", data))
    buffer = io.BytesIO()
    buffer.write(b"PK\x05\x06" + b"\0" * 18)
    (tmp_path / "empty.pt").write_bytes(buffer.getvalue())
    with pytest.raises(BrokenCheckpoint):
        open_torch_file(tmp_path / "empty.pt")


def test_dtypes_that_only_untyped_storages_hold_keep_their_size(tmp_path: Path) -> None:
    sizes = {"uint16": 2, "uint64": 8, "complex64": 8, "complex128": 16, "float8_e8m0fnu": 1}
    content = {name: torch.zeros(5).to(getattr(torch, name)) for name in sizes}
    tree = open_torch_file(saved(tmp_path / "t.pt", content)).tree
    for name, itemsize in sizes.items():
        assert (tree[name].dtype.torch_name, tree[name].dtype.itemsize, tree[name].numel) == (name, itemsize, 5)


def test_a_record_longer_than_its_storage_is_refused_because_torch_does_not_load_it(tmp_path: Path) -> None:
    source = saved(tmp_path / "a.pt", {"x": torch.ones(4)})
    with zipfile.ZipFile(source) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(source, "w") as archive:
        for name, data in records.items():
            archive.writestr(name, data + bytes(2 * name.endswith("/data/0")))
    with pytest.raises(BrokenCheckpoint, match="storage 0 has 18 bytes, expected 16"):
        open_torch_file(source)


def test_a_memo_index_for_which_torchs_reader_has_no_memory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BrokenCheckpoint, match=r"memo index of 4,294,967,295"):
        open_torch_file(evil_by_opcodes(tmp_path / "a.pt", b"\x80\x02Nr\xff\xff\xff\xff."))

# ruff: noqa: E501
"""Plain values of every library that saves into a checkpoint are read; whatever could run code is refused by name."""

from __future__ import annotations

import enum
import pickle
import zipfile
from pathlib import Path
from typing import Any

import pytest
from client_values import VALUES
from lazy import torch

from wsm_ds.errors import BrokenCheckpoint, UnsafePickle
from wsm_ds.torchfile import Stub, open_torch_file
from wsm_ds.torchfile.repickle import repickle

GOLDEN = Path(__file__).parent.parent / "golden/client_states"


class Colour(enum.Enum):
    RED = "red"


class Outer:
    class Inner:
        def __init__(self) -> None:
            self.size = 3


def saved(path: Path, value: Any, **options: Any) -> Path:
    torch.save({"value": value}, path, **options)
    return path


def crafted(path: Path, data: bytes) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", data)
    return path


def names_in(data: bytes) -> set[str]:
    import pickletools

    return {str(argument) for opcode, argument, _ in pickletools.genops(data) if opcode.name == "GLOBAL"}


def pickle_of(path: Path) -> bytes:
    with zipfile.ZipFile(path) as archive:
        return archive.read(next(name for name in archive.namelist() if name.endswith("/data.pkl")))


@pytest.mark.parametrize("name", VALUES)
def test_plain_values_are_read_and_written_again_under_the_same_names(tmp_path: Path, name: str) -> None:
    path = saved(tmp_path / "value.pt", VALUES[name]())
    written, _ = repickle(open_torch_file(path).tree)
    assert names_in(written) == names_in(pickle_of(path))


@pytest.mark.parametrize("name", ["omegaconf", "peft", "lightning"])
def test_values_of_libraries_that_are_not_installed_are_read(name: str) -> None:
    path = GOLDEN / f"{name}.pt"
    written, _ = repickle(open_torch_file(path).tree)
    assert names_in(written) == names_in(pickle_of(path))
    assert len(names_in(written)) > 3


@pytest.mark.parametrize(
    "name",
    [
        "pathlib._local PosixPath",  # Python 3.13
        "numpy.core.multiarray scalar",  # numpy 1
        "deepspeed.runtime.bf16_optimizer fragment_address",
        "megatron.model.enums AttnMaskType",
    ],
)
def test_names_of_other_versions_are_known(tmp_path: Path, name: str) -> None:
    module, attribute = name.split()
    data = b"\x80\x02c" + f"{module}\n{attribute}\n".encode() + b")\x81."
    value = open_torch_file(crafted(tmp_path / "old.pt", data)).tree
    assert (value.callee.module, value.callee.name) == (module, attribute)


RUNS_CODE = {
    "a function deep in numpy": b"\x80\x02cnumpy.testing._private.utils\nrunstring\n(X\x01\x00\x00\x001}tR.",
    "a path from torch": b"\x80\x04\x8c\x05torch\x8c\x09os.system\x93\x8c\x02id\x85R.",
    "a path from a known class": b"\x80\x04\x8c\x08argparse\x8c\x12Namespace.__init__\x93)R.",
    "storages that are pickles": b"\x80\x02ctorch.storage\n_load_from_bytes\nX\x01\x00\x00\x00x\x85R.",
    "torch's own unpickler": b"\x80\x02ctorch\nload\nX\x01\x00\x00\x00x\x85R.",
    "an import": b"\x80\x02ctorch._utils\n_import_dotted_name\nX\x09\x00\x00\x00os.system\x85R.",
    "a namedtuple, which is made by exec": b"\x80\x02ccollections\nnamedtuple\nX\x01\x00\x00\x00x)\x86R.",
    "an attribute of a module": b"\x80\x02c__builtin__\ngetattr\nctorch\nhub\nX\x04\x00\x00\x00load\x86R.",
    "an attribute of a known class": b"\x80\x02c__builtin__\ngetattr\ncargparse\nNamespace\nX\x08\x00\x00\x00__init__\x86R.",
    "a deepspeed function": b"\x80\x02cdeepspeed.utils\nzero_to_fp32\n.",
    "a partial": b"\x80\x02cfunctools\npartial\nc__builtin__\neval\n\x85R.",
}  # fmt: skip


@pytest.mark.parametrize("name", RUNS_CODE)
def test_what_could_run_code_is_refused_with_its_flag(tmp_path: Path, name: str) -> None:
    path = crafted(tmp_path / "crafted.pt", RUNS_CODE[name])
    with pytest.raises(UnsafePickle, match=r"crafted\.pt names the global.*--allow-global [\w.]+"):
        open_torch_file(path)


MISUSED = {
    "a constructor that reads files": b"\x80\x02ctransformers.training_args\nTrainingArguments\nX\x01\x00\x00\x00x\x85R.",
    "a process group": b"\x80\x02caccelerate.state\nPartialState\n)R.",
    "a type made by type()": b"\x80\x02c__builtin__\ntype\n(X\x01\x00\x00\x00x)}tR.",
    "getitem of anything": b"\x80\x02c_operator\ngetitem\n]K\x00\x86R.",
    "a codec": b"\x80\x02c_codecs\nencode\nX\x01\x00\x00\x00xX\x05\x00\x00\x00rot13\x86R.",
    "a defaultdict that makes anything": b"\x80\x02ccollections\ndefaultdict\nctransformers.training_args\nTrainingArguments\n\x85R.",
    "a function for a bit generator": b"\x80\x02cnumpy.random._pickle\n__generator_ctor\nX\x01\x00\x00\x00xctransformers.training_args\nTrainingArguments\n\x86R.",
    "a function as an argument": b"\x80\x02ccollections\nCounter\nc_operator\ngetitem\n\x85R.",
    "a dtype that is called": b"\x80\x02ctorch\nfloat32\n)R.",
    "a __setstate__ in a state": b"\x80\x02cargparse\nNamespace\n)\x81}X\x0c\x00\x00\x00__setstate__c__builtin__\nlist\nsb.",
    "a __setstate__ among the items": b"\x80\x02clightning.fabric.utilities.data\nAttributeDict\n)\x81X\x0c\x00\x00\x00__setstate__c__builtin__\nlist\ns.",
    "two states": b"\x80\x02cargparse\nNamespace\n)\x81}X\x01\x00\x00\x00aK\x01sb}b.",
    "a state of methods": b"\x80\x02ccollections\nOrderedDict\n)R}X\x05\x00\x00\x00itemsK\x01sb.",
    "a tensor made by another function": b"\x80\x02ctorch._tensor\n_rebuild_from_type_v2\n(cargparse\nNamespace\nctorch\nTensor\n)}tR.",
}  # fmt: skip


@pytest.mark.parametrize("name", MISUSED)
def test_known_names_are_used_in_no_other_way_than_pickles_use_them(tmp_path: Path, name: str) -> None:
    with pytest.raises(BrokenCheckpoint, match=r"crafted\.pt: data\.pkl cannot be read"):
        open_torch_file(crafted(tmp_path / "crafted.pt", MISUSED[name]))


def test_all_unknown_names_of_a_file_are_in_one_error(tmp_path: Path) -> None:
    path = saved(tmp_path / "own.pt", [Colour.RED, Outer(), Outer.Inner()])
    module = __name__
    with pytest.raises(UnsafePickle, match="--allow-global") as raised:
        open_torch_file(path)
    flags = str(raised.value).split("(--allow-global ")[1].split(")")[0].split(" --allow-global ")
    assert flags == [f"{module}.Colour", f"{module}.Outer", f"{module}.Outer.Inner"]
    tree = open_torch_file(path, frozenset(flags)).tree
    assert [stub.callee.name for stub in tree["value"]] == ["Colour", "Outer", "Outer.Inner"]
    assert tree["value"][2].state == {"size": 3}
    written, _ = repickle(tree)
    assert pickle.loads(written)["value"][2].size == 3
    with pytest.raises(UnsafePickle, match=rf"names the global {module}\.Outer\.Inner,"):
        open_torch_file(path, frozenset(flags[:2]))


def test_a_member_of_a_known_enum_by_its_name_is_a_value(tmp_path: Path) -> None:
    """As Python 3.11.0 to 3.11.3 pickle it."""
    member = b"c__builtin__\ngetattr\ncdeepspeed.runtime.zero.config\nZeroStageEnum\nX\x07\x00\x00\x00weights\x86R"
    value = open_torch_file(crafted(tmp_path / "member.pt", b"\x80\x02" + member + b".")).tree
    assert isinstance(value, Stub)
    assert value.args[1] == "weights"
    with pytest.raises(UnsafePickle, match=r"ZeroStageEnum\.weights"):
        open_torch_file(crafted(tmp_path / "called.pt", b"\x80\x02" + member + b")R."))


def test_no_known_name_has_a_dot_that_protocol_4_could_follow(tmp_path: Path) -> None:
    name = b"\x80\x04\x8c\x08zoneinfo\x8c\x12ZoneInfo._unpickle\x93."
    with pytest.raises(UnsafePickle, match=r"zoneinfo\.ZoneInfo\._unpickle"):
        open_torch_file(crafted(tmp_path / "dotted.pt", name))

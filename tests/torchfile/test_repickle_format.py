"""The pickles that we write are read by the standard library and by our own reader, on every Python version."""

import ast
import inspect
import pickle
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wsm_ds.errors import UnsupportedLayout
from wsm_ds.torchfile import Global, Stub, Tensor, TorchFile, archive_of, open_torch_file, repickle
from wsm_ds.torchfile.unpickle import unpickle

GOLDEN = Path(__file__).parent.parent / "golden"
LONGEST = 255 * 8 - 1  # bits of LONG1's integers
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(2**LONGEST), 2**LONGEST - 1)
    | st.floats(allow_nan=False)
    | st.text()
    | st.binary()
)
TREES = st.recursive(
    SCALARS | st.sets(st.integers()) | st.frozensets(st.text()),
    lambda inner: (
        st.lists(inner)
        | st.tuples(inner, inner)
        | st.lists(inner, min_size=4).map(tuple)
        | st.dictionaries(st.text() | st.integers(-(2**60), 2**60), inner)
    ),
)


def data_of(tree: Any) -> bytes:
    return repickle.repickle(tree)[0]


@given(TREES)
def test_plain_data_comes_back_from_the_standard_library(tree: Any) -> None:
    assert pickle.loads(data_of(tree)) == tree


@pytest.mark.parametrize("value", [0, 255, 256, 65535, 65536, -1, 2**31 - 1, 2**31, -(2**31), -(2**31) - 1, -(2**39)])
def test_an_integer_is_as_short_as_the_standard_library_writes_it(value: int) -> None:
    assert data_of(value) == pickle.dumps(value, protocol=2)


@pytest.mark.parametrize("count", [0, 1, 2, 999, 1002, 2500])
def test_long_lists_and_dicts_are_written_in_batches_of_the_same_size(count: int) -> None:
    for tree in (list(range(count)), dict.fromkeys(range(count))):
        assert data_of(tree) == pickle.dumps(tree, protocol=2)


def test_an_object_in_two_places_stays_one_object() -> None:
    shared: list[int] = [1]
    loaded = pickle.loads(data_of({"a": shared, "b": (shared, shared)}))
    assert loaded["a"] is loaded["b"][0] is loaded["b"][1]


def test_more_objects_than_a_byte_can_number_are_still_told_apart() -> None:
    rows = [[number] for number in range(300)]
    loaded = pickle.loads(data_of([rows, rows[299]]))
    assert loaded[0] == rows
    assert loaded[1] is loaded[0][299]


@pytest.mark.parametrize("others", [(), (1, 2, 3)])
def test_a_tuple_that_holds_itself_through_a_list_comes_back(others: tuple[int, ...]) -> None:
    inner: list[Any] = []
    tree = (inner, *others)
    inner.append(tree)
    loaded = pickle.loads(data_of(tree))
    assert loaded[0][0] is loaded
    assert loaded[1:] == others


def test_an_ordered_dict_keeps_its_order_and_attributes() -> None:
    tree = OrderedDict(b=1, a=2)
    vars(tree)["_metadata"] = {"version": 1}
    loaded = pickle.loads(data_of(tree))
    assert type(loaded) is OrderedDict
    assert list(loaded.items()) == [("b", 1), ("a", 2)]
    assert vars(loaded) == {"_metadata": {"version": 1}}


def test_what_is_nested_deeper_than_python_recurses_is_refused() -> None:
    tree: list[Any] = []
    for _ in range(100_000):
        tree = [tree]
    with pytest.raises(UnsupportedLayout, match="nested too deeply"):
        data_of(tree)


def test_an_object_that_no_torch_file_holds_is_a_programming_error() -> None:
    with pytest.raises(TypeError, match="PosixPath"):
        data_of({"path": Path("/")})


def described(value: Any, file: TorchFile) -> Any:
    """A tree in which tensors and objects that were never imported are plain data, without storage keys."""
    if isinstance(value, Tensor):
        record = file.record(value)
        return ("tensor", value.shape, value.stride, value.offset, value.dtype.name, record.nbytes)
    if isinstance(value, Stub):
        inner = (value.args, value.items, value.entries, value.state)
        return ("object", str(value.callee), value.is_new, described(inner, file))
    if isinstance(value, Global):
        return ("global", str(value))
    if isinstance(value, dict):
        return [type(value).__name__, *((key, described(item, file)) for key, item in value.items())]
    return [type(value).__name__, *(described(v, file) for v in value)] if isinstance(value, list | tuple) else value


@pytest.mark.parametrize("path", sorted(GOLDEN.glob("*/global_step2/*.pt")), ids=lambda path: f"{path.parts[-3:]}")
def test_a_file_that_deepspeed_wrote_is_the_same_when_it_is_read_again(path: Path) -> None:
    file = open_torch_file(path)
    data, storages = repickle.repickle(file.tree)
    records = file.archive.records
    renamed = [records[f"data/{storage.key}"]._replace(name=f"data/{key}") for key, storage in storages.items()]
    again = TorchFile(archive_of(path, file.archive.nbytes, renamed), unpickle(file.archive, data))
    assert described(again.tree, again) == described(file.tree, file)


def test_the_writer_uses_no_private_name_of_the_standard_library() -> None:
    """CPython changes the signatures of its Python pickler's methods (3.14 did)."""
    names = [node for node in ast.walk(ast.parse(inspect.getsource(repickle))) if isinstance(node, ast.Attribute)]
    assert [
        n.attr for n in names if isinstance(n.value, ast.Name) and n.value.id == "pickle" and n.attr[0] == "_"
    ] == []

"""A short round of each loop; `python tests/loops/file_system.py LOOP --count N --seed S` does a long one."""

import pytest
from loops import file_system


@pytest.mark.parametrize("name", ["kills", "races", "limits", "paths"])
def test_a_short_round_ends_as_promised(name: str) -> None:
    assert file_system.run_loop(name, seed=7, count=4).total() >= 4

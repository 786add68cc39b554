"""Dtypes: their names, sizes, and conversions that agree with torch bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from lazy import torch

from wsm_ds.dtypes import BY_NAME, narrow, widen

BITS = st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=50)


@given(BITS)
@pytest.mark.parametrize(("name", "torch_name"), [("bf16", "bfloat16"), ("fp16", "float16")])
def test_rounding_is_that_of_torch_for_every_finite_float(name: str, torch_name: str, bits: list[int]) -> None:
    values = np.array(bits, dtype=np.uint32).view(np.float32)
    values = values[np.isfinite(values)]
    ours = narrow(values, BY_NAME[name]).view(np.uint16)
    assert np.array_equal(ours, torch.from_numpy(values).to(getattr(torch, torch_name)).view(torch.uint16).numpy())


def test_widening_is_exact() -> None:
    every = np.arange(2**16, dtype=np.uint16)
    assert np.array_equal(
        widen(every, BY_NAME["bf16"]),
        torch.from_numpy(every).view(torch.bfloat16).float().numpy(),
        equal_nan=True,
    )

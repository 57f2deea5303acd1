"""splitmix64 gives the same bits for Python's integers, NumPy's and torch's."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from gkd_ds.runtime.hashing import MASK_64, splitmix64, splitmix64_array, splitmix64_tensor


def test_published_values() -> None:
    """The first numbers of the generator with seed 1234567, from its reference in C."""
    state, drawn = 1234567, []
    for _ in range(3):
        drawn.append(splitmix64(state))
        state = (state + 0x9E3779B97F4A7C15) & MASK_64
    assert drawn == [6457827717110365317, 3203168211198807973, 9817491932198370423]


@given(st.lists(st.integers(0, MASK_64), min_size=1, max_size=8))
def test_all_kinds_of_numbers_agree(values: list[int]) -> None:
    expected = [splitmix64(value) for value in values]
    array = np.array(values, dtype=np.uint64)
    assert splitmix64_array(array).tolist() == expected
    tensor = splitmix64_tensor(torch.from_numpy(array.view(np.int64)))
    assert [value & MASK_64 for value in tensor.tolist()] == expected

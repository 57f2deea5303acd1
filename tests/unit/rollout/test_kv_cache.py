"""The cache with room against transformers' own, and how often it copies."""

import pytest
import torch
from transformers.cache_utils import DynamicLayer

from gkd_ds.rollout.kv_cache import ROOM, RoomyLayer


@pytest.mark.parametrize(
    "lengths", [[5], [5, 1, 1], [3, ROOM, 1, 1], [1] * (2 * ROOM + 5), [7, 3 * ROOM, 2]]
)
def test_it_holds_what_transformers_cache_holds(lengths: list[int]) -> None:
    ours, theirs, generator = RoomyLayer(), DynamicLayer(), torch.Generator().manual_seed(0)
    for length in lengths:
        keys, values = (torch.randn(3, 2, length, 4, generator=generator) for _ in range(2))
        got, expected = ours.update(keys, values), theirs.update(keys, values)
        assert all(torch.equal(one, other) for one, other in zip(got, expected, strict=True))
        assert ours.get_seq_length() == theirs.get_seq_length()


def test_rows_and_positions_can_be_replaced() -> None:
    layer, keys = RoomyLayer(), torch.randn(4, 2, 6, 8)
    layer.update(keys, -keys)
    layer.replace(layer.keys[[0, 3], :, 2:], layer.values[[0, 3], :, 2:])
    new = torch.randn(2, 2, 1, 8)
    got_keys, got_values = layer.update(new, -new)
    assert torch.equal(got_keys, torch.cat([keys[[0, 3], :, 2:], new], 2)) and torch.equal(
        got_values, -got_keys
    )


def test_a_step_copies_the_cache_only_when_its_room_is_used_up() -> None:
    layer, places = RoomyLayer(), set()
    for _ in range(4 * ROOM):
        keys, _ = layer.update(torch.zeros(2, 2, 1, 4), torch.zeros(2, 2, 1, 4))
        places.add(keys.untyped_storage().data_ptr())
    assert len(places) <= 5

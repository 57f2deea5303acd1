"""The key-value cache of the decode loop: transformers' own, with room behind the positions that
are in use.

transformers appends by concatenation, which copies the whole cache at every step. Here a step
writes one position. Shapes: B sequences, H key-value heads, L positions in use, C >= L positions of
room, D head width.
"""

from __future__ import annotations

from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

# Positions that are added when the room is used up: the cache is copied once in so many steps.
ROOM = 64


def empty_cache() -> DynamicCache:
    """A full-length cache for any attention model; its layers come into being as the model uses
    them.
    """
    cache = DynamicCache()
    cache.layer_class_to_replicate = RoomyLayer
    return cache


class RoomyLayer(DynamicLayer):
    """`keys` and `values` `[B, H, L, D]` are views of the first L positions of `[B, H, C, D]`."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args, **kwargs
    ) -> tuple[Tensor, Tensor]:
        """Append `[B, H, t, D]`; all keys and values.

        (The name and signature are transformers'.)
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.replace(key_states, value_states)
            return self.keys, self.values
        start, end = self.keys.shape[2], self.keys.shape[2] + key_states.shape[2]
        if end > self.keys_BHCD.shape[2]:
            self.replace(self.keys, self.values, end + ROOM)
        self.keys_BHCD[:, :, start:end] = key_states
        self.values_BHCD[:, :, start:end] = value_states
        self.keys, self.values = self.keys_BHCD[:, :, :end], self.values_BHCD[:, :, :end]
        return self.keys, self.values

    def replace(self, keys_BHLD: Tensor, values_BHLD: Tensor, capacity: int | None = None) -> None:
        """Copy these into room of their own: other sequences or positions, or more room for the
        same.
        """
        self.keys_BHCD, self.keys = _with_room(keys_BHLD, capacity)
        self.values_BHCD, self.values = _with_room(values_BHLD, capacity)


def _with_room(tensor_BHLD: Tensor, capacity: int | None) -> tuple[Tensor, Tensor]:
    B, H, L, D = tensor_BHLD.shape
    room_BHCD = tensor_BHLD.new_empty(B, H, capacity or L + ROOM, D)
    room_BHCD[:, :, :L] = tensor_BHLD
    return room_BHCD, room_BHCD[:, :, :L]

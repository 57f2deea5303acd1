"""A model's forward as the decode loops see it: new tokens in, logits of the last position out.

Shapes: B sequences, t new tokens of each, L positions so far with them, V the shared vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers.generation.utils import ALL_CACHE_NAMES

from gkd_ds.engine.causal_lm import LogitTransform, body

# (ids [B, t], mask [B, L] or None, positions [B, t], cache) -> logits [B, V]
Forward = Callable[[Tensor, "Tensor | None", Tensor, DynamicCache], Tensor]
# (ids [B, t], positions [1, t], cache or None for the first) -> logits [B, V] and the cache with
# the new tokens
CachedForward = Callable[[Tensor, Tensor, Any], tuple[Tensor, Any]]


def decoding_forward(model: PreTrainedModel, vocabulary: int) -> Forward:
    """Over a key-value cache of ours, with padding on the left."""
    run, last_logits = body(model), _last_logits(model, vocabulary)
    name = _cache_name(inspect.signature(run.forward).parameters)

    def forward(
        ids_Bt: Tensor, mask_BL: Tensor | None, positions_Bt: Tensor, cache: DynamicCache
    ) -> Tensor:
        output = run(
            input_ids=ids_Bt,
            attention_mask=mask_BL,
            position_ids=positions_Bt,
            use_cache=True,
            **{name: cache},
        )
        return last_logits(output.last_hidden_state)

    return forward


def cached_forward(model: PreTrainedModel, vocabulary: int) -> CachedForward:
    """Over the model's own cache, whatever it is: the model makes it, and gets back what it
    returned. No padding.
    """
    run, last_logits = body(model), _last_logits(model, vocabulary)
    parameters = inspect.signature(run.forward).parameters
    name = _cache_name(parameters)

    def forward(ids_Bt: Tensor, positions_1t: Tensor, cache: Any) -> tuple[Tensor, Any]:
        past = {} if cache is None else {name: cache}
        if "position_ids" in parameters:
            past["position_ids"] = positions_1t.expand(ids_Bt.shape)
        output = run(input_ids=ids_Bt, use_cache=True, **past)
        return last_logits(output.last_hidden_state), output[name]

    return forward


@dataclass
class Tokens:
    """The cache of a model that is used without one: all tokens so far."""

    ids_BL: Tensor

    def reorder_cache(self, rows_B: Tensor) -> None:
        """Keep these rows. (The name is transformers'.)"""
        self.ids_BL = self.ids_BL[rows_B]


def whole_forward(model: PreTrainedModel, vocabulary: int) -> CachedForward:
    """Without any cache: the whole sequences again, for every token."""
    run, last_logits = body(model), _last_logits(model, vocabulary)

    def forward(
        ids_Bt: Tensor, positions_1t: Tensor, cache: Tokens | None
    ) -> tuple[Tensor, Tokens]:
        cache = Tokens(ids_Bt if cache is None else torch.cat([cache.ids_BL, ids_Bt], 1))
        output = run(input_ids=cache.ids_BL, use_cache=False)
        return last_logits(output.last_hidden_state), cache

    return forward


def _cache_name(names: Iterable[str]) -> str:
    """The argument that takes the cache. Models from the hub that bring their own code may have the
    name that transformers 5.24 gave up.
    """
    return next((name for name in ALL_CACHE_NAMES if name in names), "past_key_values")


def _last_logits(model: PreTrainedModel, vocabulary: int) -> Callable[[Tensor], Tensor]:
    """Hidden states `[B, t, D]` -> logits of the last position `[B, V]`."""
    head: nn.Module = model.get_output_embeddings()
    transform = LogitTransform.of(model.config)
    return lambda hidden_BtD: transform.apply_(head(hidden_BtD[:, -1]))[:, :vocabulary]

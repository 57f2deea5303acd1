"""How much a model keeps of a sequence that it decodes, in numbers (not bytes)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from gkd_ds.engine.causal_lm import CachedForward, cached_forward


@dataclass(frozen=True)
class CacheSize:
    """Of one sequence: keys and values of each token, and states that do not grow."""

    per_token: int
    states: int

    def of(self, tokens: int) -> int:
        return self.per_token * tokens + self.states


@torch.no_grad()
def measured(forward: CachedForward, device: torch.device) -> CacheSize:
    """What the cache of one token and of two hold. (Sliding windows are longer than that.)"""
    sizes = []
    for length in (1, 2):
        positions_1t = torch.arange(length, device=device)[None]
        _, cache = forward(positions_1t, positions_1t, None)
        held = (tensor for tensor in _tensors(cache, set()) if tensor.dim() > 1)  # others count
        sizes.append(sum(tensor.numel() for tensor in held))
    one, two = sizes
    return CacheSize(per_token=two - one, states=max(0, 2 * one - two))


def estimated(model: PreTrainedModel) -> CacheSize:
    """The same without weights or a device: the forward runs on torch's meta device.

    Where it does not, because it asks for a number or has kernels of its own, every layer is taken
    to be one of attention.
    """
    with torch.device("meta"):
        twin = type(model)(model.config).to(torch.bfloat16).eval()
    try:
        return measured(cached_forward(twin, 1), torch.device("meta"))
    except Exception:  # anything that an architecture's own code may say
        return CacheSize(kv_elements_per_token(model), 0)


def kv_elements_per_token(model: PreTrainedModel) -> int:
    """Numbers in the keys and values of one token, if every layer keeps as many as the largest."""
    config = model.config.get_text_config()
    heads = largest(config, "num_key_value_heads") or largest(config, "num_attention_heads")
    return 2 * len(config.per_layer_config) * heads * head_size(config)


def head_size(config: PreTrainedConfig) -> int:
    """The width of the largest attention head; 0 for a model without attention."""
    queries = largest(config, "num_attention_heads")
    own = [largest(config, name) for name in ("head_dim", "v_head_dim", "qk_head_dim")]
    return max(own) or (config.get_text_config().hidden_size // queries if queries else 0)


def largest(config: PreTrainedConfig, name: str) -> int:
    """A size that a configuration gives its layers: the largest where they differ, 0 for none."""
    layers = config.get_text_config().per_layer_config
    sizes = [getattr(layer, name, None) or 0 for layer in layers]
    return max(max(size) if isinstance(size, list | tuple) else size for size in sizes)


def _tensors(held: Any, seen: set[int]) -> Iterator[Tensor]:
    """The tensors in an object of any class, each once."""
    if id(held) in seen:
        return
    seen.add(id(held))
    if isinstance(held, Tensor):
        yield held
        return
    if isinstance(held, dict):
        inside = list(held.values())
    elif isinstance(held, list | tuple):
        inside = list(held)
    else:
        inside = list(getattr(held, "__dict__", {}).values())
    for part in inside:
        yield from _tensors(part, seen)

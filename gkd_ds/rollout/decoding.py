"""The decode loop: it draws tokens, sees where a completion stops, and drops what has finished, so
that work follows the number of real tokens.

It drives any causal language model with attention through its body and a full-length key-value
cache. Prompts are padded on the left. Sequences that have stopped leave the batch and the cache;
prompts that are still waiting take the freed places. Models that keep something else, or cannot be
padded, have a batch of another kind (lockstep.py); the loop is the same.

Shapes: B sequences in the batch, L positions in the cache.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache

from gkd_ds.records import Completions
from gkd_ds.rollout.batch import PREFILL_TOKENS, SYNC_EVERY, Batch
from gkd_ds.rollout.kv_cache import empty_cache
from gkd_ds.rollout.sampling import Sampling, draw


class PaddedBatch(Batch):
    """Sequences at different positions, aligned on the right; `forward` is a Forward."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.mask_BL = torch.empty(0, 0, dtype=torch.long, device=self.device)
        self.padded = False  # without any padding the model needs no mask
        self.cache = empty_cache()

    def wants_refill(self) -> bool:
        """Prefilling few prompts at a time is slow: wait until a quarter of the places is free."""
        return bool(self.waiting) and (self.max_sequences - self.live) * 4 >= min(
            self.max_sequences, len(self.waiting)
        )

    def refill(self) -> None:
        """Prefill some waiting prompts into the free places and draw their first token: one
        forward.
        """
        width = len(self.prompts[self.waiting[0]]) if self.waiting else 1
        room = min(self.max_sequences - self.live, max(1, PREFILL_TOKENS // width))
        taken, self.waiting = self.waiting[:room], self.waiting[room:]
        if not taken:
            return self._dummy_forward()
        lengths = [len(self.prompts[i]) for i in taken]
        pads = [width - length for length in lengths]
        ids_BL = self._tensor(
            [[self.sampling.pad_id] * pad + self.prompts[i] for i, pad in zip(taken, pads)]
        )
        mask_BL = self._tensor([[0] * pad + [1] * length for pad, length in zip(pads, lengths)])
        positions_BL = (mask_BL.cumsum(-1) - 1).clamp(min=0)
        cache, padded = empty_cache(), any(pads)
        logits_BV = self.forward(ids_BL, mask_BL if padded else None, positions_BL, cache)
        self.prefilled_tokens += ids_BL.numel()
        prompt_B = self._tensor(taken)
        token_B = draw(logits_BV, self.uniform_RP[prompt_B, 0], self.sampling.temperature)
        self._note(prompt_B, token_B[:, None])
        self._join(cache, mask_BL, padded)
        self.prompt_B, self.token_B = (
            torch.cat([self.prompt_B, prompt_B]),
            torch.cat([self.token_B, token_B]),
        )

    def advance(self, steps: int) -> None:
        """Decode steps of every sequence in the batch: as many forwards. Waits for nothing."""
        if not self.live:
            for _ in range(steps):
                self._dummy_forward()
            return
        place_Bs = self.count_R[self.prompt_B, None] + torch.arange(steps, device=self.device)
        uniform_Bs = self.uniform_RP[self.prompt_B[:, None], place_Bs]
        # A sequence goes on after its end until it is dropped: not beyond the positions that the
        # model may have.
        position_Bs = (
            self.prompt_length_R[self.prompt_B, None]
            + place_Bs.minimum(self.limit_R[self.prompt_B, None])
            - 1
        )
        length = self.mask_BL.shape[1]
        self.mask_BL = F.pad(self.mask_BL, (0, steps), value=1)
        tokens_Bs = torch.empty_like(place_Bs)
        for step in range(steps):
            mask_BL = self.mask_BL[:, : length + step + 1] if self.padded else None
            logits_BV = self.forward(
                self.token_B[:, None], mask_BL, position_Bs[:, step : step + 1], self.cache
            )
            self.token_B = tokens_Bs[:, step] = draw(
                logits_BV, uniform_Bs[:, step], self.sampling.temperature
            )
        self.decoded_sequences += steps * self.live
        self._note(self.prompt_B, tokens_Bs)

    def drop_finished(self) -> None:
        """Take the sequences that have stopped out of the batch, and the padding that no remaining
        sequence needs.
        """
        keep_B = (~self._finished(self.prompt_B)).nonzero()[:, 0]
        if keep_B.numel() == self.live:
            return
        self.prompt_B, self.token_B, self.mask_BL = (
            self.prompt_B[keep_B],
            self.token_B[keep_B],
            self.mask_BL[keep_B],
        )
        useful_L = self.mask_BL.any(0)
        cut = int(useful_L.int().argmax()) if self.live else self.mask_BL.shape[1]
        self.mask_BL = self.mask_BL[:, cut:]
        self.padded = self.padded and not bool(self.mask_BL.all())
        for layer in self.cache.layers:
            layer.replace(layer.keys[keep_B, :, cut:], layer.values[keep_B, :, cut:])

    def _join(self, cache: DynamicCache, mask_BL: Tensor, padded: bool) -> None:
        """Append freshly prefilled sequences to the batch, aligning both caches on the right."""
        if not self.live:
            self.cache, self.mask_BL, self.padded = cache, mask_BL, padded
            return
        old, new = self.mask_BL.shape[1], mask_BL.shape[1]
        self.padded = self.padded or padded or old != new
        extend = lambda tensor, by: F.pad(tensor, by) if any(by) else tensor  # noqa: E731
        pad_old, pad_new = max(new - old, 0), max(old - new, 0)
        self.mask_BL = torch.cat(
            [extend(self.mask_BL, (pad_old, 0)), extend(mask_BL, (pad_new, 0))]
        )
        for ours, theirs in zip(self.cache.layers, cache.layers):
            ours.replace(
                torch.cat(
                    [extend(ours.keys, (0, 0, pad_old, 0)), extend(theirs.keys, (0, 0, pad_new, 0))]
                ),
                torch.cat(
                    [
                        extend(ours.values, (0, 0, pad_old, 0)),
                        extend(theirs.values, (0, 0, pad_new, 0)),
                    ]
                ),
            )

    def _dummy_forward(self) -> None:
        one_11 = self._tensor([[self.sampling.pad_id]])
        self.forward(one_11, None, torch.zeros_like(one_11), empty_cache())


@torch.no_grad()
def decode(
    forward: Callable,
    prompts: list[list[int]],
    sample_ids: list[int],
    sampling: Sampling,
    device: torch.device,
    max_sequences: int | None = None,
    agree: Callable[[bool], bool] = bool,
    heartbeat: Callable[[], None] = lambda: None,
    batch_class: Callable[..., Batch] = PaddedBatch,
    begun: list[list[int]] | None = None,
) -> Completions:
    """Complete every prompt.

    Args: `forward` runs the model on new tokens and extends the cache, as `batch_class` calls it;
    `max_sequences` bounds the sequences decoded at a time (None: all); `agree` is the logical *or*
    over the ranks that must run `forward` in step (parameters that stay partitioned), and the
    identity where each rank decodes on its own; `heartbeat` is called every few steps; `begun` are
    the tokens that each completion has already, if any.
    """
    places = max_sequences or max(len(prompts), 1)
    batch = batch_class(forward, prompts, sample_ids, sampling, device, places, begun)
    while agree(batch.live > 0 or bool(batch.waiting)):
        if agree(batch.wants_refill()):
            batch.refill()
        batch.advance(SYNC_EVERY)
        batch.drop_finished()
        heartbeat()
    return batch.completions()

"""Decoding without padding: all sequences of a batch are at the same position.

For caches that are more than keys and values (recurrent states know nothing of padding), and for
models that count positions themselves. A batch is prefilled as far as its shortest prompt; from
there a longer prompt gives its own tokens, one a step, while the others are drawn already. So every
forward is one of real tokens at the same positions, as if each sequence were alone.

Slower than decoding.py's batch: no prompt joins a batch before all of it has finished. Shapes: B
sequences in the batch, R prompts of the call, L positions of the longest prompt, V vocabulary.
"""

from __future__ import annotations

from bisect import bisect_right
from typing import Any

import torch
from torch import Tensor

from gkd_ds.rollout.batch import PREFILL_TOKENS, Batch
from gkd_ds.rollout.sampling import draw


class LockstepBatch(Batch):
    """Sequences at one position, in the order of their prompts' lengths, the shortest first;
    `forward` is a CachedForward. Whoever has stopped leaves the cache.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        longest = max(map(len, self.prompts), default=0)
        padded = [ids + [self.sampling.pad_id] * (longest - len(ids)) for ids in self.prompts]
        self.prompt_RL = self._tensor(padded)
        self.cache: Any = None
        self.length = 0  # tokens in the cache
        self.prompt_lengths: list[int] = []  # of the sequences in the batch
        self.end = 0  # the length at which all of them have finished

    def wants_refill(self) -> bool:
        """Only an empty batch can begin anew."""
        return bool(self.waiting) and not self.live

    def refill(self) -> None:
        """Begin with some waiting prompts, the longest: one forward."""
        if self.live or not self.waiting:
            return self._dummy_forward()
        # A shorter prompt walks along the longest one, unless a batch of its own would be shorter.
        longest = len(self.prompts[self.waiting[0]])
        near = [i for i in self.waiting if longest - len(self.prompts[i]) <= self.limits[i]]
        room = min(self.max_sequences, max(1, PREFILL_TOKENS // longest), len(near))
        taken, self.waiting = near[:room][::-1], [i for i in self.waiting if i not in near[:room]]
        self.prompt_B = self._tensor(taken)
        self.prompt_lengths = [len(self.prompts[i]) for i in taken]
        self.end = max(len(self.prompts[i]) + self.limits[i] for i in taken)
        self.cache, self.length = None, 0
        self._step(self.prompt_RL[self.prompt_B, : self.prompt_lengths[0]])
        self.prefilled_tokens += self.live * self.length

    def advance(self, steps: int) -> None:
        for _ in range(steps):
            # Not beyond the positions that the model may have: what is left are finished sequences.
            if self.live and self.length < self.end:
                self._step(self.token_B[:, None])
                self.decoded_sequences += self.live
            else:
                self._dummy_forward()

    def drop_finished(self) -> None:
        keep = (~self._finished(self.prompt_B)).nonzero()[:, 0].tolist()
        if len(keep) == self.live:
            return
        keep_B = self._tensor(keep)
        self.prompt_B, self.token_B = self.prompt_B[keep_B], self.token_B[keep_B]
        self.prompt_lengths = [self.prompt_lengths[row] for row in keep]
        if keep:
            self.cache.reorder_cache(keep_B)
        else:
            self.cache = None

    def _step(self, ids_Bt: Tensor) -> None:
        """Extend every sequence by `ids_Bt`, and say which token comes next: a drawn one, or the
        prompt's.
        """
        end = self.length + ids_Bt.shape[1]
        positions_1t = torch.arange(self.length, end, device=self.device)[None]
        logits_BV, self.cache = self.forward(ids_Bt, positions_1t, self.cache)
        self.length = end
        drawing = bisect_right(self.prompt_lengths, end)  # the others' prompts go on
        self.token_B = self.prompt_RL[self.prompt_B, min(end, self.prompt_RL.shape[1] - 1)]
        if drawing:
            prompt_b = self.prompt_B[:drawing]
            uniform_b = self.uniform_RP[prompt_b, self.count_R[prompt_b]]
            token_b = draw(logits_BV[:drawing], uniform_b, self.sampling.temperature)
            self.token_B[:drawing] = token_b
            self._note(prompt_b, token_b[:, None])

    def _dummy_forward(self) -> None:
        one_11 = self._tensor([[self.sampling.pad_id]])
        self.forward(one_11, torch.zeros_like(one_11), None)


class WholeLockstepBatch(LockstepBatch):
    """Nobody leaves before all have finished: for caches that cannot let a sequence go."""

    def drop_finished(self) -> None:
        if self._finished(self.prompt_B).all():
            super().drop_finished()

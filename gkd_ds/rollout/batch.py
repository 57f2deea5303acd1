"""The sequences being decoded, and what has been drawn for them: what all ways to decode share.

Shapes: B sequences in the batch, R prompts of the call, P positions of a completion, s tokens drawn
at a time, V vocabulary.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

from gkd_ds.records import Completions
from gkd_ds.rollout.sampling import Sampling, uniforms

# Reading which sequences have stopped is the loop's only wait for the device. A finished sequence
# is computed for one and a half steps in vain on average: under 2 % of a hundred tokens.
SYNC_EVERY = 4
# Prompt tokens, with padding, that are prefilled at a time.
PREFILL_TOKENS = 16_384


class Batch(ABC):
    """Tensors `[R]` and `[R, P]` cover all prompts, `[B]` the sequences now in the batch.

    `begun[i]` are tokens that completion i has already, fewer than it may get. They are prefilled
    with its prompt; what is drawn, counted and limited here is the rest.
    """

    def __init__(
        self,
        forward: Callable,
        prompts: list[list[int]],
        sample_ids: list[int],
        sampling: Sampling,
        device: torch.device,
        max_sequences: int,
        begun: list[list[int]] | None = None,
    ):
        self.begun = begun or [[] for _ in prompts]
        starts = [len(ids) for ids in self.begun]
        # How many tokens each completion may still get.
        self.limits = [sampling.limit(ids) - start for ids, start in zip(prompts, starts)]
        prompts = [prompt + ids for prompt, ids in zip(prompts, self.begun)]
        self.forward, self.prompts, self.sampling, self.device, self.max_sequences = (
            forward, prompts, sampling, device, max_sequences)  # fmt: skip
        # Longest first: neighbours are padded little, and the long ones start early.
        self.waiting = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
        self.limit_R = torch.tensor(self.limits, dtype=torch.long, device=device)
        # Positions beyond the limit take what a sequence is given between its end and its leaving.
        positions = max(self.limits, default=1) + SYNC_EVERY
        self.uniform_RP = uniforms(sampling.seed, sample_ids, positions, device, starts)
        self.tokens_RP = torch.zeros_like(self.uniform_RP, dtype=torch.long)
        self.count_R = torch.zeros_like(self.limit_R)
        self.stopped_R = torch.zeros_like(self.limit_R, dtype=torch.bool)
        self.stop_ids = torch.tensor(sampling.stop_ids, dtype=torch.long, device=device)
        self.decoded_sequences = self.prefilled_tokens = 0
        self.prompt_length_R = torch.tensor(
            [len(p) for p in prompts], dtype=torch.long, device=device
        )
        # The prompt that each sequence of the batch completes, as an index into the call's prompts.
        self.prompt_B = torch.empty(0, dtype=torch.long, device=device)
        self.token_B = self.prompt_B  # its newest token, which the model has not seen yet

    @abstractmethod
    def wants_refill(self) -> bool:
        """Whether waiting prompts should be prefilled now."""

    @abstractmethod
    def refill(self) -> None:
        """Prefill some waiting prompts, or none: one forward."""

    @abstractmethod
    def advance(self, steps: int) -> None:
        """Decode steps of every sequence in the batch: as many forwards. Waits for nothing."""

    @abstractmethod
    def drop_finished(self) -> None:
        """Take the sequences that have stopped out of the batch."""

    @property
    def live(self) -> int:
        return self.prompt_B.numel()

    def completions(self) -> Completions:
        counts = self.count_R.tolist()
        tokens = self.tokens_RP.tolist()
        token_ids = [begun + ids[:count] for begun, ids, count in zip(self.begun, tokens, counts)]
        return Completions(
            token_ids, self.stopped_R.tolist(), self.decoded_sequences, self.prefilled_tokens
        )

    def _note(self, prompt_B: Tensor, tokens_Bs: Tensor) -> None:
        """Append newly drawn tokens to the completions, up to a sequence's first stop token and its
        limit.
        """
        place_Bs = self.count_R[prompt_B, None] + torch.arange(
            tokens_Bs.shape[1], device=self.device
        )
        stop_Bs = torch.isin(tokens_Bs, self.stop_ids)
        before_stop_Bs = stop_Bs.cumsum(-1) - stop_Bs.long() == 0
        counts_Bs = (
            before_stop_Bs
            & (place_Bs < self.limit_R[prompt_B, None])
            & ~self.stopped_R[prompt_B, None]
        )
        self.tokens_RP[prompt_B[:, None], place_Bs] = (
            tokens_Bs  # what does not count is behind the completion's end
        )
        self.count_R[prompt_B] += counts_Bs.sum(-1)
        self.stopped_R[prompt_B] |= (counts_Bs & stop_Bs).any(-1)

    def _finished(self, prompt_B: Tensor) -> Tensor:
        return self.stopped_R[prompt_B] | (self.count_R[prompt_B] >= self.limit_R[prompt_B])

    def _tensor(self, values: list) -> Tensor:
        return torch.tensor(values, dtype=torch.long, device=self.device)

"""The decode loop: sampling, stopping, and dropping finished rows so that work follows the number
of real tokens.

It drives any causal language model of transformers through its body and a full-length key-value
cache. Prompts are padded on the left. Rows that have stopped leave the batch and the cache; freed
places are refilled from the prompts that are still waiting. Shapes: B rows in the batch, L
positions in the cache, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache

from gkd_ds.rollout.kv_cache import empty_cache
from gkd_ds.runtime.hashing import splitmix64_tensor

# Reading which rows have stopped is the loop's only wait for the device. A finished row is computed
# for one and a half steps in vain on average: under 2 % of a hundred tokens.
SYNC_EVERY = 4
# Padded prompt tokens that are prefilled at a time.
PREFILL_TOKENS = 16_384


@dataclass(frozen=True)
class Sampling:
    """How completions are drawn. `temperature` 0 is greedy. `stop_ids` end a completion and belong
    to it.
    """

    max_new_tokens: int
    temperature: float
    seed: int
    stop_ids: tuple[int, ...]
    pad_id: int
    vocabulary: int
    max_length: int | None = None

    def limit(self, prompt: list[int]) -> int:
        """How many tokens this prompt may get."""
        if self.max_length is None:
            return self.max_new_tokens
        return max(1, min(self.max_new_tokens, self.max_length - len(prompt)))


@dataclass(frozen=True)
class Completions:
    """`token_ids[i]` completes prompt i; `stopped[i]` says whether a stop token ended it.

    `decoded_rows` counts decode steps x rows actually computed, `prefilled_tokens` padded prompt
    tokens.
    """

    token_ids: list[list[int]]
    stopped: list[bool]
    decoded_rows: int
    prefilled_tokens: int


def uniforms(
    seed: int, sample_ids: list[int], positions: int, device: torch.device | str = "cpu"
) -> Tensor:
    """One uniform in [0, 1) per (seed, sample id, position): fp32 `[len(sample_ids), positions]`.

    Counter-based (splitmix64 over the three integers), so a sample's numbers do not depend on the
    batch it sits in, on which rows have finished, on the number of ranks, or on a restart.
    """
    row_B1 = torch.tensor(sample_ids, dtype=torch.int64, device=device)[:, None]
    position_1P = torch.arange(positions, dtype=torch.int64, device=device)[None]
    key = splitmix64_tensor(torch.full((1, 1), seed, dtype=torch.int64, device=device))
    key = splitmix64_tensor(key ^ row_B1)
    key = splitmix64_tensor(key ^ position_1P)
    return ((key >> 40) & 0xFFFFFF).to(torch.float32) / (1 << 24)


def draw(logits_BV: Tensor, uniform_B: Tensor, temperature: float) -> Tensor:
    """The inverse CDF of one uniform per row: token ids `[B]` (int64). `temperature` 0 takes the
    most likely token.

    Two levels: find the block of 256 tokens in which the cumulated probability passes the uniform,
    then the token. A row's result depends on that row alone.
    """
    if temperature == 0:
        return logits_BV.argmax(-1)
    B, V = logits_BV.shape
    block = 256
    weight_BV = logits_BV.float().sub(logits_BV.amax(-1, keepdim=True))
    if temperature != 1:
        weight_BV.div_(temperature)
    weight_BV.exp_()
    if V % block:  # else it would be a copy
        weight_BV = F.pad(weight_BV, (0, -V % block))
    weight_BKb = weight_BV.view(B, -1, block)
    block_end_BK = weight_BKb.sum(-1).cumsum(-1, dtype=torch.float64)
    goal_B1 = uniform_B[:, None] * block_end_BK[:, -1:]
    block_B1 = torch.searchsorted(block_end_BK, goal_B1, right=True).clamp_(
        max=block_end_BK.shape[1] - 1
    )
    before_B1 = torch.where(block_B1 > 0, block_end_BK.gather(1, (block_B1 - 1).clamp_(min=0)), 0.0)
    inside_Bb = weight_BKb[torch.arange(B, device=block_B1.device), block_B1[:, 0]]
    end_Bb = before_B1 + inside_Bb.cumsum(-1, dtype=torch.float64)
    # Rounding may carry the goal past the block's end: then it is the last token that adds to it.
    goal_B1 = torch.minimum(goal_B1, torch.nextafter(end_Bb[:, -1:], before_B1))
    return (block_B1 * block + torch.searchsorted(end_Bb, goal_B1, right=True))[:, 0]


# (ids [B, t], mask [B, L + t] or None, positions [B, t], cache) -> logits of the last position [B,
# V]
Forward = Callable[[Tensor, "Tensor | None", Tensor, DynamicCache], Tensor]


@torch.no_grad()
def decode(
    forward: Forward,
    prompts: list[list[int]],
    sample_ids: list[int],
    sampling: Sampling,
    device: torch.device,
    max_rows: int | None = None,
    agree: Callable[[bool], bool] = bool,
    heartbeat: Callable[[], None] = lambda: None,
) -> Completions:
    """Complete every prompt.

    Args: `forward` runs the model on new tokens and extends the cache; `max_rows` bounds the rows
    decoded at a time (None: all); `agree` is the logical *or* over the ranks that must run
    `forward` in step (parameters that stay partitioned), and the identity where each rank decodes
    on its own; `heartbeat` is called every few steps.
    """
    batch = _Batch(forward, prompts, sample_ids, sampling, device, max_rows or max(len(prompts), 1))
    while agree(batch.live > 0 or bool(batch.waiting)):
        if agree(batch.wants_refill()):
            batch.refill()
        batch.advance(SYNC_EVERY)
        batch.drop_finished()
        heartbeat()
    return batch.completions()


class _Batch:
    """The rows being decoded. Tensors `[R]` and `[R, P]` cover all prompts, `[B]` the rows now in
    the batch.
    """

    def __init__(self, forward, prompts, sample_ids, sampling: Sampling, device, max_rows: int):
        self.forward, self.prompts, self.sampling, self.device, self.max_rows = (
            forward, prompts, sampling, device, max_rows)  # fmt: skip
        # Longest first: neighbours are padded little, and the long ones start early.
        self.waiting = sorted(range(len(prompts)), key=lambda row: -len(prompts[row]))
        limits = [sampling.limit(prompt) for prompt in prompts]
        self.limit_R = torch.tensor(limits, dtype=torch.long, device=device)
        # Positions beyond the limit take what a row is given between its end and its leaving.
        self.uniform_RP = uniforms(
            sampling.seed, sample_ids, max(limits, default=1) + SYNC_EVERY, device
        )
        self.tokens_RP = torch.zeros_like(self.uniform_RP, dtype=torch.long)
        self.count_R = torch.zeros_like(self.limit_R)
        self.stopped_R = torch.zeros_like(self.limit_R, dtype=torch.bool)
        self.stop_ids = torch.tensor(sampling.stop_ids, dtype=torch.long, device=device)
        self.decoded_rows = self.prefilled_tokens = 0
        self.prompt_length_R = torch.tensor(
            [len(p) for p in prompts], dtype=torch.long, device=device
        )
        self.row_B = torch.empty(
            0, dtype=torch.long, device=device
        )  # the prompt that each row of the batch decodes
        self.token_B = self.row_B  # its newest token, which the model has not seen yet
        self.mask_BL = torch.empty(0, 0, dtype=torch.long, device=device)
        self.padded = False  # without any padding the model needs no mask
        self.cache = empty_cache()

    @property
    def live(self) -> int:
        return self.row_B.numel()

    def wants_refill(self) -> bool:
        """Prefilling few rows at a time is slow: wait until a quarter of the places is free."""
        return bool(self.waiting) and (self.max_rows - self.live) * 4 >= min(
            self.max_rows, len(self.waiting)
        )

    def refill(self) -> None:
        """Prefill some waiting prompts into the free places and draw their first token: one
        forward.
        """
        width = len(self.prompts[self.waiting[0]]) if self.waiting else 1
        room = min(self.max_rows - self.live, max(1, PREFILL_TOKENS // width))
        rows, self.waiting = self.waiting[:room], self.waiting[room:]
        if not rows:
            return self._dummy_forward()
        lengths = [len(self.prompts[row]) for row in rows]
        pads = [width - length for length in lengths]
        ids_BL = self._tensor(
            [[self.sampling.pad_id] * pad + self.prompts[row] for row, pad in zip(rows, pads)]
        )
        mask_BL = self._tensor([[0] * pad + [1] * length for pad, length in zip(pads, lengths)])
        positions_BL = (mask_BL.cumsum(-1) - 1).clamp(min=0)
        cache, padded = empty_cache(), any(pads)
        logits_BV = self.forward(ids_BL, mask_BL if padded else None, positions_BL, cache)
        self.prefilled_tokens += ids_BL.numel()
        row_B = self._tensor(rows)
        token_B = draw(logits_BV, self.uniform_RP[row_B, 0], self.sampling.temperature)
        self._note(row_B, token_B[:, None])
        self._join(cache, mask_BL, padded)
        self.row_B, self.token_B = (
            torch.cat([self.row_B, row_B]),
            torch.cat([self.token_B, token_B]),
        )

    def advance(self, steps: int) -> None:
        """Decode steps of every row in the batch: as many forwards. Waits for nothing."""
        if not self.live:
            for _ in range(steps):
                self._dummy_forward()
            return
        place_Bs = self.count_R[self.row_B, None] + torch.arange(steps, device=self.device)
        uniform_Bs = self.uniform_RP[self.row_B[:, None], place_Bs]
        # A row goes on after its end until it is dropped: not beyond the positions that the model
        # may have.
        position_Bs = (
            self.prompt_length_R[self.row_B, None]
            + place_Bs.minimum(self.limit_R[self.row_B, None])
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
        self.decoded_rows += steps * self.live
        self._note(self.row_B, tokens_Bs)

    def drop_finished(self) -> None:
        """Take the rows that have stopped out of the batch, and the padding that no remaining row
        needs.
        """
        keep_B = (~self._finished(self.row_B)).nonzero()[:, 0]
        if keep_B.numel() == self.live:
            return
        self.row_B, self.token_B, self.mask_BL = (
            self.row_B[keep_B],
            self.token_B[keep_B],
            self.mask_BL[keep_B],
        )
        useful_L = self.mask_BL.any(0)
        cut = int(useful_L.int().argmax()) if self.live else self.mask_BL.shape[1]
        self.mask_BL = self.mask_BL[:, cut:]
        self.padded = self.padded and not bool(self.mask_BL.all())
        for layer in self.cache.layers:
            layer.replace(layer.keys[keep_B, :, cut:], layer.values[keep_B, :, cut:])

    def completions(self) -> Completions:
        counts = self.count_R.tolist()
        tokens = self.tokens_RP.tolist()
        token_ids = [row[:count] for row, count in zip(tokens, counts)]
        return Completions(
            token_ids, self.stopped_R.tolist(), self.decoded_rows, self.prefilled_tokens
        )

    def _note(self, row_B: Tensor, tokens_Bs: Tensor) -> None:
        """Append newly drawn tokens to the completions, up to a row's first stop token and its
        limit.
        """
        place_Bs = self.count_R[row_B, None] + torch.arange(tokens_Bs.shape[1], device=self.device)
        stop_Bs = torch.isin(tokens_Bs, self.stop_ids)
        before_stop_Bs = stop_Bs.cumsum(-1) - stop_Bs.long() == 0
        counts_Bs = (
            before_stop_Bs & (place_Bs < self.limit_R[row_B, None]) & ~self.stopped_R[row_B, None]
        )
        self.tokens_RP[row_B[:, None], place_Bs] = (
            tokens_Bs  # what does not count is behind the completion's end
        )
        self.count_R[row_B] += counts_Bs.sum(-1)
        self.stopped_R[row_B] |= (counts_Bs & stop_Bs).any(-1)

    def _finished(self, row_B: Tensor) -> Tensor:
        return self.stopped_R[row_B] | (self.count_R[row_B] >= self.limit_R[row_B])

    def _join(self, cache: DynamicCache, mask_BL: Tensor, padded: bool) -> None:
        """Append freshly prefilled rows to the batch, aligning both caches on the right."""
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

    def _tensor(self, values: list) -> Tensor:
        return torch.tensor(values, dtype=torch.long, device=self.device)

"""Which token comes next: the inverse CDF of one counter-based uniform per (seed, sample,
position).

Nothing else is random in a rollout, and no number depends on the batch. Shapes: B sequences, V
vocabulary, P positions of a completion.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from gkd_ds.runtime.hashing import splitmix64_tensor


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


def uniforms(
    seed: int,
    sample_ids: list[int],
    positions: int,
    device: torch.device | str = "cpu",
    starts: list[int] | None = None,
) -> Tensor:
    """One uniform in [0, 1) per (seed, sample id, position): fp32 `[len(sample_ids), positions]`,
    from the positions `starts` on, or from 0.

    Counter-based (splitmix64 over the three integers), so a sample's numbers do not depend on the
    batch it sits in, on which sequences have finished, on the number of ranks, or on a restart.
    """
    sample_B1 = torch.tensor(sample_ids, dtype=torch.int64, device=device)[:, None]
    position_BP = torch.arange(positions, dtype=torch.int64, device=device)[None]
    if starts is not None:
        position_BP = position_BP + torch.tensor(starts, dtype=torch.int64, device=device)[:, None]
    key = splitmix64_tensor(torch.full((1, 1), seed, dtype=torch.int64, device=device))
    key = splitmix64_tensor(key ^ sample_B1)
    key = splitmix64_tensor(key ^ position_BP)
    return ((key >> 40) & 0xFFFFFF).to(torch.float32) / (1 << 24)


def draw(logits_BV: Tensor, uniform_B: Tensor, temperature: float) -> Tensor:
    """The inverse CDF of one uniform per sequence: token ids `[B]` (int64). `temperature` 0 takes
    the most likely token.

    Two levels: find the block of 256 tokens in which the cumulated probability passes the uniform,
    then the token. A sequence's result depends on that sequence alone.
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

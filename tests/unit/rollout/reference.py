"""What decoding must give: one sequence after the other, whole, without padding or cache."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from gkd_ds.rollout.sampling import Sampling, draw, uniforms


def prompts(count: int, seed: int = 0, longest: int = 30, vocabulary: int = 384) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, longest, (count,), generator=generator).tolist()
    return [
        torch.randint(3, vocabulary, (length,), generator=generator).tolist() for length in lengths
    ]


@torch.no_grad()
def one_by_one(
    model: PreTrainedModel, prompts: list[list[int]], sampling: Sampling
) -> list[list[int]]:
    """No batch, no padding, no cache: the whole sequence through the model for every token."""
    results = []
    for sample_id, prompt in enumerate(prompts):
        uniform = uniforms(sampling.seed, [sample_id], sampling.max_new_tokens)[0]
        tokens: list[int] = []
        while len(tokens) < sampling.limit(prompt) and not (
            tokens and tokens[-1] in sampling.stop_ids
        ):
            ids = torch.tensor([prompt + tokens])
            logits = model(input_ids=ids, use_cache=False).logits[:, -1, : sampling.vocabulary]
            tokens.append(int(draw(logits, uniform[[len(tokens)]], sampling.temperature)))
        results.append(tokens)
    return results

"""The two static methods of TRL's GKDTrainer, for code written against it. gkd_ds itself uses
neither.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gkd_ds.learn.divergence import generalized_jsd


def generalized_jsd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None = None,
    beta: float = 0.5,
    temperature: float = 1.0,
    reduction: str = "batchmean",
    num_items_in_batch: int | Tensor | None = None,
) -> Tensor:
    """The dense generalized JSD (eq. 1 of arXiv 2306.13649) of logits `[B, T, V]`, as TRL reduces
    it.

    `labels [B, T]` leave out positions that are -100. `num_items_in_batch` divides the sum if
    given; otherwise `reduction` is "batchmean" (sum / number of labelled positions, or / B without
    labels), "sum", "mean" (over positions and vocabulary) or anything else for no reduction.
    """
    divergence = generalized_jsd(student_logits, teacher_logits, beta, temperature)
    if labels is not None:
        divergence = divergence[labels != -100]
    if num_items_in_batch is not None:
        return divergence.sum() / num_items_in_batch
    if reduction == "batchmean":
        return divergence.sum() / max(divergence.shape[0], 1)
    return {"sum": divergence.sum, "mean": divergence.mean}.get(reduction, lambda: divergence)()


def generate_on_policy_outputs(
    model, inputs: dict[str, Tensor], generation_config, pad_token_id: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Complete `inputs["prompts"] [B, P]`, padded on the left, with `model.generate`.

    Returns token ids, attention mask and labels, all `[B, P + C]`: the mask ends after the first
    stop token, and labels are -100 on the prompt and after the end. Padding is told by position,
    since pad may equal eos: it is what `inputs["prompt_attention_mask"]` leaves out or, without
    one, the `pad_token_id`s before a prompt's first token.
    """
    prompts, prompt_mask = inputs["prompts"], inputs.get("prompt_attention_mask")
    if prompt_mask is None:
        is_token = (
            torch.ones_like(prompts) if pad_token_id is None else (prompts != pad_token_id).long()
        )
        prompt_mask = (is_token.cumsum(-1) > 0).long()
    generated = model.generate(
        input_ids=prompts,
        attention_mask=prompt_mask,
        generation_config=generation_config,
        return_dict_in_generate=True,
    ).sequences
    completion = generated[:, prompts.shape[1] :]
    stop_ids = generation_config.eos_token_id
    if stop_ids is None:  # then generate() stops at the model's own
        stop_ids = model.generation_config.eos_token_id
    if stop_ids is None:
        completion_mask = torch.ones_like(completion)
    else:
        is_stop = torch.isin(completion, torch.tensor(stop_ids, device=completion.device)).long()
        # Up to and including the first stop: no stop token strictly before this position.
        completion_mask = (is_stop.cumsum(-1) - is_stop == 0).long()
    mask = torch.cat([prompt_mask.to(completion_mask.dtype), completion_mask], dim=1)
    labels = generated.masked_fill(mask == 0, -100)
    labels[:, : prompts.shape[1]] = -100
    return generated, mask, labels

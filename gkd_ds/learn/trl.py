"""The two static methods of TRL's GKDTrainer, for code written against it; gkd_ds itself uses
neither. A loss that a subclass puts in the place of the first becomes a formula of ours.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from gkd_ds.learn.divergence import generalized_jsd
from gkd_ds.runtime.errors import InputError


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


def formula_of(loss: Callable[..., Tensor], vocabulary: int) -> Callable[..., Tensor]:
    """`loss`, which has the arguments of `generalized_jsd_loss`, as a formula per token
    (`pipeline.Formula`).

    TRL calls it for a batch and divides by the number of its tokens. Here it is called for one
    token at a time, whatever its habits of reducing. Raises InputError where that is not the same:
    where a token's loss depends on others, or on where it stands.
    """

    def of(student_NV: Tensor, teacher_NV: Tensor, tokens_N: Tensor, beta: float, **more) -> Tensor:
        value = loss(
            student_logits=student_NV[None],
            teacher_logits=teacher_NV[None],
            labels=tokens_N[None],
            beta=beta,
            num_items_in_batch=1,
            **more,
        )
        return value.sum()

    def formula(
        beta: float, temperature: float, student_nV: Tensor, teacher_nV: Tensor, tokens_n: Tensor
    ) -> Tensor:
        more = (
            {} if temperature == 1 else {"temperature": temperature}
        )  # as TRL, which leaves it out
        values = [
            of(student_nV[i : i + 1], teacher_nV[i : i + 1], tokens_n[i : i + 1], beta, **more)
            for i in range(len(tokens_n))
        ]
        return torch.stack(values) if values else student_nV.sum(-1)

    draw = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 3, vocabulary, generator=draw)
    tokens = torch.arange(3) % vocabulary
    alone, together = formula(0.5, 1.0, student, teacher, tokens), of(student, teacher, tokens, 0.5)
    if not any(torch.isclose(together, whole, rtol=1e-3) for whole in (alone.sum(), alone.mean())):
        raise InputError(
            "the generalized_jsd_loss that was put in the place of ours is neither sum nor mean of "
            "the losses of single tokens, which are all that is known here; write an Objective "
            "(gkd_ds/learn/objective.py)."
        )
    return formula

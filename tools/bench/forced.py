"""Completions as long as the workload wants them, in whatever calls transformers' `generate`."""

from __future__ import annotations

import torch
from transformers import StoppingCriteria

from tools.bench.case import Case
from tools.bench.workload import PROMPT_TOKENS, prompt_ids


class ForcedLengths(StoppingCriteria):
    """Ends each row one token before its length: `generate` then writes the end token as the last
    one.
    """

    def __init__(self, lengths: dict[tuple[int, ...], int]):
        self.lengths = lengths

    def __call__(self, input_ids, scores, **kwargs):
        written = input_ids.shape[1] - PROMPT_TOKENS
        if written == 1:
            wanted = [self.lengths[tuple(row)] for row in input_ids[:, :PROMPT_TOKENS].tolist()]
            self.wanted = torch.tensor(wanted, device=input_ids.device)
        return written >= self.wanted - 1


def force_lengths(model, case: Case) -> None:
    """Let `model.generate` end every row at its length, where the workload is ragged."""
    if case.workload.ragged:
        prompts, lengths = case.prompts_and_lengths()
        criterion = ForcedLengths(
            {prompt_ids(prompt): length for prompt, length in zip(prompts, lengths)}
        )
        generate = model.generate
        model.generate = lambda *args, **kwargs: generate(
            *args, stopping_criteria=[criterion], **kwargs
        )

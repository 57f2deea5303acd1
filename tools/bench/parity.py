"""The gate before any timing: loss and gradients of every side on identical tokens (README.md,
"What must agree").

Every process that is going to be timed first computes the loss and the gradients of the same
samples, with its own trainer's loss, and leaves them in a file; the driver compares the files. The
gradient is then applied like any other.
"""

from __future__ import annotations

import random
from pathlib import Path

import torch
from deepspeed.utils import safe_get_full_grad
from torch import nn

from tools.bench.case import Case
from tools.bench.workload import prompt_ids

TOLERANCE = 1e-5


def given_completions(case: Case) -> list[tuple[list[int], list[int]]]:
    """(prompt, completion) of this rank's parity samples: completions of different lengths that
    nobody sampled.
    """
    work = case.workload
    draw = random.Random(7)
    samples = []
    prompts, _ = case.prompts_and_lengths()
    for prompt in prompts[: work.samples * case.world_size]:
        length = draw.randint(work.budget // 4, work.budget)
        samples.append(
            (list(prompt_ids(prompt)), [draw.randrange(3, work.vocabulary) for _ in range(length)])
        )
    return samples[case.rank * work.samples : (case.rank + 1) * work.samples]


def padded(samples: list[tuple[list[int], list[int]]], pad: int) -> dict[str, torch.Tensor]:
    """The samples as the peers' trainers lay them out: padded on the right, labels -100 outside the
    completion.
    """
    width = max(len(prompt) + len(completion) for prompt, completion in samples)
    ids, mask, labels = [], [], []
    for prompt, completion in samples:
        fill = width - len(prompt) - len(completion)
        ids.append(prompt + completion + [pad] * fill)
        mask.append([1] * (len(prompt) + len(completion)) + [0] * fill)
        labels.append([-100] * len(prompt) + completion + [-100] * fill)
    return {
        "input_ids": torch.tensor(ids),
        "attention_mask": torch.tensor(mask),
        "labels": torch.tensor(labels),
    }


def collect_gradients(model: nn.Module, path: Path, pace_rank: int) -> None:
    """Write the whole gradients, as `{parameter name: fp32 tensor}`. Collective under ZeRO; rank 0
    writes.
    """
    gradients = {}
    for name, parameter in model.named_parameters():
        partitioned = hasattr(parameter, "ds_id") or parameter.grad is None
        gradients[name] = (
            (safe_get_full_grad(parameter) if partitioned else parameter.grad)
            .detach()
            .float()
            .cpu()
            .clone()
        )
    if pace_rank == 0:
        torch.save(gradients, path)


def largest_difference(path: Path, reference: Path) -> tuple[float, str]:
    """The largest relative difference of a parameter's gradient, |g - r| / |r| in L2 norm, and
    whose it is.
    """
    ours, theirs = torch.load(path), torch.load(reference)
    assert ours.keys() == theirs.keys(), f"different parameters: {ours.keys() ^ theirs.keys()}"
    differences = {
        name: float(
            (ours[name].double() - theirs[name].double()).norm() / theirs[name].double().norm()
        )
        for name in ours
    }
    worst = max(differences, key=differences.get)
    return differences[worst], worst

"""The recipe that the accelerator and the CPU both run: `python -m tools.gpu_check.recipe
DIRECTORY` leaves DIRECTORY/<precision>/results.pt, fp32 first. Started by against_cpu.py only.

Greedy completions of the untrained student; the gradient of a window of given completions, which is
then applied; three updates on the data's completions. Nothing in it is sampled, so nothing can go
another way because of one rounding but the greedy tokens, of which against_cpu.py says by how much.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import torch

from gkd_ds.pipeline import count_tokens
from gkd_ds.records import Source
from tools.bench.parity import collect_gradients
from tools.gpu_check.materials import given_rollouts, make_trainer, metrics, samples_of

PRECISIONS = {"fp32": {"bf16": False, "tf32": False}, "bf16": {"bf16": True}}


def run(directory: Path, precision: str) -> None:
    trainer = make_trainer(directory, precision, **PRECISIONS[precision])
    pipeline = trainer.pipeline
    pipeline.sampling = dataclasses.replace(pipeline.sampling, temperature=0.0)
    samples = samples_of(trainer)
    completed = pipeline.rollout(samples, {Source.STUDENT})

    rollouts = given_rollouts([sample.prompt_ids for sample in samples], completion_tokens=16)
    total = count_tokens(rollouts)
    learned = pipeline.learn(rollouts, pipeline.score(rollouts), total)
    collect_gradients(trainer.model, directory / precision / "gradients.pt", pace_rank=0)
    assert pipeline.student.update(), "the gradient is not finite"

    trainer.train()
    rows = metrics(directory, precision)
    results = {
        "prompts": [rollout.prompt_ids for rollout in completed],
        "tokens": [rollout.completion_ids for rollout in completed],
        "losses": [sum(learned.divergence) / total, *(row["loss"] for row in rows)],
        "gradient_norms": [row["grad_norm"] for row in rows],
        "device": str(pipeline.student.device),
    }
    torch.save(results, directory / precision / "results.pt")


if __name__ == "__main__":
    for name in PRECISIONS:
        (Path(sys.argv[1]) / name).mkdir()
        run(Path(sys.argv[1]), name)

"""Updates of a real trainer in which nobody, or one rank only, has a completion token; run by
rank_server.py.

It prints, per window, the gradient's norm and whether the weights are the same as before it.
"""

from __future__ import annotations

import json

import torch

from gkd_ds.config.config import GKDConfig
from gkd_ds.config.recipe import read_recipe
from gkd_ds.engine import zero
from gkd_ds.pipeline import count_tokens
from gkd_ds.records import Rollout, Source
from gkd_ds.runtime import ranks
from gkd_ds.train import build


def main(argv: list[str]) -> int:
    trainer = build(GKDConfig(**read_recipe(argv[1])))
    student, pipeline = trainer.student, trainer.pipeline
    prompt = [5, 6, 7]
    nothing = [Rollout(row, Source.STUDENT, prompt, [], stopped=False) for row in range(2)]
    something = [Rollout(2, Source.STUDENT, prompt, [8, 9], stopped=True)]
    before = zero.full_state_dict(student.model)
    windows = {
        "nobody has tokens": nothing,
        "nobody has rollouts": [],
        "rank 1 has none": something if ranks.rank() == 0 else nothing,
    }
    for name, rollouts in windows.items():
        learned = pipeline.learn(rollouts, pipeline.score(rollouts), count_tokens(rollouts))
        applied = student.update()
        weights = zero.full_state_dict(student.model)
        if ranks.rank() == 0:
            shown = {
                "window": name,
                "applied": applied,
                "norm": student.grad_norm,
                "divergence": learned.divergence,
                "finite": all(bool(torch.isfinite(weight).all()) for weight in weights.values()),
                "same": all(torch.equal(weight, before[key]) for key, weight in weights.items()),
            }
            print(json.dumps(shown), flush=True)
        before = weights
    ranks.barrier()
    return 0

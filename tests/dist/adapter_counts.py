"""What a student costs, trained whole or by an adapter: counted in one update on real ranks; run by
rank_server.py. Rank 0 prints one line of JSON.
"""

from __future__ import annotations

import json

import torch

from gkd_ds.config.config import GKDConfig
from gkd_ds.config.recipe import read_recipe
from gkd_ds.engine import zero
from gkd_ds.runtime import ranks
from gkd_ds.train import build


def main(argv: list[str]) -> int:
    trainer = build(GKDConfig(**read_recipe(argv[1])))
    student, pipeline = trainer.student, trainer.pipeline
    frozen = lambda parameter: not parameter.requires_grad  # noqa: E731
    before = zero.full_state_dict(student.model, frozen)
    gathered = student.counters.student_bytes  # while it was tried out
    samples, sources = trainer.windows.samples(0, ranks.rank())
    rollouts = pipeline.rollout(samples, sources)
    pipeline.learn(rollouts, pipeline.score(rollouts), 8)
    student.update()
    after = zero.full_state_dict(student.model, frozen)
    states = student.engine.optimizer.optimizer.state.values()
    if ranks.rank() == 0:
        counted = {
            "optimizer": sum(t.nbytes for s in states for t in s.values() if torch.is_tensor(t)),
            "gathered": student.counters.student_bytes - gathered,
            "teacher": student.counters.teacher_bytes,
            "base_is_the_same": all(torch.equal(t, before[name]) for name, t in after.items()),
            "frozen": sum(t.nbytes for t in before.values()),
        }
        print(json.dumps(counted), flush=True)
    ranks.barrier()
    return 0

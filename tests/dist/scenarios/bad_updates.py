"""NaN on one rank: the update is skipped on all."""

from __future__ import annotations

import hashlib

from transformers import TrainerCallback

from gkd_ds import GKDTrainer
from gkd_ds.engine import zero
from gkd_ds.monitor.guards import TrainingStopped
from gkd_ds.runtime import ranks
from tests.dist.scenarios.common import build, rows_of


class WeightsAfterEachUpdate(TrainerCallback):
    """A digest of the student's whole weights after every window. Collective, like the events
    themselves.
    """

    def __init__(self):
        self.digests: list[str] = []
        self.trainer: GKDTrainer | None = None

    def on_step_end(self, args, state, control, **kwargs):
        weights = zero.full_state_dict(self.trainer.model)
        digest = hashlib.sha256()
        for name, tensor in sorted((weights or {}).items()):
            digest.update(name.encode() + tensor.numpy().tobytes())
        self.digests.append(digest.hexdigest())


def _with_nan(name: str, where: str, bad_windows: set[int], **fields) -> dict:
    """NaN on rank 1 only, in the teacher's targets or in the loss, in some windows."""
    watch = WeightsAfterEachUpdate()
    trainer = watch.trainer = build(name, max_steps=4, lmbda=0.5, callbacks=[watch], **fields)
    score, loss = trainer.teacher.score, trainer.student.loss

    def spoilt() -> bool:
        return ranks.rank() == ranks.world_size() - 1 and trainer.state.global_step in bad_windows

    def spoil_targets(*given):
        targets = score(*given)
        if spoilt():
            targets.hidden_NE[0] = float("nan")
        return targets

    def spoil_loss(*given):
        total, *per_token = loss(*given)
        return (total * float("nan") if spoilt() else total, *per_token)

    if where == "targets":
        trainer.teacher.score = spoil_targets
    else:
        trainer.student.loss = spoil_loss
    stopped = ""
    try:
        trainer.train()
    except TrainingStopped as error:
        stopped = str(error)
    return {"digests": watch.digests, "rows": rows_of(name), "stopped": stopped}


def faults() -> dict:
    return {
        "targets": _with_nan("nan-targets", "targets", {1}),
        "loss": _with_nan("nan-loss", "loss", {0, 2}),
        "always": _with_nan("nan-always", "targets", {0, 1, 2, 3}, max_bad_updates=2),
        "stage 2": _with_nan(
            "nan-stage-2", "loss", {1}, deepspeed={"zero_optimization": {"stage": 2}}
        ),
        "stage 0": _with_nan(
            "nan-stage-0", "loss", {1}, deepspeed={"zero_optimization": {"stage": 0}}
        ),
    }

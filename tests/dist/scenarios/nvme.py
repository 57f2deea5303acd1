"""The teacher or the optimizer on NVMe, beside the same in memory; and files there that are
damaged.
"""

from __future__ import annotations

import functools
import os
from pathlib import Path

import torch

from gkd_ds import GKDTrainer
from gkd_ds.checkpoint import store
from gkd_ds.checkpoint.engine_files import save_engine
from gkd_ds.engine import accelerator, zero
from gkd_ds.records import Rollout
from gkd_ds.runtime import ranks
from gkd_ds.runtime.errors import InputError
from gkd_ds.teacher import nvme
from tests.dist.scenarios.common import PLACES, RESULTS, build, rows_of, shipped


def teacher_on_nvme() -> dict:
    """A teacher whose shards are large enough for DeepSpeed to swap (1 MB), resident and on NVMe."""
    place = {"block": "offload_param", "nvme_path": str(RESULTS / "nvme")}
    files = {
        "resident": shipped("teacher_resident.json"),
        "nvme": shipped("teacher_nvme.json", **place),
    }
    results, trainers = {}, {}
    for where, file in files.items():
        trainer = build(f"nvme-{where}", teacher="teacher-large", **PLACES, teacher_deepspeed=file)
        trainer.train()
        results[where], trainers[where] = rows_of(f"nvme-{where}"), trainer
    logits = []
    for trainer in trainers.values():
        hidden_NE = trainer.pipeline.score(trainer._rollouts).hidden_NE
        with trainer.teacher.whole_head() as head:
            logits.append(accelerator.logits(hidden_NE, head.weight_VE, head.bias_V))
    results["logits"] = [logits[0].numel(), torch.equal(*logits)]
    results["away"] = {"auto": shards_away(trainer, trainer._rollouts)[0]}
    swapped = sorted((RESULTS / "nvme").rglob("rank0/**/*.swp"))
    results["files"] = [path.stat().st_size for path in swapped]
    results["file"] = str(swapped[0])

    # What something else may do to the files: rank 0's are damaged, and no rank gets a target.
    def score_with(damage, meanwhile: bool) -> str:
        damage_once = functools.cache(lambda: damage(swapped[0]) if ranks.rank() == 0 else None)
        ranks.barrier()
        if not meanwhile:
            damage_once()
        ranks.barrier()
        try:
            trainer.teacher.score(trainer._rollouts, damage_once if meanwhile else lambda: None)
        except nvme.SwapFileError as error:
            return str(error)
        return "scored"

    results["rewritten"] = score_with(_rewrite, meanwhile=True)
    for name, damage in (("truncated", _truncate), ("deleted", Path.unlink)):
        results[name] = score_with(damage, meanwhile=False)
    try:
        small = shipped("teacher_nvme.json", **place, buffer_count=2)
        build("nvme-small", teacher="teacher-large", teacher_deepspeed=small).evaluate()
    except InputError as error:
        results["too few buffers"] = str(error)
    least = shipped("teacher_nvme.json", **place, buffer_count=4)
    least = build("nvme-least", teacher="teacher-large", **PLACES, teacher_deepspeed=least)
    results["away"]["least"], least_NE = shards_away(least, trainer._rollouts)
    results["least gives the same"] = torch.equal(hidden_NE, least_NE)
    return results


def shards_away(
    trainer: GKDTrainer, rollouts: list[Rollout]
) -> tuple[list[list[int]], torch.Tensor]:
    """For each layer that scoring has released, the shards of every layer that are nowhere but on
    the drive.
    """
    seen: list[list[int]] = []
    layers = [layer.module for layer in trainer.teacher.engine.module.layers]

    def look() -> None:
        seen.append([sum(map(zero.is_only_on_nvme, layer.parameters())) for layer in layers])

    hidden_NE = trainer.teacher.score(rollouts, look).hidden_NE
    return seen[1:], hidden_NE  # the first look was after the embedding


def _rewrite(path: Path) -> None:
    """The same number of bytes, as another run with the same models writes them."""
    path.write_bytes(bytes(path.stat().st_size))


def _truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def optimizer_on_nvme() -> dict:
    """A student whose optimizer states are large enough to be swapped, beside the same in memory."""
    place = {"block": "offload_optimizer", "nvme_path": str(RESULTS / "nvme-optimizer")}
    files = {
        "memory": shipped("student_zero3.json"),
        "nvme": shipped("student_zero3_nvme_optimizer.json", **place),
    }
    results = {}
    for where, file in files.items():
        trainer = build(f"optimizer-{where}", student="teacher-large", **PLACES, deepspeed=file)
        trainer.train()
        results[where] = rows_of(f"optimizer-{where}")
    try:  # as an agreed stop would
        store.save(
            RESULTS / "nvme-saved", 1, lambda where: save_engine(trainer.student.engine, where), {}
        )
    except store.CheckpointError as error:
        results["saved"] = str(error)
    results["bytes"] = sum(
        path.stat().st_size for path in (RESULTS / "nvme-optimizer").rglob("*.swp")
    )
    return results

"""What lives in host memory and is copied to the device: the teacher's weights, the optimizer's
states.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from transformers import TrainerCallback

from gkd_ds import GKDTrainer
from gkd_ds.engine import accelerator
from gkd_ds.records import Rollout, TeacherTargets
from tools.gpu_check.materials import (
    given_rollouts,
    make_model,
    make_trainer,
    metrics,
    samples_of,
)
from tools.gpu_check.outcome import Outcome, judge

# 0.6 billion parameters, 1.2 GB in bf16: copying them takes long enough to be measured, and
# scoring about as long as copying.
LARGE = {
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 12,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "initializer_range": 0.02,
}
LONG, MANY = 462, 16  # completion tokens, rows: 8,192 tokens with their prompts of 50
TARGETS = 2e-2  # bf16: what two orders of the same sums may differ by
OVERLAP = 0.3  # the least share of the shorter of copying and computing that must be hidden
STATES = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 4}
LOSS = 1e-4


def teacher_streaming(directory: Path, shape: dict[str, Any] = LARGE) -> Outcome:
    """Score one window with the teacher resident, in pinned and in pageable host memory.

    Copying alone is what a window of one short row takes, computing alone what the resident teacher
    takes; what the two together take less than their sum has overlapped.
    """
    teacher = make_model(
        directory / "large", seed=3, dtype=torch.bfloat16, drawn_on=accelerator.device(), **shape
    )
    seconds: dict[str, float] = {}
    hidden: dict[str, torch.Tensor] = {}
    for place in ("resident", "pinned", "pageable"):
        name = "resident" if place == "resident" else "cpu"
        file = json.loads(Path(f"ds_configs/teacher_{name}.json").read_text())
        if name == "cpu":
            file["zero_optimization"]["offload_param"]["pin_memory"] = place == "pinned"
        trainer = make_trainer(directory, place, teacher=teacher, teacher_deepspeed=file, bf16=True)
        prompts = [sample.prompt_ids for sample in samples_of(trainer, MANY)]
        window, one_row = given_rollouts(prompts, LONG), given_rollouts(prompts[:1], 4)
        seconds[place], targets = _score(trainer, window)
        seconds[f"{place}, one row"], _ = _score(trainer, one_row)
        hidden[place] = targets.of(list(range(len(window)))).float().cpu()
        layers = trainer.pipeline.counters.teacher_bytes
        del trainer, targets
    differences = {
        place: float((hidden[place] - hidden["resident"]).norm() / hidden["resident"].norm())
        for place in ("pinned", "pageable")
    }
    copying, computing = seconds["pinned, one row"], seconds["resident"]
    hidden_share = (copying + computing - seconds["pinned"]) / min(copying, computing)
    weights = sum(file.stat().st_size for file in (directory / "large").glob("*.safetensors"))
    return judge(
        max(differences.values()) <= TARGETS and hidden_share >= OVERLAP,
        f"pinned: {hidden_share:.0%} of the shorter of copying ({copying * 1e3:.0f} ms for "
        f"{weights / 1e9:.2f} GB) and computing ({computing * 1e3:.0f} ms) overlaps (at least "
        f"{OVERLAP:.0%} asked for); a window takes {seconds['pinned'] * 1e3:.0f} ms, pageable "
        f"{seconds['pageable'] * 1e3:.0f} ms; targets within {max(differences.values()):.1e}.",
        seconds=seconds,
        overlap=hidden_share,
        weights_bytes=weights,
        streamed_bytes=layers,
        target_differences=differences,
    )


def _score(
    trainer: GKDTrainer, window: list[Rollout], times: int = 4
) -> tuple[float, TeacherTargets]:
    """The best time of scoring `window`, and its targets; the first pass warms up."""
    seconds = []
    for _ in range(times):
        targets = trainer.pipeline.score(window)
        seconds.append(trainer.pipeline.seconds["score"])
    return min(seconds[1:]), targets


def offload_optimizer_states(directory: Path) -> Outcome:
    """On-policy training with and without it, and the memory that a rollout gains."""
    student = make_model(directory / "wide", seed=1, **STATES)
    rows = {}
    for offload in (False, True):
        name = "offloaded" if offload else "kept"
        trainer = make_trainer(
            directory, name, student=student, lmbda=1.0, offload_optimizer_states=offload
        )
        room = _Room(trainer)
        trainer.add_callback(room)
        trainer.train()
        rows[name] = metrics(directory, name)
    loss = max(
        abs(a["loss"] - b["loss"]) / abs(b["loss"]) for a, b in zip(rows["offloaded"], rows["kept"])
    )
    return judge(
        loss <= LOSS and room.gained >= 0.9 * room.moved > 0,
        f"a rollout gains {room.gained / 2**20:.0f} MiB of {room.moved / 2**20:.0f} MiB of states, "
        f"which leave and return in {room.seconds * 1e3:.0f} ms; losses within {loss:.1e} "
        f"({LOSS:.0e} allowed).",
        loss_difference=loss,
        moved_bytes=room.moved,
        gained_bytes=room.gained,
        seconds=room.seconds,
    )


class _Room(TrainerCallback):
    """After each update: enter a rollout's memory and leave it again, and see what that gives. The
    engines are there during training only.
    """

    def __init__(self, trainer: GKDTrainer):
        self.trainer = trainer
        self.moved, self.gained, self.seconds = 0, 0, 0.0

    def on_step_end(self, args, state, control, **kwargs):
        student, here = self.trainer.pipeline.student, get_accelerator()
        here.synchronize()
        before, counted, started = (
            here.memory_allocated(),
            student.counters.optimizer_bytes,
            time.perf_counter(),
        )
        with student.sampling():
            here.synchronize()
            self.gained = before - here.memory_allocated()
        here.synchronize()
        self.seconds = time.perf_counter() - started
        self.moved = student.counters.optimizer_bytes - counted

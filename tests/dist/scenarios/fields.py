"""What fields of the configuration do, on several ranks."""

from __future__ import annotations

import time

from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from gkd_ds import GKDConfig
from gkd_ds.runtime import ranks
from tests.dist.scenarios.common import PARTITIONED, RESULTS, build, rows_of, train

PLACES = {"partitioned": PARTITIONED, "whole": {"zero_optimization": {"stage": 0}}}
OPTIMIZERS = {
    "adamw": {},
    "sgd": {"optim": "sgd", "optim_args": "momentum=0.9"},
    "rmsprop": {"optim": "rmsprop", "optim_args": "momentum=0.5,alpha=0.9"},
}
DATA_ONLY = {"lmbda": 0.0, "max_steps": 3, "learning_rate": 1e-2}


def optimizers() -> dict:
    """The losses of three updates, where each rank has flat parts of the parameters, and where it
    has torch's own optimizer of whole ones.
    """
    found = {
        f"{name} {place}": train(f"optim-{name}-{place}", deepspeed=file, **DATA_ONLY, **fields)[
            "rows"
        ]
        for name, fields in OPTIMIZERS.items()
        for place, file in PLACES.items()
    }
    found["warmup"] = train("warmup", warmup_steps=0.5, **{**DATA_ONLY, "max_steps": 4})["rows"]
    saving = {**DATA_ONLY, **OPTIMIZERS["sgd"], "save_strategy": "steps", "save_steps": 2}
    train("optim-resumed", **{**saving, "max_steps": 2, "lr_scheduler_type": "constant"})
    goes_on = {"overwrite_output_dir": False, "resume_from_checkpoint": True}
    constant = {"lr_scheduler_type": "constant"}
    found["resumed"] = train("optim-resumed", **{**saving, **goes_on, **constant})["rows"]
    found["not interrupted"] = train("optim-once", **{**saving, **constant})["rows"]
    return found


def measures() -> dict:
    """What is counted of one window, in either way."""
    found = {}
    for way in ("all", "non_padding"):
        trainer = build(
            f"measures-{way}",
            include_num_input_tokens_seen=way,
            include_tokens_per_second=True,
            skip_memory_metrics=False,
        )
        metrics = trainer.train().metrics
        found[way] = {
            "metrics": metrics,
            "logged": trainer.state.log_history,
            "seen": trainer.state.num_input_tokens_seen,
            "lengths": [len(rollout) for rollout in trainer._rollouts],
            "padded": trainer._learned.padded_tokens,
            "evaluated": sorted(trainer.evaluate()),
        }
    return found


class Counts(TrainerCallback, ExportableState):
    """Updates since `start`."""

    def __init__(self, start: int = 0):
        self.start, self.count = start, 0

    def on_step_end(self, args, state, control, **kwargs):
        self.count += 1

    def state(self) -> dict:
        return {"args": {"start": self.start}, "attributes": {"count": self.count}}


def callback_states() -> dict:
    """What a callback has counted after a resume, as it was told to go on or not."""
    saving = {"save_strategy": "steps", "save_steps": 2, "lmbda": 0.0}
    build("states", callbacks=[Counts(5)], max_steps=2, **saving).train()
    found = {}
    for restores in (True, False):
        trainer = build(
            "states",
            callbacks=[Counts(0)],
            max_steps=3,
            overwrite_output_dir=False,
            resume_from_checkpoint=str(RESULTS / "states/checkpoint-2"),
            restore_callback_states_from_checkpoint=restores,
            **saving,
        )
        trainer.train()
        (counts,) = [c for c in trainer.callback_handler.callbacks if isinstance(c, Counts)]
        found[str(restores)] = (counts.start, counts.count)
    return found


def compiled() -> dict:
    """The losses of an update and of an evaluation, compiled and not."""
    found = {}
    for backend in (None, "eager"):
        trainer = build(f"compiled-{backend}", torch_compile_backend=backend, lmbda=0.0)
        trainer.train()
        loss = [row["loss"] for row in rows_of(f"compiled-{backend}") if "loss" in row]
        found[str(backend)] = [*loss, trainer.evaluate()["eval_loss"]]
    return found


def first_rank_first() -> bool:
    """Whether the others found what the first rank wrote."""
    config, path = GKDConfig(output_dir=str(RESULTS / "unused")), RESULTS / "first-rank-first"
    with config.main_process_first(desc="writing"):
        if config.process_index == 0:
            time.sleep(0.3)
            path.write_text("done")
        found = path.exists()
    ranks.barrier()
    return found

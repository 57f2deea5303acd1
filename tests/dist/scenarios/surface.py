"""What scripts written for transformers' Trainer bring along, on several ranks: metrics, callbacks,
a collator, an optimizer, subclasses.
"""

from __future__ import annotations

import json

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from gkd_ds import GKDTrainer
from gkd_ds.runtime import ranks
from gkd_ds.runtime.errors import InputError
from tests.dist.scenarios.common import MATERIALS, RESULTS, build, eval_rows, rows_of

WAYS = {
    "whole": {},
    "by batch": {"batch_eval_metrics": True},
    "lists": {"eval_do_concat_batches": False},
    "texts": {"predict_with_generate": True},
    "losses": {"include_for_metrics": ["loss", "inputs"]},
}


def own_metrics() -> dict:
    """Of five rows: what compute_metrics got, in several ways, and what predict returns."""
    results = {}
    for way, fields in WAYS.items():
        given, steps = [], []

        def compute_metrics(prediction, compute_result=True, given=given):
            given.append({
                "predictions": _plain(prediction.predictions),
                "labels": _plain(prediction.label_ids),
                "losses": _plain(prediction.losses),
                "inputs": _plain(prediction.inputs),
                "last": compute_result,
            })  # fmt: skip
            return {"calls": len(given)} if compute_result else {}

        class CountsSteps(TrainerCallback):
            def on_prediction_step(self, args, state, control, steps=steps, **kwargs):
                steps.append(1)

        trainer = build(
            f"metrics-{way.replace(' ', '-')}",
            eval_dataset=eval_rows(5),
            callbacks=[CountsSteps],
            per_device_eval_batch_size=2 // ranks.world_size(),
            eval_on_policy=False,
            given={
                "compute_metrics": compute_metrics,
                "preprocess_logits_for_metrics": lambda logits, labels: logits.argmax(-1),
            },
            **fields,
        )
        metrics = trainer.evaluate()
        results[way] = {
            "given": list(given),
            "steps": len(steps),
            "loss": metrics["eval_loss"],
            "calls": metrics["eval_calls"],
        }
    output = trainer.predict(eval_rows(3))
    results["predict"] = {
        "predictions": _plain(output.predictions),
        "labels": _plain(output.label_ids),
        "metrics": sorted(output.metrics),
    }
    return results


def _plain(value):
    if isinstance(value, (list, tuple)):
        return [_plain(one) for one in value]
    return None if value is None else torch.as_tensor(value).tolist()


class Overrides(GKDTrainer):
    """Of several methods at once; `momentum` exists after the constructor only."""

    momentum = 0.9

    def create_optimizer(self, model=None):
        if self.optimizer is None:
            parameters = list(self.model.parameters())
            self.optimizer = torch.optim.SGD(parameters, lr=0.1, momentum=self.momentum)
        return self.optimizer

    def create_scheduler(self, num_training_steps, optimizer=None):
        if self.lr_scheduler is None:
            self.lr_scheduler = torch.optim.lr_scheduler.StepLR(self.optimizer, 1, gamma=0.5)
        return self.lr_scheduler

    def log(self, logs, start_time=None):
        logs["mine"] = 7.0
        super().log(logs, start_time)

    def save_model(self, output_dir=None, _internal_call=False):
        super().save_model(output_dir, _internal_call)
        if self.is_world_process_zero():
            with open(f"{output_dir or self.args.output_dir}/note.txt", "w") as file:
                file.write("mine")

    @staticmethod
    def generalized_jsd_loss(
        student_logits, teacher_logits, labels=None, beta=0.5, temperature=1.0, **kwargs
    ):
        return GKDTrainer.generalized_jsd_loss(
            student_logits, teacher_logits, labels=labels, beta=0.0, **kwargs
        )


def overrides() -> dict:
    """Two windows by a subclass, one that goes on from its checkpoint, and two by ours."""
    fields = {"lmbda": 0.0, "max_grad_norm": 0.0, "save_strategy": "steps", "save_steps": 1}
    trainer = build("overrides", trainer_class=Overrides, max_steps=2, **fields)
    trainer.train()
    fields |= {"overwrite_output_dir": False, "resume_from_checkpoint": True}
    resumed = build("overrides", trainer_class=Overrides, max_steps=3, **fields)
    resumed.train()
    plain = build("overrides-none", lmbda=0.0, beta=0.0, max_steps=1)
    plain.train()
    checkpoint = RESULTS / "overrides" / "checkpoint-2"
    same = None
    if ranks.rank() == 0:
        # The finished student has made one update more.
        kept = AutoModelForCausalLM.from_pretrained(checkpoint)
        same = all(map(torch.equal, kept.parameters(), _finished("overrides").parameters()))
    return {
        "rows": rows_of("overrides"),
        "plain": rows_of("overrides-none"),
        "history": resumed.state.log_history,
        "files": sorted(path.name for path in checkpoint.iterdir()),
        "notes": [(place / "note.txt").exists() for place in (checkpoint, RESULTS / "overrides")],
        "checkpoint is the finished student": same,
        "optimizer": type(trainer.optimizer).__name__,
        "state": json.loads((checkpoint / "trainer_state.json").read_text())["global_step"],
    }


def _finished(name: str):
    return AutoModelForCausalLM.from_pretrained(RESULTS / name)


def models_in_engines() -> dict:
    """Models that the engines of several ranks have."""
    student, teacher = (
        AutoModelForCausalLM.from_pretrained(MATERIALS / role) for role in ("student", "teacher")
    )
    tokenizer = AutoTokenizer.from_pretrained(MATERIALS / "student")
    given = {"processing_class": tokenizer}
    trainer = build("in-engines", student=student, teacher=teacher, given=given)
    trainer.train()
    said = {}
    for what, ask in {
        "save_pretrained": lambda: student.save_pretrained(RESULTS / "never"),
        "state_dict": lambda: teacher.state_dict(),
        "another trainer": lambda: build("never", student=student, given=given),
    }.items():
        try:
            ask()
        except InputError as error:
            said[what] = str(error)
    before = trainer.evaluate()["eval_loss"]
    trainer.args.weight_decay = 0.5
    try:
        trainer.train()
    except InputError as error:
        said["a field of the engines"] = str(error)
    trainer.args.weight_decay, trainer.args.learning_rate = 0.0, 5e-3
    trainer.args.beta, trainer.args.max_steps = 0.0, 2
    other_beta = trainer.evaluate()["eval_loss"]
    trainer.train()  # goes on
    rates = [row["lr"] for row in rows_of("in-engines") if "lr" in row]
    trainer.save_model(str(RESULTS / "in-engines-saved"))
    ranks.barrier()
    return {
        "said": said,
        "losses": [before, other_beta, trainer.evaluate()["eval_loss"]],
        "rates": rates,
        "step": trainer.state.global_step,
        "loads": AutoModelForCausalLM.from_pretrained(
            RESULTS / "in-engines-saved"
        ).num_parameters(),
        "written": [str(path) for path in (RESULTS / "never").glob("*.safetensors")],
    }


def changes() -> dict:
    """A callback changes fields while training; another changes one on one rank alone."""

    class Changes(TrainerCallback):
        def __init__(self, change):
            self.change, self.trainer = change, None

        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 1:
                self.change(self.trainer)

    def assign(**values):
        def change(trainer):
            for name, value in values.items():
                setattr(trainer if hasattr(type(trainer), name) else trainer.args, name, value)

        return change

    def on_one_rank(trainer):
        if ranks.rank() == 1:
            trainer.args.lmbda = 1.0

    def draws_on_one_rank(trainer):
        assert trainer.generation_config.top_k == 0
        if ranks.rank() == 1:
            trainer.generation_config.top_k = 5

    results = {}
    for name, change in {
        "lmbda": assign(lmbda=1.0, max_new_tokens=3),
        "beta": assign(beta=0.0),
        "too late": assign(learning_rate=1.0),
        "out of bounds": lambda trainer: setattr(trainer.args, "lmbda", 2.0),
        "one rank": on_one_rank,
        "draws on one rank": draws_on_one_rank,
    }.items():
        callback, said = Changes(change), ""
        trainer = build(
            f"changes-{name.replace(' ', '-')}", callbacks=[callback], lmbda=0.0, max_steps=2
        )
        callback.trainer = trainer
        try:
            trainer.train()
        except InputError as error:
            said = str(error)
        results[name] = {"rows": rows_of(f"changes-{name.replace(' ', '-')}"), "said": said}
    fields = {"lmbda": 0.0, "max_steps": 2}
    results["none"] = {"rows": []}
    build("changes-none", **fields).train()
    results["none"]["rows"] = rows_of("changes-none")
    return results

"""Subclasses of GKDTrainer that override what transformers documents."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import torch.nn.functional as F

from tests.scripts.library import IS_TRL, GKDTrainer, chats, quick

CALLED_BY_A_RUN = """log evaluate save_model _save_checkpoint create_optimizer create_scheduler
create_optimizer_and_scheduler get_decay_parameter_names floating_point_ops generalized_jsd_loss
""".split()


def all_that_is_called(home: Path) -> None:
    """Every method that a run calls, overridden at once by one that passes on."""
    calls = []

    def passing_on(name):
        def method(self, *args, **kwargs):
            calls.append(name)
            return getattr(super(Trainer, self), name)(*args, **kwargs)

        return method

    Trainer = type("Trainer", (GKDTrainer,), {name: passing_on(name) for name in CALLED_BY_A_RUN})
    trainer = quick(
        home, trainer_class=Trainer, eval_dataset=chats(2, seed=1), eval_strategy="steps",
        eval_steps=1, save_strategy="steps", save_steps=1,
    )  # fmt: skip
    trainer.train()
    not_called = set(CALLED_BY_A_RUN) - set(calls)
    # TRL itself calls one of them no more.
    assert not_called == ({"create_optimizer_and_scheduler"} if IS_TRL else set()), not_called


def more_in_the_log(home: Path) -> None:
    """log(logs, start_time)."""

    class Trainer(GKDTrainer):
        def log(self, logs, start_time=None):
            logs["student_norm"] = 1.5
            super().log(logs, start_time)

    trainer = quick(home, trainer_class=Trainer)
    trainer.train()
    assert all(entry["student_norm"] == 1.5 for entry in trainer.state.log_history)
    if not IS_TRL:
        rows = [json.loads(line) for line in Path("out/metrics.jsonl").read_text().splitlines()]
        assert [row["step"] for row in rows if "train/student_norm" in row] == [1, 2, 2]


def log_something(home: Path) -> None:
    """trainer.log from outside."""
    trainer = quick(home)
    trainer.train()
    trainer.log({"human_score": 4.2})
    assert trainer.state.log_history[-1]["human_score"] == 4.2


def a_metric_in_evaluate(home: Path) -> None:
    """evaluate, and the best model by what it adds."""

    class Trainer(GKDTrainer):
        def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
            metrics = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
            metrics[f"{metric_key_prefix}_step"] = float(self.state.global_step)
            return metrics

    trainer = quick(
        home, trainer_class=Trainer, eval_dataset=chats(2, seed=1), eval_strategy="steps",
        eval_steps=1, save_strategy="steps", save_steps=1, load_best_model_at_end=True,
        metric_for_best_model="step", greater_is_better=True,
    )  # fmt: skip
    trainer.train()
    assert trainer.state.best_metric == 2.0


def a_file_beside_the_model(home: Path) -> None:
    """save_model, also for checkpoints."""

    class Trainer(GKDTrainer):
        def save_model(self, output_dir=None, _internal_call=False):
            super().save_model(output_dir, _internal_call)
            directory = Path(output_dir or self.args.output_dir)
            (directory / "note.txt").write_text("mine")

    trainer = quick(home, trainer_class=Trainer, save_strategy="steps", save_steps=1)
    trainer.train()
    trainer.save_model("final")
    for place in ("final", "out/checkpoint-1", "out/checkpoint-2"):
        assert Path(place, "note.txt").read_text() == "mine"
    quick(home, trainer_class=Trainer, max_steps=3).train(resume_from_checkpoint=True)


def pass_on_a_private_one(home: Path) -> None:
    """_save_checkpoint(model, trial)."""

    class Trainer(GKDTrainer):
        saved = 0

        def _save_checkpoint(self, model, trial):
            Trainer.saved += 1
            super()._save_checkpoint(model, trial)

    quick(home, trainer_class=Trainer, save_strategy="steps", save_steps=1).train()
    assert Trainer.saved == 2 and Path("out/checkpoint-2").is_dir()


def an_optimizer_of_my_own(home: Path) -> None:
    """create_optimizer, with attributes that exist only after the constructor."""

    class Trainer(GKDTrainer):
        def __init__(self, *args, momentum=0.0, **kwargs):
            super().__init__(*args, **kwargs)
            self.momentum = momentum

        def create_optimizer(self, model=None):
            if self.optimizer is None:
                parameters = [p for p in self.model.parameters() if p.requires_grad]
                self.optimizer = torch.optim.SGD(
                    parameters, lr=self.args.learning_rate, momentum=self.momentum
                )
            return self.optimizer

    trainer = quick(home, trainer_class=Trainer)
    trainer.momentum = 0.9
    trainer.train()
    optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
    assert isinstance(optimizer, torch.optim.SGD) and optimizer.defaults["momentum"] == 0.9


def a_schedule_of_my_own(home: Path) -> None:
    """create_scheduler."""

    class Trainer(GKDTrainer):
        def create_scheduler(self, num_training_steps, optimizer=None):
            if self.lr_scheduler is None:
                optimizer = self.optimizer if optimizer is None else optimizer
                self.lr_scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.1)
            return self.lr_scheduler

    trainer = quick(home, trainer_class=Trainer)
    trainer.train()
    rates = [entry["learning_rate"] for entry in trainer.state.log_history if "loss" in entry]
    assert abs(rates[0] - 1e-3) < 1e-9 and abs(rates[1] - 1e-4) < 1e-9


def both_of_my_own(home: Path) -> None:
    """create_optimizer_and_scheduler, which transformers once called."""

    class Trainer(GKDTrainer):
        def create_optimizer_and_scheduler(self, num_training_steps):
            assert num_training_steps == 2
            self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.5)
            self.lr_scheduler = torch.optim.lr_scheduler.ConstantLR(self.optimizer, factor=1.0)

    trainer = quick(home, trainer_class=Trainer)
    if not IS_TRL:
        trainer.train()
        assert {e["learning_rate"] for e in trainer.state.log_history if "loss" in e} == {0.5}


def no_decay_for_attention(home: Path) -> None:
    """get_decay_parameter_names."""

    class Trainer(GKDTrainer):
        def get_decay_parameter_names(self, model):
            names = super().get_decay_parameter_names(model)
            return [name for name in names if "self_attn" not in name]

    trainer = quick(home, trainer_class=Trainer, weight_decay=0.1)
    trainer.train()
    decayed, others = sorted(trainer.optimizer.param_groups, key=lambda g: -g["weight_decay"])
    assert decayed["weight_decay"] == 0.1 and others["weight_decay"] == 0.0
    assert len(others["params"]) == 4 + 3  # q, k, v, o; and three norms


def forward_kl(home: Path) -> None:
    """generalized_jsd_loss, with reducing habits of its own."""

    class Trainer(GKDTrainer):
        @staticmethod
        def generalized_jsd_loss(
            student_logits, teacher_logits, labels=None, beta=0.5, temperature=1.0,
            reduction="batchmean", num_items_in_batch=None,
        ):  # fmt: skip
            student = F.log_softmax(student_logits / temperature, dim=-1)
            teacher = F.softmax(teacher_logits / temperature, dim=-1)
            loss = F.kl_div(student, teacher, reduction="none").sum(-1)
            if labels is not None:
                loss = loss[labels != -100]
            if num_items_in_batch is not None:
                return loss.sum() / num_items_in_batch
            return loss.mean()

    ours = quick(home, trainer_class=Trainer, lmbda=0.0).train().training_loss
    theirs = quick(home, output_dir="beta-0", beta=0.0, lmbda=0.0).train().training_loss
    assert abs(ours - theirs) < 1e-4 * theirs


def a_loss_of_the_temperature(home: Path) -> None:
    """Monkeypatched on the object."""
    calls = []

    def loss(student_logits, teacher_logits, labels=None, beta=0.5, **kwargs):
        calls.append(beta)
        return GKDTrainer.generalized_jsd_loss(
            student_logits, teacher_logits, labels=labels, beta=0.0,
            num_items_in_batch=kwargs.get("num_items_in_batch"),
        )  # fmt: skip

    trainer = quick(home, beta=0.3)
    trainer.generalized_jsd_loss = loss
    assert trainer.train().training_loss > 0 and 0.3 in calls


def count_differently(home: Path) -> None:
    """floating_point_ops."""

    class Trainer(GKDTrainer):
        def floating_point_ops(self, inputs):
            return inputs["input_ids"].numel()

    trainer = quick(home, trainer_class=Trainer)
    trainer.train()
    assert 0 < trainer.state.total_flos < 10_000


def a_card_of_my_own(home: Path) -> None:
    """create_model_card."""
    trainer = quick(home)
    trainer.train()
    trainer.create_model_card(model_name="my-student", dataset_name="org/chats", tags=["mine"])
    text = Path("out/README.md").read_text()
    assert "my-student" in text and "mine" in text


def names_of_my_own_in_the_log(home: Path) -> None:
    """log gets what it is to log, and its super adds where in the run that was."""

    class Trainer(GKDTrainer):
        def log(self, logs, *args, **kwargs):
            super().log({f"student/{name}": value for name, value in logs.items()}, *args, **kwargs)

    trainer = quick(home, trainer_class=Trainer)
    trainer.train()
    names = {name for entry in trainer.state.log_history for name in entry}
    assert "student/loss" in names and "student/train_loss" in names
    assert {name for name in names if "/" not in name} == {"epoch", "step"}

"""From a data set to a trained model, and what is done with the run."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.trainer_utils import get_last_checkpoint

from tests.scripts.library import GKDConfig, GKDTrainer, arguments, chats, load, quick


def documentation_example(home: Path) -> None:
    """Names, and a data set of messages."""
    rows = [[{"role": "user", "content": "Hi, how are you?"},
             {"role": "assistant", "content": "I'm great thanks"}]] * 4  # fmt: skip
    train_dataset = Dataset.from_dict({"messages": rows})
    training_args = GKDConfig(
        output_dir="gkd-model", per_device_train_batch_size=1, max_new_tokens=4, max_steps=1,
        report_to="none", bf16=False, use_cpu=True,
    )  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(home / "student")
    trainer = GKDTrainer(
        model=str(home / "student"),
        teacher_model=str(home / "teacher"),
        args=training_args,
        processing_class=tokenizer,
        train_dataset=train_dataset,
    )
    trainer.train()
    assert trainer.state.global_step == 1


def train_log_save(home: Path) -> None:
    """The end of transformers' example scripts."""
    trainer = quick(home)
    train_result = trainer.train()
    trainer.save_model()
    metrics = train_result.metrics
    metrics["train_samples"] = len(trainer.train_dataset)
    trainer.log_metrics("train", metrics)
    trainer.save_metrics("train", metrics)
    trainer.save_state()
    results = json.loads(Path("out/train_results.json").read_text())
    assert results["train_samples"] == 6 and trainer.state.total_flos > 0
    for name in ("train_loss", "train_runtime", "train_samples_per_second", "epoch"):
        assert name in results, name
    state = json.loads(Path("out/trainer_state.json").read_text())
    assert state["global_step"] == 2 and state["log_history"][-1]["train_loss"] > 0


def train_evaluate_log_save(home: Path) -> None:
    """do_train, do_eval, perplexity."""
    trainer = quick(home, eval_dataset=chats(3, seed=1), do_train=True, do_eval=True)
    if trainer.args.do_train:
        trainer.train()
    if trainer.args.do_eval:
        metrics = trainer.evaluate()
        metrics["eval_samples"] = len(trainer.eval_dataset)
        metrics["perplexity"] = math.exp(metrics["eval_loss"])
        trainer.log_metrics("eval", metrics)
        trainer.save_metrics("eval", metrics)
    results = json.loads(Path("out/all_results.json").read_text())
    assert results["perplexity"] > 1 and results["eval_samples"] == 3
    assert {"eval_runtime", "eval_samples_per_second", "eval_steps_per_second"} <= results.keys()


def resume_true(home: Path) -> None:
    """Interrupted after two of four updates."""
    fields = {"save_strategy": "steps", "save_steps": 2}
    quick(home, **fields).train()
    trainer = quick(home, **fields, max_steps=4)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 4
    assert [entry["step"] for entry in trainer.state.log_history if "loss" in entry] == [1, 2, 3, 4]


def resume_last_checkpoint(home: Path) -> None:
    """As transformers' example scripts look for it."""
    fields = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 1}
    quick(home, **fields).train()
    last_checkpoint = get_last_checkpoint("out")
    assert Path(last_checkpoint).name == "checkpoint-2"
    trainer = quick(home, **fields, max_steps=3)
    trainer.train(resume_from_checkpoint=last_checkpoint)
    assert sorted(path.name for path in Path("out").glob("checkpoint-*")) == ["checkpoint-3"]


def use_a_checkpoint(home: Path) -> None:
    """A checkpoint is a model's directory, with the trainer's state."""
    quick(home, save_strategy="steps", save_steps=1).train()
    files = os.listdir("out/checkpoint-2")
    assert "model.safetensors" in files and "trainer_state.json" in files
    model = AutoModelForCausalLM.from_pretrained("out/checkpoint-2")
    tokenizer = AutoTokenizer.from_pretrained("out/checkpoint-2")
    ids = tokenizer("What is 3 plus 4?", return_tensors="pt").input_ids
    assert model.generate(ids, max_new_tokens=3).shape[1] == ids.shape[1] + 3
    state = json.loads(Path("out/checkpoint-1/trainer_state.json").read_text())
    assert state["global_step"] == 1 and state["max_steps"] == 2


def weights_only_checkpoints(home: Path) -> None:
    """save_only_model."""
    quick(
        home, save_strategy="epoch", save_only_model=True, num_train_epochs=1, max_steps=-1
    ).train()
    (checkpoint,) = Path("out").glob("checkpoint-*")
    AutoModelForCausalLM.from_pretrained(checkpoint)


def epochs_of_everything(home: Path) -> None:
    """Strategies by epoch, accumulation, a cosine schedule with warm-up."""
    trainer = quick(
        home, eval_dataset=chats(2, seed=1), num_train_epochs=2, max_steps=-1,
        per_device_train_batch_size=1, gradient_accumulation_steps=3, eval_strategy="epoch",
        save_strategy="epoch", logging_strategy="epoch", lr_scheduler_type="cosine",
        warmup_steps=1, gradient_checkpointing=True, weight_decay=0.1, max_grad_norm=0.5,
    )  # fmt: skip
    trainer.train()
    assert trainer.state.global_step == 4 and trainer.state.epoch == 2
    assert [e["epoch"] for e in trainer.state.log_history if "eval_loss" in e] == [1, 2]
    assert sorted(path.name for path in Path("out").glob("checkpoint-*")) == [
        "checkpoint-2",
        "checkpoint-4",
    ]


def sources(home: Path) -> None:
    """lmbda and seq_kd at their ends."""
    for fields in ({"lmbda": 0.0}, {"lmbda": 1.0}, {"lmbda": 0.0, "seq_kd": True}):
        trainer = quick(home, output_dir=f"out-{len(fields)}-{fields['lmbda']}", **fields)
        assert (trainer.lmbda, trainer.seq_kd) == (fields["lmbda"], fields.get("seq_kd", False))
        assert trainer.train().training_loss > 0


def loss_curve(home: Path) -> None:
    """A notebook that draws what was logged."""
    trainer = quick(home, max_steps=3)
    trainer.train()
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["step"] for entry in history] == [1, 2, 3]
    assert all({"loss", "grad_norm", "learning_rate", "epoch"} <= entry.keys() for entry in history)
    assert "train_loss" in trainer.state.log_history[-1]


def train_twice(home: Path) -> None:
    """It goes on with the weights it has."""
    trainer = quick(home)
    trainer.train()
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    assert trainer.state.global_step == 2
    assert any(not torch.equal(p, before[name]) for name, p in trainer.model.named_parameters())


def change_arguments_first(home: Path) -> None:
    """Fields that are set after the trainer was made."""
    trainer = quick(home)
    trainer.args.max_steps = 1
    trainer.args.learning_rate = 5e-4
    trainer.train()
    assert trainer.state.global_step == 1
    assert trainer.state.log_history[0]["learning_rate"] == 5e-4


def same_seed_same_loss(home: Path) -> None:
    """Two runs of one seed, beside each other."""
    losses = [
        quick(home, output_dir=f"out-{run}", lmbda=0.0).train().training_loss for run in (1, 2)
    ]
    assert losses[0] == losses[1]


def once_more_in_the_same_place(home: Path) -> None:
    """A notebook's cell that is run again."""
    for _ in range(2):
        quick(home, save_strategy="steps", save_steps=1).train()
    AutoModelForCausalLM.from_pretrained("out/checkpoint-2")


def an_optimizer_and_its_schedule(home: Path) -> None:
    """Both given."""
    model, teacher, tokenizer = load(home)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    trainer = GKDTrainer(
        model, teacher, arguments(), train_dataset=chats(), processing_class=tokenizer,
        optimizers=(optimizer, scheduler),
    )  # fmt: skip
    trainer.train()
    rates = [entry["learning_rate"] for entry in trainer.state.log_history if "loss" in entry]
    assert rates == [0.1, 0.05]
    assert trainer.lr_scheduler.get_last_lr() == [0.025]


def an_optimizer_alone(home: Path) -> None:
    """The schedule is ours."""
    model, teacher, tokenizer = load(home)
    groups = [
        {"params": [p for n, p in model.named_parameters() if "norm" not in n], "lr": 1e-3},
        {"params": [p for n, p in model.named_parameters() if "norm" in n], "lr": 1e-4},
    ]
    trainer = GKDTrainer(
        model, teacher, arguments(), train_dataset=chats(), processing_class=tokenizer,
        optimizers=(torch.optim.AdamW(groups), None),
    )  # fmt: skip
    trainer.train()
    assert len(trainer.get_learning_rates()) == 2 and trainer.optimizer is not None
    parameters = {id(p) for p in trainer.model.parameters()}
    assert all(id(p) in parameters for g in trainer.optimizer.param_groups for p in g["params"])


def who_am_i(home: Path) -> None:
    """What accelerate's object is asked."""
    trainer = quick(home)
    trainer.train()
    trainer.accelerator.print("Training completed.")
    trainer.accelerator.wait_for_everyone()
    if trainer.accelerator.is_main_process and trainer.is_world_process_zero():
        trainer.accelerator.unwrap_model(trainer.model).save_pretrained("final")
    assert trainer.is_local_process_zero()
    AutoModelForCausalLM.from_pretrained("final")


def how_many_epochs(home: Path) -> None:
    """Where max_steps decides, and where a window is left over."""
    trainer = quick(home, train_dataset=chats(4), max_steps=7)
    trainer.train()
    assert trainer.state.num_train_epochs == 4 and trainer.state.epoch == 3.5
    trainer = quick(
        home, train_dataset=chats(7), max_steps=-1, num_train_epochs=2, output_dir="other",
        gradient_accumulation_steps=3,
    )  # fmt: skip
    metrics = trainer.train().metrics
    epochs = [entry["epoch"] for entry in trainer.state.log_history if "loss" in entry]
    assert epochs == [0.75, 1, 1.75, 2] and trainer.state.max_steps == 4
    assert round(metrics["train_samples_per_second"] * metrics["train_runtime"]) == 14

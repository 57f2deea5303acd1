"""What the scripts import: ours or, to see that they are TRL's scripts, TRL's."""

from __future__ import annotations

import os

from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.tiny import make_chat_rows, make_model, make_tokenizer

IS_TRL = os.environ.get("GKD_SCRIPTS") == "trl"
if IS_TRL:
    from trl.experimental.gkd import GKDConfig, GKDTrainer
else:
    from gkd_ds import GKDConfig, GKDTrainer

__all__ = ["IS_TRL", "GKDConfig", "GKDTrainer", "arguments", "chats", "load", "make", "quick"]


def make(directory) -> None:
    """A student of one layer and a teacher of two."""
    tokenizer = make_tokenizer(vocab_size=300)
    for role, layers in (("student", 1), ("teacher", 2)):
        place = directory / role
        make_model("llama", place, seed=layers, hidden=32, layers=layers, tokenizer=tokenizer)


def chats(rows: int = 6, seed: int = 0) -> Dataset:
    return Dataset.from_list(make_chat_rows(rows, seed))


def load(home) -> tuple:
    """(student, teacher, tokenizer)"""
    student, teacher = (
        AutoModelForCausalLM.from_pretrained(home / role) for role in ("student", "teacher")
    )
    return student, teacher, AutoTokenizer.from_pretrained(home / "student")


def arguments(**fields) -> GKDConfig:
    """A short run."""
    short = {
        "output_dir": "out",
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 2,
        "max_new_tokens": 4,
        "learning_rate": 1e-3,
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
        "bf16": False,
        "use_cpu": True,
    }
    return GKDConfig(**{**short, **fields})


def quick(home, student=None, teacher=None, trainer_class=GKDTrainer, **given) -> GKDTrainer:
    """A trainer on six chats; `given` are arguments of the trainer, or fields."""
    own_student, own_teacher, tokenizer = load(home)
    of_trainer = ("train_dataset", "eval_dataset", "callbacks", "optimizers", "data_collator")
    of_trainer += ("compute_metrics", "preprocess_logits_for_metrics")
    more = {name: given.pop(name) for name in of_trainer if name in given}
    return trainer_class(
        model=student if student is not None else own_student,
        teacher_model=teacher if teacher is not None else own_teacher,
        args=arguments(**given),
        processing_class=tokenizer,
        **{"train_dataset": chats(), **more},
    )

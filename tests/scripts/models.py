"""The models before, between and after: in notebooks they are used like any others."""

from __future__ import annotations

import copy
import gc
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, pipeline

from tests.scripts.library import GKDTrainer, arguments, chats, load, quick

QUESTION = [{"role": "user", "content": "What is 3 plus 4?"}]


def _answer(model, tokenizer) -> str:
    prompt = tokenizer.apply_chat_template(
        QUESTION, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    written = model.generate(**prompt, max_new_tokens=4, do_sample=False)
    return tokenizer.decode(written[0])


def beta_sweep(home: Path) -> None:
    """One pair of models, several trainers."""
    student, teacher, tokenizer = load(home)
    losses = {}
    for beta in (0.1, 0.5, 0.9):
        trainer = GKDTrainer(
            model=student, teacher_model=teacher, processing_class=tokenizer,
            args=arguments(output_dir=f"out-{beta}", beta=beta), train_dataset=chats(),
        )  # fmt: skip
        losses[beta] = trainer.train().training_loss
    assert len(set(losses.values())) == 3


def a_fresh_student_each_time(home: Path) -> None:
    """The teacher is one object, and unchanged in the end."""
    _, teacher, tokenizer = load(home)
    before = {name: p.clone() for name, p in teacher.state_dict().items()}
    for rate in (1e-3, 1e-4):
        student = AutoModelForCausalLM.from_pretrained(home / "student")
        trainer = GKDTrainer(
            model=student, teacher_model=teacher, processing_class=tokenizer,
            args=arguments(output_dir=f"out-{rate}", learning_rate=rate), train_dataset=chats(),
        )  # fmt: skip
        trainer.train()
        del student, trainer
        gc.collect()
    after = teacher.state_dict()
    assert all(torch.equal(p, after[name]) for name, p in before.items())


def before_and_after(home: Path) -> None:
    """What does it say now?"""
    trainer = quick(home, learning_rate=0.05, lmbda=0.0)
    tokenizer = trainer.processing_class
    before = _answer(trainer.model, tokenizer)
    trainer.train()
    trainer.model.eval()
    after = _answer(trainer.model, tokenizer)
    assert before != after
    trainer.save_model("saved")
    saved = AutoModelForCausalLM.from_pretrained("saved")
    assert _answer(saved, tokenizer) == after


def save_pretrained(home: Path) -> None:
    """Model and tokenizer, by hand."""
    trainer = quick(home)
    trainer.train()
    trainer.model.save_pretrained("final")
    trainer.processing_class.save_pretrained("final")
    again = AutoModelForCausalLM.from_pretrained("final")
    AutoTokenizer.from_pretrained("final")
    assert again.num_parameters() == trainer.model.num_parameters() > 0
    for name, value in trainer.model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name


def state_dict_by_hand(home: Path) -> None:
    """torch.save, and a model of the same configuration."""
    trainer = quick(home)
    trainer.train()
    torch.save(trainer.model.state_dict(), "weights.pt")
    fresh = AutoModelForCausalLM.from_config(trainer.model.config)
    fresh.load_state_dict(torch.load("weights.pt"))
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        trainer.model.eval()
        assert torch.allclose(fresh.eval()(ids).logits, trainer.model(ids).logits, atol=1e-6)


def text_generation_pipeline(home: Path) -> None:
    """transformers' pipeline on the trained object."""
    trainer = quick(home)
    trainer.train()
    generator = pipeline("text-generation", model=trainer.model, tokenizer=trainer.processing_class)
    (answer,) = generator(QUESTION, max_new_tokens=4, return_full_text=False)
    assert isinstance(answer["generated_text"], str)


def copies_and_casts(home: Path) -> None:
    """What one does to a model."""
    trainer = quick(home)
    trainer.train()
    twin = copy.deepcopy(trainer.model)
    twin.half()
    assert next(trainer.model.parameters()).dtype == torch.float32
    trainer.model.to("cpu").eval().requires_grad_(False)
    assert not any(p.requires_grad for p in trainer.model.parameters())


def a_loss_of_my_own(home: Path) -> None:
    """Forward and backward by hand after training."""
    trainer = quick(home)
    trainer.train()
    ids = trainer.processing_class("The fox is red.", return_tensors="pt").input_ids
    loss = trainer.model(input_ids=ids, labels=ids).loss
    loss.backward()
    assert all(p.grad is not None for p in trainer.model.parameters() if p.requires_grad)
    with torch.no_grad():
        assert trainer.teacher_model(input_ids=ids).logits.shape[:2] == ids.shape


def the_student_becomes_a_teacher(home: Path) -> None:
    """Two generations."""
    first = quick(home, output_dir="first")
    first.train()
    second = quick(home, teacher=first.model, output_dir="second")
    assert second.train().training_loss > 0


def frozen_embeddings(home: Path) -> None:
    """Parameters that do not learn stay as they are."""
    student, *_ = load(home)
    student.model.embed_tokens.weight.requires_grad_(False)
    before = student.model.embed_tokens.weight.clone()
    layer = student.model.layers[0].mlp.up_proj.weight.clone()
    trainer = quick(home, student=student)
    trainable = sum(p.numel() for p in student.parameters() if p.requires_grad)
    assert trainer.get_num_trainable_parameters() == trainable
    trainer.train()
    assert torch.equal(student.model.embed_tokens.weight, before)
    assert not torch.equal(student.model.layers[0].mlp.up_proj.weight, layer)
    assert not student.model.embed_tokens.weight.requires_grad


def after_an_exception(home: Path) -> None:
    """A cell that fails, is mended, and run again on the same objects."""
    from transformers import TrainerCallback

    class Fails(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            raise RuntimeError("not this time")

    student, teacher, _ = load(home)
    try:
        quick(home, student, teacher, callbacks=[Fails()], output_dir="a").train()
    except RuntimeError as error:
        assert str(error) == "not this time"
    else:
        raise AssertionError("it did not fail")
    assert student.num_parameters() > 0
    quick(home, student, teacher, output_dir="b").train()
    student.save_pretrained("final")


def optimizer_s_state(home: Path) -> None:
    """trainer.optimizer and trainer.lr_scheduler are there."""
    trainer = quick(home)
    assert trainer.optimizer is None and trainer.lr_scheduler is None
    trainer.train()
    assert trainer.optimizer.param_groups[0]["lr"] == trainer.lr_scheduler.get_last_lr()[0] == 0
    assert trainer.optimizer.state_dict()["param_groups"]


def tokens_of_my_own(home: Path) -> None:
    """Added to the tokenizer, and to both models."""
    student, teacher, tokenizer = load(home)
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    tokenizer.add_tokens(["<tool>"])
    for model in (student, teacher):
        model.resize_token_embeddings(len(tokenizer))
    trainer = GKDTrainer(
        model=student, teacher_model=teacher, processing_class=tokenizer, args=arguments(),
        train_dataset=chats(),
    )  # fmt: skip
    trainer.train()
    trainer.save_model("saved")
    saved = AutoModelForCausalLM.from_pretrained("saved")
    assert saved.config.vocab_size == len(AutoTokenizer.from_pretrained("saved")) == len(tokenizer)
    assert saved.config.pad_token_id == tokenizer.pad_token_id


def where_it_stops(home: Path) -> None:
    """A base model learns to end turns as the tokenizer does, and its files say so."""
    student, teacher, tokenizer = load(home)
    student.config.eos_token_id, student.config.pad_token_id = 5, None
    student.generation_config = GenerationConfig(eos_token_id=5)
    trainer = quick(home, student, teacher)
    trainer.train()
    trainer.save_model("saved")
    for place in (trainer.model, AutoModelForCausalLM.from_pretrained("saved")):
        assert place.generation_config.eos_token_id == [tokenizer.eos_token_id, 5]
        assert place.config.eos_token_id == tokenizer.eos_token_id
        assert place.config.pad_token_id == tokenizer.pad_token_id

"""Callbacks as they are written for transformers' Trainer."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from transformers import (
    GenerationConfig,
    PrinterCallback,
    ProgressCallback,
    TrainerCallback,
)

from tests.scripts.library import IS_TRL, chats, quick


def write_a_log(home: Path) -> None:
    """on_log to a file of one's own."""

    class Writes(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            if state.is_world_process_zero:
                with open("log.jsonl", "a") as file:
                    file.write(json.dumps({**logs, "step": state.global_step}) + "\n")

    quick(home, callbacks=[Writes()]).train()
    lines = [json.loads(line) for line in Path("log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2]
    assert "train_runtime" in lines[-1]


def stop_after_one(home: Path) -> None:
    """should_training_stop."""

    class Stops(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step >= 1
            return control

    trainer = quick(home, callbacks=[Stops])
    trainer.train()
    assert trainer.state.global_step == 1


def evaluate_and_save_when_i_say(home: Path) -> None:
    """should_evaluate, should_save, should_log."""

    class Asks(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 2:
                control.should_evaluate = control.should_save = control.should_log = True
            return control

    trainer = quick(
        home, callbacks=[Asks()], eval_dataset=chats(2, seed=1), logging_steps=100, max_steps=3
    )
    trainer.train()
    assert [e["step"] for e in trainer.state.log_history if "eval_loss" in e] == [2]
    assert [path.name for path in Path("out").glob("checkpoint-*")] == ["checkpoint-2"]


def a_curriculum_of_lmbda(home: Path) -> None:
    """The callback knows the trainer and changes trainer.lmbda."""

    class Curriculum(TrainerCallback):
        def __init__(self):
            self.trainer = None

        def on_step_begin(self, args, state, control, **kwargs):
            self.trainer.lmbda = 1.0 if state.global_step >= 2 else 0.0

    curriculum = Curriculum()
    trainer = quick(home, callbacks=[curriculum], max_steps=4, lmbda=0.5)
    curriculum.trainer = trainer
    trainer.train()
    assert trainer.lmbda == 1.0
    if not IS_TRL:
        rows = [json.loads(line) for line in Path("out/metrics.jsonl").read_text().splitlines()]
        own = [row["source"]["student"] for row in rows if "loss" in row]
        assert own == [0, 0, 2, 2]


def colder_and_colder(home: Path) -> None:
    """trainer.generation_config and trainer.beta while training."""

    class Cools(TrainerCallback):
        trainer = None

        def on_step_end(self, args, state, control, **kwargs):
            self.trainer.generation_config.temperature *= 0.5
            self.trainer.beta = min(1.0, self.trainer.beta + 0.25)

    cools = Cools()
    trainer = quick(home, callbacks=[cools], lmbda=1.0, temperature=0.8)
    cools.trainer = trainer
    assert isinstance(trainer.generation_config, GenerationConfig)
    trainer.train()
    assert trainer.generation_config.temperature == 0.2 and trainer.beta == 1.0


def samples_at_each_evaluation(home: Path) -> None:
    """model.generate inside of on_evaluate."""

    class Samples(TrainerCallback):
        def __init__(self):
            self.texts = []

        @torch.no_grad()
        def on_evaluate(self, args, state, control, model=None, processing_class=None, **kwargs):
            ids = processing_class("What is 3 plus 4?", return_tensors="pt").input_ids
            was_training = model.training
            model.eval()
            written = model.generate(ids, max_new_tokens=4, do_sample=False)
            model.train(was_training)
            self.texts.append(processing_class.decode(written[0]))

    samples = Samples()
    quick(
        home, callbacks=[samples], eval_dataset=chats(2, seed=1), eval_strategy="steps",
        eval_steps=1, max_steps=3,
    ).train()  # fmt: skip
    assert len(samples.texts) == 3


def keep_copies(home: Path) -> None:
    """model.save_pretrained and state_dict inside of callbacks."""

    class Keeps(TrainerCallback):
        def __init__(self):
            self.norms = []

        def on_train_begin(self, args, state, control, model=None, **kwargs):
            self.norms.append(sum(float(p.norm()) for p in model.parameters()))

        def on_step_end(self, args, state, control, model=None, **kwargs):
            model.save_pretrained(f"step-{state.global_step}")
            self.norms.append(sum(float(p.norm()) for p in model.state_dict().values()))

    keeps = Keeps()
    trainer = quick(home, callbacks=[keeps])
    trainer.train()
    assert len(set(keeps.norms)) == 3 and min(keeps.norms) > 0
    from transformers import AutoModelForCausalLM

    last = AutoModelForCausalLM.from_pretrained("step-2")
    for kept, trained in zip(last.parameters(), trainer.model.parameters()):
        assert torch.equal(kept, trained.cpu())


def all_events(home: Path) -> None:
    """Every event comes, with what transformers passes."""

    class Notes(TrainerCallback):
        def __init__(self):
            self.seen = {}

    def note(name):
        def event(self, args, state, control, **kwargs):
            self.seen[name] = kwargs

        return event

    names = [name for name in dir(TrainerCallback) if name.startswith("on_")]
    for name in names:
        setattr(Notes, name, note(name))
    notes = Notes()
    trainer = quick(
        home, callbacks=[notes], eval_dataset=chats(2, seed=1), eval_strategy="steps",
        eval_steps=1, save_strategy="steps", save_steps=1, gradient_accumulation_steps=2,
    )  # fmt: skip
    trainer.train()
    trainer.predict(chats(2, seed=3))
    assert set(names) - notes.seen.keys() == {"on_push_begin"}
    told = notes.seen["on_step_end"]
    assert told["model"] is trainer.model or IS_TRL
    assert told["optimizer"].param_groups and told["lr_scheduler"].get_last_lr()
    assert len(told["train_dataloader"]) == 3
    assert "eval_loss" in notes.seen["on_evaluate"]["metrics"]


def add_remove_pop(home: Path) -> None:
    """The list of callbacks."""

    class Counts(TrainerCallback):
        steps = 0

        def on_step_end(self, args, state, control, **kwargs):
            Counts.steps += 1

    trainer = quick(home)
    trainer.add_callback(Counts)
    popped = trainer.pop_callback(Counts)
    assert isinstance(popped, Counts) and trainer.pop_callback(Counts) is None
    trainer.add_callback(popped)
    trainer.remove_callback(Counts)
    trainer.train()
    assert Counts.steps == 0
    trainer.add_callback(PrinterCallback)
    trainer.add_callback(ProgressCallback)
    trainer.add_callback(popped)
    trainer.train()
    assert Counts.steps == 2


def change_the_rate(home: Path) -> None:
    """optimizer.param_groups inside of a callback."""

    class Halves(TrainerCallback):
        def on_step_end(self, args, state, control, optimizer=None, **kwargs):
            for group in optimizer.param_groups:
                group["weight_decay"] = 0.0
            assert len({group["lr"] for group in optimizer.param_groups}) == 1

    quick(home, callbacks=[Halves()]).train()


def a_metric_of_a_callback(home: Path) -> None:
    """on_evaluate adds to the metrics, and the best model is chosen by what it adds."""

    class Judges(TrainerCallback):
        scores = iter([3.0, 1.0, 2.0])

        def on_evaluate(self, args, state, control, metrics=None, **kwargs):
            metrics["eval_judged"] = next(self.scores)

    trainer = quick(
        home, callbacks=[Judges()], eval_dataset=chats(2, seed=1), max_steps=3,
        eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1,
        load_best_model_at_end=True, metric_for_best_model="judged", greater_is_better=False,
    )  # fmt: skip
    trainer.train()
    assert trainer.state.best_metric == 1.0 and trainer.state.best_global_step == 2

"""Evaluations, metrics of one's own, predictions."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from datasets import DatasetDict
from transformers import EarlyStoppingCallback

from tests.scripts.library import IS_TRL, chats, quick


def _accuracy(prediction) -> dict[str, float]:
    predictions, labels = prediction
    predictions, labels = predictions[:, :-1], labels[:, 1:]
    mask = labels != -100
    return {"accuracy": float((predictions == labels)[mask].mean())}


def _argmax(logits, labels):
    return logits.argmax(dim=-1)


def token_accuracy(home: Path) -> None:
    """compute_metrics of what preprocess_logits_for_metrics leaves."""
    trainer = quick(
        home, eval_dataset=chats(3, seed=1), compute_metrics=_accuracy,
        preprocess_logits_for_metrics=_argmax, eval_strategy="steps", eval_steps=1,
    )  # fmt: skip
    trainer.train()
    evaluations = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    assert len(evaluations) == 2 and all(0 <= e["eval_accuracy"] <= 1 for e in evaluations)


def accuracy_of_logits(home: Path) -> None:
    """All logits of a small set."""
    seen = {}

    def compute_metrics(prediction):
        seen["shapes"] = prediction.predictions.shape, prediction.label_ids.shape
        labels = prediction.label_ids[:, 1:]
        chosen = np.argmax(prediction.predictions[:, :-1], axis=-1)
        return {"accuracy": (chosen == labels)[labels != -100].mean()}

    trainer = quick(home, eval_dataset=chats(3, seed=1), compute_metrics=compute_metrics)
    metrics = trainer.evaluate()
    assert isinstance(metrics["eval_accuracy"], float)
    (rows, width, vocabulary), labels = seen["shapes"]
    assert (rows, vocabulary) == (3, 300) and labels == (3, width)


def perplexity_from_logits(home: Path) -> None:
    """The cross-entropy that the arrays give is the model's own."""

    def compute_metrics(prediction):
        logits = torch.tensor(prediction.predictions[:, :-1]).flatten(0, 1)
        labels = torch.tensor(prediction.label_ids[:, 1:]).flatten()
        return {"nll": float(torch.nn.functional.cross_entropy(logits, labels, ignore_index=-100))}

    trainer = quick(home, eval_dataset=chats(3, seed=1), compute_metrics=compute_metrics)
    told = trainer.evaluate()["eval_nll"]
    total, tokens = 0.0, 0
    for batch in trainer.get_eval_dataloader():
        labels = batch["labels"]
        with torch.no_grad():
            logits = trainer.model(
                input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]
            ).logits
        loss = torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1),
            labels[:, 1:].flatten(),
            ignore_index=-100,
            reduction="sum",
        )
        total, tokens = total + float(loss), tokens + int((labels != -100).sum())
    assert abs(told - total / tokens) < 1e-4


def metrics_batch_by_batch(home: Path) -> None:
    """batch_eval_metrics, as transformers documents it."""

    class Accuracy:
        def __init__(self):
            self.right = self.all = self.calls = 0

        def __call__(self, prediction, compute_result=False):
            labels = torch.as_tensor(prediction.label_ids)[:, 1:]
            chosen = torch.as_tensor(prediction.predictions)[:, :-1]
            mask = labels != -100
            self.right += int((chosen == labels)[mask].sum())
            self.all += int(mask.sum())
            self.calls += 1
            if compute_result:
                return {"accuracy": self.right / self.all, "calls": self.calls}

    trainer = quick(
        home, eval_dataset=chats(5, seed=1), compute_metrics=Accuracy(),
        preprocess_logits_for_metrics=_argmax, batch_eval_metrics=True,
    )  # fmt: skip
    metrics = trainer.evaluate()
    assert metrics["eval_calls"] == 3 and 0 <= metrics["eval_accuracy"] <= 1


def inputs_and_losses(home: Path) -> None:
    """include_for_metrics."""

    def compute_metrics(prediction):
        assert prediction.inputs.shape == prediction.predictions.shape
        return {"rows": len(prediction.losses), "mean_loss": prediction.losses.mean()}

    trainer = quick(
        home, eval_dataset=chats(3, seed=1), compute_metrics=compute_metrics,
        preprocess_logits_for_metrics=_argmax, include_for_metrics=["inputs", "loss"],
    )  # fmt: skip
    metrics = trainer.evaluate()
    assert metrics["eval_rows"] >= 3 and metrics["eval_mean_loss"] > 0


def lists_of_batches(home: Path) -> None:
    """eval_do_concat_batches off."""

    def compute_metrics(prediction):
        return {"batches": len(prediction.predictions)}

    trainer = quick(
        home, eval_dataset=chats(3, seed=1), compute_metrics=compute_metrics,
        preprocess_logits_for_metrics=_argmax, eval_do_concat_batches=False,
    )  # fmt: skip
    assert trainer.evaluate()["eval_batches"] == 2


def losses_alone(home: Path) -> None:
    """prediction_loss_only: nobody asks compute_metrics."""
    trainer = quick(
        home, eval_dataset=chats(3, seed=1), compute_metrics=_accuracy, prediction_loss_only=True
    )
    metrics = trainer.evaluate()
    assert "eval_loss" in metrics and "eval_accuracy" not in metrics


def predict(home: Path) -> None:
    """Predictions, labels and metrics of a test set."""
    trainer = quick(home, compute_metrics=_accuracy, preprocess_logits_for_metrics=_argmax)
    trainer.train()
    output = trainer.predict(chats(3, seed=2))
    assert output.predictions.shape == output.label_ids.shape and len(output.predictions) == 3
    trainer.log_metrics("test", output.metrics)
    trainer.save_metrics("test", output.metrics)
    assert {"test_loss", "test_accuracy", "test_runtime"} <= output.metrics.keys()
    chosen, labels = output.predictions[:, :-1], output.label_ids[:, 1:]
    assert output.metrics["test_accuracy"] == float((chosen == labels)[labels != -100].mean())


def several_sets(home: Path) -> None:
    """A dict of evaluation sets, one of which chooses the best model."""
    trainer = quick(
        home, eval_dataset={"easy": chats(2, seed=1), "hard": chats(3, seed=2)},
        eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1,
        load_best_model_at_end=True, metric_for_best_model="eval_hard_loss",
    )  # fmt: skip
    trainer.train()
    assert trainer.state.best_metric is not None and trainer.state.best_model_checkpoint
    metrics = trainer.evaluate()
    assert {"eval_easy_loss", "eval_hard_loss"} <= metrics.keys()


def splits(home: Path) -> None:
    """train_test_split; a DatasetDict of what to evaluate on."""
    data = chats(8).train_test_split(test_size=0.25, seed=0)
    trainer = quick(home, train_dataset=data["train"], eval_dataset=data["test"])
    trainer.train()
    assert "eval_loss" in trainer.evaluate()
    others = DatasetDict({"validation": data["test"], "train": data["train"]})
    metrics = trainer.evaluate(others)
    assert {"eval_validation_loss", "eval_train_loss"} <= metrics.keys()


def another_set_and_prefix(home: Path) -> None:
    """Held-out data at the end."""
    trainer = quick(home, eval_dataset=chats(2, seed=1))
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] != before
    metrics = trainer.evaluate(eval_dataset=chats(2, seed=5), metric_key_prefix="test")
    assert "test_loss" in metrics and not any(name.startswith("eval_") for name in metrics)


def early_stopping(home: Path) -> None:
    """A run that does not improve."""
    trainer = quick(
        home, eval_dataset=chats(2, seed=1), learning_rate=0.0, lmbda=0.0, max_steps=6,
        callbacks=[EarlyStoppingCallback(early_stopping_patience=2)], eval_strategy="steps",
        eval_steps=1, save_strategy="steps", save_steps=1, load_best_model_at_end=True,
        metric_for_best_model="eval_loss", greater_is_better=False,
    )  # fmt: skip
    trainer.train()
    assert trainer.state.global_step == 3 and trainer.state.best_global_step == 1
    assert Path(trainer.state.best_model_checkpoint).name == "checkpoint-1"


def the_best_by_my_metric(home: Path) -> None:
    """metric_for_best_model is one of compute_metrics'."""
    values = iter([0.5, 0.9, 0.7, 0.9])
    trainer = quick(
        home, eval_dataset=chats(2, seed=1), max_steps=3,
        compute_metrics=lambda prediction: {"score": next(values)},
        preprocess_logits_for_metrics=_argmax, eval_strategy="steps", eval_steps=1,
        save_strategy="steps", save_steps=1, load_best_model_at_end=True,
        metric_for_best_model="score", greater_is_better=True,
    )  # fmt: skip
    trainer.train()
    assert trainer.state.best_metric == 0.9 and trainer.state.best_global_step == 2


def another_evaluation_set(home: Path) -> None:
    """trainer.eval_dataset is assigned."""
    trainer = quick(home, eval_dataset=chats(2, seed=1))
    before = trainer.evaluate()["eval_loss"]
    trainer.eval_dataset = chats(4, seed=7)
    assert trainer.evaluate()["eval_loss"] != before
    assert len(trainer.eval_dataset) == 4
    if not IS_TRL:
        trainer.train_dataset = chats(3)
        assert len(trainer.get_train_dataloader().dataset) == 3


def start_with_an_evaluation(home: Path) -> None:
    """eval_on_start."""
    trainer = quick(
        home, eval_dataset=chats(2, seed=1), eval_on_start=True, eval_strategy="steps", eval_steps=2
    )
    trainer.train()
    steps = [entry["step"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert steps == [0, 2]


def before_and_after_training(home: Path) -> None:
    """The history is the run's."""
    trainer = quick(home, eval_dataset=chats(2, seed=1))
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.state.log_history[0].keys() >= {"loss", "learning_rate"}
    assert trainer.evaluate()["eval_loss"] != before
    assert "eval_loss" in trainer.state.log_history[-1]


def a_stream_to_evaluate_on(home: Path) -> None:
    """An IterableDataset, read to its end."""
    rows = chats(4, seed=1)
    trainer = quick(home, train_dataset=chats().to_iterable_dataset(), eval_dataset=rows)
    whole = trainer.evaluate()["eval_loss"]
    streamed = trainer.evaluate(rows.to_iterable_dataset())["eval_loss"]
    assert abs(streamed - whole) < 1e-6
    trainer.train()


def patience_alone(home: Path) -> None:
    """Early stopping by a metric that should rise; no best model is kept."""
    values = iter([3.0, 2.0, 1.0, 0.0])
    trainer = quick(
        home, eval_dataset=chats(2, seed=1), eval_strategy="steps", eval_steps=1, max_steps=6,
        compute_metrics=lambda prediction: {"score": next(values)},
        preprocess_logits_for_metrics=_argmax, metric_for_best_model="score",
        callbacks=[EarlyStoppingCallback(early_stopping_patience=2)],
    )  # fmt: skip
    trainer.train()
    assert trainer.state.best_metric == 3.0 and trainer.state.global_step == 3
    assert trainer.args.do_eval and trainer.args.greater_is_better

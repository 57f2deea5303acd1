"""Metrics, callbacks, an optimizer and subclasses written for transformers' Trainer, on two ranks."""

from __future__ import annotations

import pytest

from tests.dist.outcomes import Results

IGNORED = -100


@pytest.mark.parametrize("way", ["whole", "by batch", "lists", "texts", "losses"])
def test_compute_metrics_gets_the_same_on_every_rank_and_on_any_number(
    one_rank: Results, two_ranks: Results, way: str
) -> None:
    (alone,), (first, second) = one_rank["own_metrics"], two_ranks["own_metrics"]
    assert first[way]["given"] == second[way]["given"]
    assert first[way]["loss"] == pytest.approx(alone[way]["loss"], rel=1e-6)
    ours, theirs = first[way]["given"], alone[way]["given"]
    assert len(ours) == len(theirs) == alone[way]["calls"] == first[way]["calls"]
    for mine, other in zip(ours, theirs):
        losses = mine.pop("losses"), other.pop("losses")
        if losses[0] is not None:
            assert losses[0] == pytest.approx(losses[1], rel=1e-5) and len(losses[0]) == 5
    assert ours == theirs


def test_predictions_stand_before_the_tokens_that_they_predict(two_ranks: Results) -> None:
    """Of five rows, padded on the left, and by one batch after the other."""
    result = two_ranks["own_metrics"][0]
    (whole,) = result["whole"]["given"]
    labels, predictions = whole["labels"], whole["predictions"]
    assert len(labels) == len(predictions) == 5
    assert {len(row) for row in labels} == {len(row) for row in predictions}
    batches = result["by batch"]["given"]
    assert [len(batch["labels"]) for batch in batches] == [2, 2, 1]
    assert [batch["last"] for batch in batches] == [False, False, True]
    completions = [[one for one in row if one != IGNORED] for row in labels]
    assert completions == [
        [one for one in row if one != IGNORED] for batch in batches for row in batch["labels"]
    ]
    texts = result["texts"]["given"][0]
    assert [[one for one in row if one != IGNORED] for row in texts["labels"]] == completions
    assert all(1 <= sum(one != IGNORED for one in row) <= 12 for row in texts["predictions"])
    (lists,) = result["lists"]["given"]
    assert [len(batch) for batch in lists["labels"]] == [2, 2, 1]
    (losses,) = result["losses"]["given"]
    assert [len(row) for row in losses["inputs"]] == [len(row) for row in labels]
    for inputs, row in zip(losses["inputs"], labels):
        assert all(label in (IGNORED, token) for token, label in zip(inputs, row))


def test_a_prediction_step_is_a_batch_of_all_ranks(two_ranks: Results) -> None:
    assert {
        way["steps"] for name, way in two_ranks["own_metrics"][0].items() if name != "predict"
    } == {3}


def test_predict_returns_what_it_predicted(one_rank: Results, two_ranks: Results) -> None:
    (alone,), (first, second) = one_rank["own_metrics"], two_ranks["own_metrics"]
    assert first["predict"] == second["predict"] == alone["predict"]
    assert len(first["predict"]["predictions"]) == 3
    assert {"test_loss", "test_runtime", "test_calls"} <= set(first["predict"]["metrics"])


def test_a_subclass_s_methods_are_called(two_ranks: Results) -> None:
    first, second = two_ranks["overrides"]
    updates = [row for row in first["rows"] if "loss" in row]
    assert [row["lr"] for row in updates] == [0.1, 0.05, 0.025]
    assert [row["train/mine"] for row in first["rows"] if "train/mine" in row] == [7.0] * 4
    assert all(entry["mine"] == 7.0 for entry in first["history"])
    assert first["optimizer"] == second["optimizer"] == "SGD"
    # Its loss is the forward divergence, as beta=0 is.
    assert updates[0]["loss"] == pytest.approx(first["plain"][0]["loss"], rel=1e-5)


def test_a_checkpoint_is_a_model_s_directory(two_ranks: Results) -> None:
    result = two_ranks["overrides"][0]
    wanted = {"config.json", "model.safetensors", "tokenizer.json", "trainer_state.json", "engine"}
    assert wanted <= set(result["files"]) and result["state"] == 2
    assert result["notes"] == [True, True], "by the subclass's save_model"
    assert result["checkpoint is the finished student"] is False


def test_a_partitioned_model_is_not_saved_as_an_empty_one(two_ranks: Results) -> None:
    for rank in two_ranks["models_in_engines"]:
        for what in ("save_pretrained", "state_dict"):
            assert "call trainer.save_model(directory) on all ranks" in rank["said"][what]
        assert "the student is in the engine of another trainer" in rank["said"]["another trainer"]
        assert not rank["written"]


def test_train_called_twice_goes_on_with_a_schedule_of_its_own(two_ranks: Results) -> None:
    first, second = two_ranks["models_in_engines"]
    assert first["losses"] == second["losses"] and len(set(first["losses"])) == 3
    assert first["rates"] == pytest.approx([5e-3, 2.5e-3])
    assert first["step"] == 2 and first["loads"] > 10_000
    for rank in (first, second):
        said = rank["said"]["a field of the engines"]
        assert "args.weight_decay was changed after the engines" in said


def test_a_field_that_is_assigned_while_training_acts(two_ranks: Results) -> None:
    result = two_ranks["changes"][0]
    none, lmbda, beta = (result[name]["rows"] for name in ("none", "lmbda", "beta"))
    assert lmbda[0]["loss"] == beta[0]["loss"] == none[0]["loss"]
    assert none[1]["source"]["student"] == 0 and lmbda[1]["source"]["data"] == 0
    assert lmbda[1]["mean_completion_length"] <= 3
    assert beta[1]["source"] == none[1]["source"] and beta[1]["loss"] > 2 * none[1]["loss"]


@pytest.mark.parametrize(
    "name, sentence",
    [
        ("too late", "args.learning_rate was changed while training"),
        ("out of bounds", "lmbda"),
        ("one rank", "args.lmbda was not changed alike on all ranks"),
        ("draws on one rank", "trainer.generation_config.top_k was changed"),
    ],
)
def test_a_field_that_cannot_act_is_refused_on_all_ranks(
    two_ranks: Results, name: str, sentence: str
) -> None:
    first, second = (rank[name]["said"] for rank in two_ranks["changes"])
    assert first == second and sentence in first
    assert len(two_ranks["changes"][0][name]["rows"]) == 1

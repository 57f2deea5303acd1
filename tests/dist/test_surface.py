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
            assert losses[0] == pytest.approx(losses[1], rel=1e-4) and len(losses[0]) == 5
    assert ours == theirs


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
    ],
)
def test_a_field_that_cannot_act_is_refused_on_all_ranks(
    two_ranks: Results, name: str, sentence: str
) -> None:
    first, second = (rank[name]["said"] for rank in two_ranks["changes"])
    assert first == second and sentence in first
    assert len(two_ranks["changes"][0][name]["rows"]) == 1

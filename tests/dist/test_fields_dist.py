"""What fields of the configuration do, on two ranks."""

from __future__ import annotations

import pytest

from tests.dist.outcomes import Results, losses

OPTIMIZERS = ("adamw", "sgd", "rmsprop")


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_of_flat_parts_does_what_torch_s_does_with_whole_parameters(
    two_ranks: Results, name: str
) -> None:
    found = two_ranks["optimizers"][0]
    parts, whole = (losses(found[f"{name} {place}"]) for place in ("partitioned", "whole"))
    assert len(parts) == 3 and parts == pytest.approx(whole, rel=1e-5)
    others = [losses(found[f"{other} whole"])[2] for other in OPTIMIZERS if other != name]
    assert all(abs(parts[2] - other) > 1e-4 for other in others)


def test_a_share_of_the_updates_warms_up(two_ranks: Results) -> None:
    rates = [row["lr"] for row in two_ranks["optimizers"][0]["warmup"] if "loss" in row]
    assert rates == pytest.approx([0.0, 0.005, 0.01, 0.005])


def test_another_optimizer_resumes_exactly(two_ranks: Results) -> None:
    found = two_ranks["optimizers"][0]
    assert losses(found["resumed"]) == losses(found["not interrupted"])
    assert len(losses(found["resumed"])) == 3


@pytest.mark.parametrize("way", ["all", "non_padding"])
def test_tokens_are_counted_on_all_ranks(two_ranks: Results, way: str) -> None:
    everywhere = [rank[way] for rank in two_ranks["measures"]]
    of_sequences = sum(sum(rank["lengths"]) for rank in everywhere)
    with_padding = sum(rank["padded"] for rank in everywhere)
    expected = with_padding if way == "all" else of_sequences
    assert of_sequences <= with_padding
    for rank in everywhere:
        assert rank["seen"] == expected
        told = [entry for entry in rank["logged"] if "num_input_tokens_seen" in entry]
        assert [entry["num_input_tokens_seen"] for entry in told][:2] == [expected, expected]
        assert told[0]["train_tokens_per_second"] > 0
        metrics = rank["metrics"]
        per_second = expected / metrics["train_runtime"]
        assert metrics["train_tokens_per_second"] == pytest.approx(per_second, rel=0.01)


def test_memory_is_told_by_stage(two_ranks: Results) -> None:
    for rank in two_ranks["measures"]:
        told = {f"{stage}_mem_cpu_{what}_delta" for stage in ("init", "train") for what in ("alloc", "peaked")}  # fmt: skip
        assert told <= rank["all"]["metrics"].keys()
        assert "eval_mem_cpu_alloc_delta" in rank["all"]["evaluated"]


def test_a_callback_goes_on_with_its_state_where_that_is_asked_for(two_ranks: Results) -> None:
    for rank in two_ranks["callback_states"]:
        assert rank == {"True": [5, 3], "False": [0, 1]}


def test_a_compiled_student_learns_the_same(two_ranks: Results) -> None:
    found = two_ranks["compiled"][0]
    assert len(found["eager"]) == 2 and found["eager"] == pytest.approx(found["None"], rel=1e-6)


def test_the_first_rank_works_before_the_others(two_ranks: Results) -> None:
    assert two_ranks["first_rank_first"] == [True, True]

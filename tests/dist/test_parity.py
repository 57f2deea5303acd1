"""Two ranks and one, ZeRO-3 and plain torch: the same losses, the same updates, the same tokens."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.dist import plain
from tests.dist.materials import FAMILY_PAIRS
from tests.dist.outcomes import Results, everybody_s_rollouts, losses

# ---------------------------------------------------------------------------------------- the example program


def test_the_example_gives_the_same_losses_on_one_rank_and_two(
    one_rank: Results, two_ranks: Results
) -> None:
    one, two = one_rank["seed_example"][0], two_ranks["seed_example"][0]
    assert one["names"]["steps"] == two["names"]["steps"] == len(losses(one["names"]["rows"])) == 6
    sources = [row["source"] for row in one["names"]["rows"]]
    assert {"student", "data"} <= {
        source for row in sources for source, count in row.items() if count
    }
    assert sources == [row["source"] for row in two["names"]["rows"]]
    for name in ("names", "objects"):
        assert losses(two[name]["rows"]) == pytest.approx(losses(one["names"]["rows"]), rel=1e-4)
        assert two[name]["train_loss"] == pytest.approx(
            sum(losses(two[name]["rows"])) / 6, rel=1e-6
        )
    assert two_ranks["seed_example"][1]["names"]["steps"] == 6


@pytest.mark.parametrize("name", ["names", "objects"])
def test_the_export_is_the_trained_student(two_ranks: Results, materials: Path, name: str) -> None:
    assert two_ranks["seed_example"]
    out = two_ranks.directory / f"seed-{name}"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        logits = model(input_ids=ids).logits
        before = plain.load(materials / "qwen2-student")(input_ids=ids).logits
    trained = load_file(two_ranks.directory / f"seed-{name}-logits.safetensors")["logits"]
    torch.testing.assert_close(logits, trained, rtol=1e-5, atol=1e-5)
    assert (logits - before).abs().max() > 1e-3, "training changed the student"
    text = "What is 3 plus 4?<|im_end|>"
    assert (
        tokenizer(text)["input_ids"]
        == AutoTokenizer.from_pretrained(materials / "qwen2-student")(text)["input_ids"]
    )
    assert tokenizer.chat_template


# ---------------------------------------------------------------------------------------- an update


@pytest.mark.parametrize(
    "name", ["accumulation-1", "accumulation-3", "untied", "stage-2", "stage-0"]
)
def test_an_update_on_two_ranks_is_the_update_of_plain_torch(
    two_ranks: Results, materials: Path, name: str
) -> None:
    ranks = two_ranks["update"]
    (row,) = ranks[0][name]["rows"]
    rollouts = everybody_s_rollouts(ranks, name)
    assert len(rollouts) == (4 if name in ("accumulation-1", "stage-0") else 12)
    assert len({len(rollout["completion_ids"]) for rollout in rollouts}) > 2, (
        "the lengths are uneven"
    )
    assert name != "accumulation-3" or row["perf/micro_batches"] > 1, "gradients are accumulated"
    tokens = [
        sum(len(rollout["completion_ids"]) for rollout in rank[name]["rollouts"]) for rank in ranks
    ]
    assert tokens[0] != tokens[1] and sum(tokens) == row["completion_tokens"]

    start = materials / ("untied" if name == "untied" else "student")
    student, teacher = plain.load(start), plain.load(materials / "teacher")
    before = {key: value.clone() for key, value in student.named_parameters()}
    loss = plain.window_loss(student, teacher, rollouts, temperature=1.5)
    norm = plain.update_(
        student, loss, learning_rate=1e-2, weight_decay=0.1, max_grad_norm=0.02, epsilon=1e-4
    )
    assert row["loss"] == pytest.approx(loss.item(), rel=1e-6)
    assert row["grad_norm"] == pytest.approx(norm, rel=1e-5) and norm > 0.04, (
        "the gradient is clipped"
    )

    got = dict(plain.load(two_ranks.directory / f"update-{name}").named_parameters())
    assert got.keys() == before.keys()
    for key, expected in student.named_parameters():
        update, ours = expected - before[key], got[key] - before[key]
        assert update.abs().max() > 1e-3
        assert (ours - update).norm() <= 1e-5 * update.norm(), key


# ---------------------------------------------------------------------------------------- rollouts


def test_a_sample_s_tokens_do_not_depend_on_batch_ranks_or_engine(
    one_rank: Results, two_ranks: Results
) -> None:
    (expected,) = [rank["gather/1"] for rank in one_rank["rollouts"]]
    lengths = [len(tokens) for tokens in expected.values()]
    assert len(lengths) == 19 and max(lengths) == 30 and min(lengths) < 10, (
        "they end at different times"
    )
    for results in (one_rank, two_ranks):
        ranks = results["rollouts"]
        counts = [len(rank["gather/1"]) for rank in ranks]
        assert len(set(counts)) == len(ranks) and min(counts) > 8, (
            "different numbers, and more than one batch of 8"
        )
        for case in itertools.starmap(
            "{}/{}".format, itertools.product(("gather", "sharded"), (1, 3, 8))
        ):
            together = {sample: tokens for rank in ranks for sample, tokens in rank[case].items()}
            assert together == expected, f"{case} on {len(ranks)} ranks"


def test_the_hybrid_engine_is_used_only_when_asked_for(two_ranks: Results) -> None:
    """DeepSpeed has kernels for Llama, but none of them runs on the CPU."""
    for rank, result in enumerate(two_ranks["hybrid_engine"]):
        assert result["auto"] == "Gathered"
        assert len(result["said"]) == (rank == 0) and all(
            "LlamaForCausalLM" in text for text in result["said"]
        )
        assert (
            "'hybrid' is not possible here" in result["refused"]
            and "not implemented on the CPU" in result["refused"]
        )


def test_the_hybrid_engine_writes_what_the_gathered_student_writes(two_ranks: Results) -> None:
    first, second = two_ranks["hybrid_engine"]
    for result, counts in ((first, [4, 3]), (second, [4, 0])):
        engine, *written = result["hybrid"]
        assert engine == "Hybrid" and result["gather"] == ["Gathered", *written]
        assert [len(tokens) for tokens in written] == counts
    assert losses(first["hybrid rows"]) == pytest.approx(losses(first["gather rows"]), rel=1e-6)
    assert len({len(tokens) for tokens in first["hybrid"][1]}) > 1, "they end at different times"


# ---------------------------------------------------------------------------------------- evaluation


@pytest.mark.parametrize("name, source", [("loss", "data"), ("on_policy_loss", "student")])
def test_an_evaluation_has_the_loss_of_plain_torch(
    two_ranks: Results, materials: Path, name: str, source: str
) -> None:
    ranks = two_ranks["evaluation"]
    rollouts = [rollout for rank in ranks for rollout in rank[name]]
    assert len(rollouts) == 3 and {rollout["source"] for rollout in rollouts} == {source}
    student, teacher = plain.load(materials / "student"), plain.load(materials / "teacher")
    with torch.no_grad():
        expected = plain.window_loss(student, teacher, rollouts)
    for rank in ranks:
        assert rank["metrics"][f"eval_{name}"] == pytest.approx(expected.item(), rel=1e-6)


# ---------------------------------------------------------------------------------------- families


@pytest.mark.parametrize("family", FAMILY_PAIRS)
def test_a_window_of_every_family_has_the_loss_of_plain_torch(
    two_ranks: Results, materials: Path, family: str
) -> None:
    ranks = two_ranks["families"]
    (row,) = ranks[0][family]["rows"]
    assert (
        row["source"] == {"student": 4, "teacher": 0, "data": 0}
        and row["skipped"] == 0
        and row["grad_norm"] > 0
    )
    rollouts = everybody_s_rollouts(ranks, family)
    student, teacher = (
        plain.load(materials / f"{family}-s"),
        plain.load(materials / f"{FAMILY_PAIRS[family]}-t"),
    )
    with torch.no_grad():
        expected = plain.window_loss(student, teacher, rollouts)
    assert row["loss"] == pytest.approx(expected.item(), rel=1e-5)
    trained = plain.load(two_ranks.directory / f"family-{family}")
    assert trained.config.tie_word_embeddings == student.config.tie_word_embeddings
    with torch.no_grad():
        after = plain.window_loss(trained, teacher, rollouts)
    assert after < expected, "an update goes downhill on its own samples"

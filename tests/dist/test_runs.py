"""Whole runs on two ranks: what is counted, where the teacher is, who writes, resuming, callbacks,
faults.
"""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import Trainer, TrainingArguments

from gkd_ds import GKDConfig
from gkd_ds.monitor.evaluation import metric_names
from tests.dist import plain
from tests.dist.events import EVENT_FIELDS, SHORT_FIELDS, Events
from tests.dist.outcomes import Results, everybody_s_rollouts, losses
from tests.dist.runs import NVME
from tests.tiny import MIXTURES


def test_nothing_that_trl_brings_is_imported(one_rank: Results, two_ranks: Results) -> None:
    """The scenarios ran with trl, accelerate and peft hidden: everything here is shown to work
    without them.
    """
    for results in (one_rank, two_ranks):
        assert all(rank["imported"] == [] for rank in results["blocked_imports"])


def test_a_window_costs_one_gather_and_one_teacher_pass(two_ranks: Results) -> None:
    rows = {int(n): case["rows"][0] for n, case in two_ranks["counts"][0].items()}
    assert {n: row["source"]["student"] for n, row in rows.items()} == {1: 2, 4: 8, 8: 16}
    assert rows[8]["perf/micro_batches"] > 1
    for row in rows.values():
        assert row["perf/student_gathers"] == 1
        assert row["perf/teacher_passes"] == 1
        assert row["perf/teacher_bytes"] == rows[1]["perf/teacher_bytes"] > 0


def test_the_teacher_s_place_does_not_matter(two_ranks: Results) -> None:
    places = two_ranks["teacher_places"][0]
    assert losses(places["cpu"]["rows"]) == pytest.approx(
        losses(places["resident"]["rows"]), rel=1e-6
    )


@NVME
def test_a_teacher_on_nvme_gives_the_same_losses(two_ranks: Results) -> None:
    result = two_ranks["teacher_on_nvme"][0]
    assert losses(result["nvme"]) == pytest.approx(losses(result["resident"]), rel=1e-6)
    entries, equal = result["logits"]
    assert equal and entries > 1000, "its logits are the resident teacher's, bit by bit"
    # Of every layer the three matrices of its feed-forward part are large enough.
    assert len(result["files"]) == 2 * 3 and min(result["files"]) >= 1 << 20, (
        "the weights are in files"
    )


@NVME
@pytest.mark.parametrize(
    "damage, what",
    [("rewritten", "was written anew"), ("truncated", "bytes instead of"), ("deleted", "is gone")],
)
def test_a_damaged_swap_file_is_named_on_all_ranks_and_gives_no_target(
    two_ranks: Results, damage: str, what: str
):
    first, second = two_ranks["teacher_on_nvme"]
    assert first[damage] == second[damage]
    assert first["file"] in first[damage] and what in first[damage]


@NVME
def test_the_next_layer_is_read_while_one_computes(two_ranks: Results) -> None:
    """Two layers of three shards on the drive each, looked at once the first layer, and once the
    second, is done.
    """
    for rank in two_ranks["teacher_on_nvme"]:
        assert rank["away"]["auto"] == [[3, 0], [3, 3]]
        assert rank["away"]["least"] == [[3, 2], [3, 3]], (
            "one buffer more than a layer needs: one shard is read ahead"
        )
        assert rank["least gives the same"]


@NVME
def test_an_optimizer_on_nvme_gives_the_same_losses(two_ranks: Results) -> None:
    result = two_ranks["optimizer_on_nvme"][0]
    assert losses(result["nvme"]) == pytest.approx(losses(result["memory"]), rel=1e-6)
    assert result["bytes"] > 50 * 2**20, "the optimizer's states are in files"


@NVME
def test_an_optimizer_on_nvme_is_not_saved_because_it_could_not_be_resumed(
    two_ranks: Results,
) -> None:
    for rank in two_ranks["optimizer_on_nvme"]:
        assert "a run whose optimizer is on NVMe cannot be resumed" in rank["saved"]
    assert not list((two_ranks.directory / "nvme-saved").iterdir())


@NVME
def test_too_few_buffers_are_refused_before_anything_is_read(two_ranks: Results) -> None:
    for rank in two_ranks["teacher_on_nvme"]:
        assert (
            "offload_param.buffer_count to 2, but this teacher needs 4" in rank["too few buffers"]
        )


FEATURES = [
    "shipped",
    "offload_optimizer",
    "hpz",
    "comms_logger",
    "flops_profiler",
    "states_on_host",
]


@pytest.mark.parametrize("feature", FEATURES)
def test_deepspeed_s_switches_leave_the_losses_alone(two_ranks: Results, feature: str) -> None:
    results = two_ranks["scale_features"][0]
    assert losses(results[feature]["rows"]) == pytest.approx(
        losses(results["plain"]["rows"]), rel=1e-6
    )


def test_deepspeed_s_switches_do_what_they_say(two_ranks: Results) -> None:
    rows = two_ranks["scale_features"][0]["plain"]["rows"]
    rollouts = sum(row["perf/student_gathers"] for row in rows[1:])
    assert rollouts > 0
    for results in two_ranks["scale_features"]:
        for name in ("plain", *FEATURES):
            result = results[name]
            assert (result["second copies"] > 0) == (name == "hpz")
            assert result["optimizer offloaded"] == (name == "offload_optimizer")
            assert (sum(result["recorded"].values()) > 100) == (name == "comms_logger")
            # Two moments in fp32 of this rank's half, for every rollout of the student after the
            # first update.
            expected = rollouts * 8 * result["shard"] if name == "states_on_host" else 0
            assert result["bytes moved"] == pytest.approx(expected, rel=1e-3)
        assert results["comms_logger"]["recorded"]["all_gather_into_tensor"] > 10
    assert "flops" in (two_ranks.directory / "flops.txt").read_text()
    assert two_ranks.log.count("Comm. Op") == 1, "rank 0 prints the communication logger's summary"


@pytest.mark.parametrize("family", MIXTURES)
def test_mixtures_of_experts_learn_although_ranks_use_different_experts(
    two_ranks: Results, family: str
) -> None:
    ranks = two_ranks["scale_features"]
    gathered, sharded = (ranks[0][f"{family}/{engine}"]["rows"] for engine in ("gather", "sharded"))
    assert losses(sharded) == pytest.approx(losses(gathered), rel=1e-5)
    assert all(row["skipped"] == 0 and row["grad_norm"] > 0 for row in gathered)
    for rank in ranks:
        assert rank[f"{family}/gather"]["rollouts"] == rank[f"{family}/sharded"]["rollouts"]


@pytest.mark.parametrize(
    "name, allowed", [("data", "data"), ("student", "student"), ("teacher", "teacher")]
)
def test_lmbda_and_seq_kd_say_who_writes(
    two_ranks: Results, materials: Path, name: str, allowed: str
) -> None:
    """The second window has one sample: rank 1 has none, and the second micro-batch none on any
    rank.
    """
    ranks = two_ranks["sources"]
    rows = ranks[0][name]["rows"]
    nobody = {"student": 0, "teacher": 0, "data": 0}
    assert [row["source"] for row in rows] == [{**nobody, allowed: 8}, {**nobody, allowed: 1}]
    assert [row["perf/student_gathers"] for row in rows] == [int(allowed == "student")] * 2
    assert [row["perf/teacher_decode_passes"] > 0 for row in rows] == [allowed == "teacher"] * 2
    assert [len(rank[name]["rollouts"]) for rank in ranks] == [1, 0]
    assert all(
        math.isfinite(row["loss"]) and row["skipped"] == 0 and row["grad_norm"] > 0 for row in rows
    )
    assert rows[1]["completion_tokens"] == sum(
        len(r["completion_ids"]) for r in everybody_s_rollouts(ranks, name)
    )


def test_mixed_sources_share_a_window(two_ranks: Results) -> None:
    first, second = (row["source"] for row in two_ranks["sources"][0]["mixed"]["rows"])
    assert first == {"student": 4, "teacher": 4, "data": 0}, "seed 42 draws one micro-batch of each"
    assert sum(second.values()) == 1


def test_the_teacher_writes_what_it_finds_likely(two_ranks: Results, materials: Path) -> None:
    """Its completions are its own: at temperature 0.9 each is likelier to the teacher than to the
    student.
    """
    row = two_ranks["sources"][0]["teacher"]["rows"][0]
    assert row["teacher_logprob"] > row["student_logprob"]


# ---------------------------------------------------------------------------------------- resuming


def test_a_resumed_run_is_the_uninterrupted_run(two_ranks: Results) -> None:
    result = two_ranks["resume"][0]
    compared = (
        "step",
        "epoch",
        "loss",
        "lr",
        "grad_norm",
        "source",
        "completion_tokens",
        "entropy",
        "skipped",
    )
    whole, half = (
        [{key: row[key] for key in compared} for row in result[run]] for run in ("whole", "half")
    )
    assert [row["step"] for row in whole] == [1, 2, 3, 4]
    assert half == whole
    assert (
        any(row["source"]["student"] for row in whole[2:])
        and len({row["lr"] for row in whole}) == 4
    )


def test_a_used_directory_is_refused_by_train_on_all_ranks_and_not_by_the_trainer(
    two_ranks: Results,
) -> None:
    first, second = two_ranks["resume"]
    assert (
        "already holds a run (checkpoint-2)" in first["refused"]
        and first["refused"] == second["refused"]
    )
    assert first["untouched"] and second["untouched"]


def test_a_resumed_run_remembers_what_the_uninterrupted_run_remembers(two_ranks: Results) -> None:
    """The log, whose third loss is a mean over the cut, the mean of all losses, and what the guards
    compare with.
    """
    result = two_ranks["resume"][0]
    speed = ("train_runtime", "train_samples_per_second", "train_steps_per_second")
    whole, half = (
        [{name: entry[name] for name in entry if name not in speed} for entry in history]
        for history in result["histories"]
    )
    assert half == whole and whole[-1]["total_flos"] > 0
    assert [entry["step"] for entry in half] == [3, 4], "the run's summary comes last"
    assert half[0]["loss"] == pytest.approx(sum(row["loss"] for row in result["whole"][:3]) / 3)
    whole, half = result["progress"]
    assert half == whole
    assert len(half["history"]) == sum(row["source"]["student"] > 0 for row in result["whole"]) > 0


def test_a_run_that_goes_on_within_an_epoch_begins_it(two_ranks: Results) -> None:
    events = two_ranks["resume"][0]["events"]
    assert events[:4] == ["on_init_end", "on_train_begin", "on_epoch_begin", "on_step_begin"]
    assert events.count("on_epoch_begin") == events.count("on_epoch_end") == 1


def test_a_resumed_run_ends_with_the_same_weights(two_ranks: Results) -> None:
    assert two_ranks["resume"]
    whole, half = (
        load_file(two_ranks.directory / f"resume-{run}" / "model.safetensors")
        for run in ("whole", "half")
    )
    assert whole.keys() == half.keys()
    assert all(torch.equal(whole[name], half[name]) for name in whole)


def test_a_resumed_run_is_the_same_run_to_wandb(two_ranks: Results) -> None:
    result = two_ranks["resume"][0]
    assert result["run_ids"][0] == result["run_ids"][1] is not None
    assert len(result["wandb"]) == 1 and result["run_ids"][0] in result["wandb"][0]


# ---------------------------------------------------------------------------------------- what goes wrong


def test_an_exception_while_sampling_leaves_the_engine_whole(two_ranks: Results) -> None:
    for rank in two_ranks["generation_that_raises"]:
        before, after, learned = rank["losses"]
        assert "index out of range" in rank["raised"]
        assert after == before and rank["partitioned"][0] == rank["partitioned"][1] > 0
        assert rank["applied"] and sum(learned) < sum(before), "it learns"
        assert rank["written"] == 3


@pytest.mark.parametrize(
    "where, bad", [("targets", [1]), ("loss", [0, 2]), ("stage 2", [1]), ("stage 0", [1])]
)
def test_nan_on_one_rank_skips_the_update_on_all(
    two_ranks: Results, where: str, bad: list[int]
) -> None:
    rows, digests = (two_ranks["faults"][0][where][key] for key in ("rows", "digests"))
    assert [row["skipped"] for row in rows] == [int(window in bad) for window in range(4)]
    assert len(digests) == 4
    for window in range(1, 4):
        assert (digests[window] == digests[window - 1]) == (window in bad)
    assert all(math.isfinite(row["loss"]) for window, row in enumerate(rows) if window not in bad)
    assert two_ranks["faults"][0][where]["stopped"] == ""


def test_nothing_but_nan_stops_the_run_on_all_ranks(two_ranks: Results) -> None:
    first, second = (rank["always"]["stopped"] for rank in two_ranks["faults"])
    assert first == second and "2 updates in a row" in first and "teacher targets" in first
    assert len(two_ranks["faults"][0]["always"]["rows"]) == 2


def test_bf16_stays_close_to_fp32(two_ranks: Results) -> None:
    fp32, bf16 = (losses(two_ranks["precision"][0][name]["rows"]) for name in ("fp32", "bf16"))
    assert bf16 == pytest.approx(fp32, rel=0.03)
    assert bf16 != pytest.approx(fp32, rel=1e-5), "it did compute in another precision"


@pytest.mark.parametrize("stage", [0, 2])
def test_bf16_learns_the_same_at_every_stage(two_ranks: Results, stage: int) -> None:
    """At stage 0 DeepSpeed makes a step with gradients of zero before the first update."""
    result = two_ranks["precision"][0]
    ours, stage_3 = (losses(result[name]["rows"]) for name in (f"bf16, stage {stage}", "bf16"))
    assert ours == pytest.approx(stage_3, rel=1e-5)


# ---------------------------------------------------------------------------------------- callbacks


@pytest.mark.parametrize(
    "run, fields, steps, evaluations", [("long", EVENT_FIELDS, 6, 3), ("short", SHORT_FIELDS, 4, 2)]
)
def test_events_come_in_transformers_order(
    two_ranks: Results,
    materials: Path,
    tmp_path: Path,
    run: str,
    fields: dict,
    steps: int,
    evaluations: int,
) -> None:
    """The same run by transformers' own Trainer, as far as its events go."""
    pytest.importorskip("accelerate")
    student, events = plain.load(materials / "student"), Events()
    data = (
        [{"input_ids": [5, 6, 7], "labels": [5, 6, 7]}]
        * 6
        * fields.get("gradient_accumulation_steps", 1)
    )
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        per_device_train_batch_size=2,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        save_only_model=True,
        **fields,
    )
    Trainer(
        student, arguments, train_dataset=data, eval_dataset=data[:2], callbacks=[events]
    ).train()
    ours = two_ranks["callbacks"][0]["events"][run]
    theirs = events.seen
    assert (
        theirs.count("on_step_end") == steps
        and theirs.count("on_evaluate") == evaluations
        and "on_save" in theirs
    )
    assert ours == theirs
    assert two_ranks["callbacks"][1]["events"][run] == ours


def test_the_logged_loss_is_the_mean_since_the_last_log(two_ranks: Results) -> None:
    result = two_ranks["callbacks"][0]
    losses = result["losses"]
    assert len(set(losses)) == 4
    assert result["logged"] == pytest.approx(
        [(losses[0] + losses[1]) / 2, (losses[2] + losses[3]) / 2]
    )


def test_early_stopping_stops_all_ranks(two_ranks: Results) -> None:
    for rank in two_ranks["callbacks"]:
        step, planned, best, path = rank["early"]
        assert (step, best) == (2, 1) and planned > 2
        assert Path(path) == two_ranks.directory / "early" / "checkpoint-1"
    assert two_ranks.log.count("should_epoch_stop is ignored") == 1


def test_several_evaluation_sets_are_measured_by_name(two_ranks: Results) -> None:
    result = two_ranks["callbacks"][0]
    first, second = (row for row in result["early rows"] if "eval/few_loss" in row)
    values = {
        f"eval/{name}_{key}"
        for name in ("few", "more")
        for key in metric_names(GKDConfig(eval_on_policy=False))
    }
    assert set(first) == {"step", *values} and (first["step"], second["step"]) == (1, 2)
    single = next(row for row in result["event rows"] if "eval/loss" in row)
    assert set(single) == {"step", *(f"eval/{key}" for key in metric_names(GKDConfig()))}
    assert (first["eval/few_samples"], first["eval/more_samples"]) == (2, 5)
    assert first["eval/few_loss"] != first["eval/more_loss"] == result["best"]

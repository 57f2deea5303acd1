"""A run that goes on with another number of ranks: the same windows, the same draws, losses within
1e-4.

And with the same number at other ZeRO stages: exactly.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from gkd_ds.checkpoint import manifest
from tests.dist.rank_server import Server
from tests.dist.runs import assert_same, copy_of, rows

REORDERING = 1e-4
STEPS, CUT = 6, 2  # ten samples in windows of four: three windows an epoch, the last one short
SEED = 41  # windows 4 and 5 draw both sources


SETTINGS = {
    "max_steps": STEPS,
    "save_strategy": "steps",
    "save_steps": CUT,
    "lmbda": 0.5,
    "seed": SEED,
}


def go_on(
    server: Server,
    settings: dict[str, Any],
    run_dir: Path,
    world: int,
    batch: int,
    accumulation: int,
) -> str:
    layout = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation}
    resume = {"output_dir": str(run_dir), "resume_from_checkpoint": True}
    return server.run(world, {**settings, **layout, **resume}).said()


def assert_same_weights(run_dir: Path, reference: Path) -> None:
    ours, theirs = (load_file(path / "model.safetensors") for path in (run_dir, reference))
    for name, weight in theirs.items():
        torch.testing.assert_close(ours[name], weight, rtol=REORDERING, atol=REORDERING)


def test_a_window_with_both_sources_comes_after_the_cut(whole: Path) -> None:
    sources = [row["source"] for row in rows(whole).values()]
    assert any(source["student"] and source["data"] for source in sources[CUT:])


def test_the_command_that_evaluates_may_stand_in_a_run_s_directory(
    server: Server, settings, whole: Path
) -> None:
    """Even with the student that is there; training there would be refused. It writes nothing."""
    before = {path: path.stat().st_mtime_ns for path in whole.rglob("*")}
    mine = {**settings, "output_dir": str(whole), "model_name_or_path": str(whole)}
    said = server.run(2, mine, module="gkd_ds.evaluate").said(0)
    assert "eval_loss" in said and "eval_on_policy_loss" in said
    assert {path: path.stat().st_mtime_ns for path in whole.rglob("*")} == before


@pytest.mark.parametrize("world, batch, accumulation", [(1, 2, 2), (1, 1, 4), (1, 4, 1), (4, 1, 1)])
def test_from_two_ranks(
    server: Server, settings, whole: Path, tmp_path: Path, world, batch, accumulation
) -> None:
    run_dir = copy_of(whole, tmp_path / "run", CUT)
    said = go_on(server, settings, run_dir, world, batch, accumulation)
    assert f"resharding it for {world}" in said and f"at step {CUT}" in said
    changed = (
        f"differs from the checkpoint: per_device_train_batch_size was 1 and is now {batch}" in said
    )
    assert changed == (batch != 1) and "beta was" not in said
    assert_same(run_dir, whole, REORDERING)
    assert_same_weights(run_dir, whole)


def test_from_one_rank_to_two_and_four(
    server: Server, settings, whole: Path, tmp_path: Path
) -> None:
    """Three layouts in one run, whose draws stay those of the first."""
    run_dir = tmp_path / "run"
    one = {"per_device_train_batch_size": 2, "output_dir": str(run_dir)}
    first = server.start(1, {**settings, **one}, fault=f"term:update:{CUT}")
    assert first.wait() == [75], first.said()
    resume = {**settings, "output_dir": str(run_dir), "resume_from_checkpoint": "auto"}
    second = server.start(2, resume, fault="term:update:2:1")
    assert second.wait() == [75, 75], second.said()
    go_on(server, settings, run_dir, world=4, batch=1, accumulation=1)
    assert_same(run_dir, whole, REORDERING)
    assert_same_weights(run_dir, whole)


def test_many_groups_and_an_optimizer_in_host_memory(
    server: Server, settings, whole: Path, tmp_path: Path
) -> None:
    """Groups of at most so many elements per rank: one rank makes other groups of the parameters
    than two did.
    """
    zero = {"stage": 3, "sub_group_size": 3000, "offload_optimizer": {"device": "cpu"}}
    mine = {**settings, "deepspeed": {"zero_optimization": zero}}
    run_dir = tmp_path / "run"
    first = server.start(2, {**mine, "output_dir": str(run_dir)}, fault=f"term:update:{CUT}")
    assert first.wait() == [75, 75], first.said()
    file = run_dir / f"checkpoint-{CUT}" / "engine" / "zero_pp_rank_0_mp_rank_00_optim_states.pt"
    shards = torch.load(file, weights_only=False)
    assert len(shards["optimizer_state_dict"]["fp32_flat_groups"]) > 2
    go_on(server, mine, run_dir, world=1, batch=2, accumulation=2)
    assert_same(run_dir, whole, REORDERING)
    assert_same_weights(run_dir, whole)


@pytest.mark.parametrize("stage, bf16", [(0, False), (1, False), (2, True)])
def test_the_same_ranks_below_stage_3(
    server: Server, settings, tmp_path: Path, stage: int, bf16: bool
) -> None:
    """Bit for bit, as at stage 3 (test_faults_cuts.py); more kinds of engines in
    test_checkpoint_dist.py.
    """
    mine = {
        **settings,
        "deepspeed": {"zero_optimization": {"stage": stage}},
        "bf16": bf16,
        "max_steps": CUT + 2,
    }
    whole = tmp_path / "whole"
    server.run(2, {**mine, "output_dir": str(whole)})
    run_dir = copy_of(whole, tmp_path / "run", CUT)
    go_on(server, mine, run_dir, world=2, batch=1, accumulation=2)
    assert_same(run_dir, whole)
    assert (run_dir / "model.safetensors").read_bytes() == (
        whole / "model.safetensors"
    ).read_bytes()


def test_another_global_batch_is_refused(
    server: Server, settings, whole: Path, tmp_path: Path
) -> None:
    run_dir = copy_of(whole, tmp_path / "run", CUT)
    job = server.start(1, {**settings, "output_dir": str(run_dir), "resume_from_checkpoint": True})
    assert job.wait() == [2]
    assert "window_samples was 4 and is now 2" in job.said() and "Traceback" not in job.said()


def test_a_checkpoint_with_the_state_of_something_else_is_refused(
    server: Server, settings, whole: Path, tmp_path: Path
):
    """Its digest is right, and tells no more than that nothing has changed since somebody wrote it."""
    run_dir = copy_of(whole, tmp_path / "run", CUT)
    path = run_dir / f"checkpoint-{CUT}" / manifest.MANIFEST
    body = json.loads(path.read_text())
    del body["digest"], body["state"]["schedule"]["draw_samples"]
    path.write_text(manifest.render(body))
    job = server.start(2, {**settings, "output_dir": str(run_dir), "resume_from_checkpoint": True})
    assert job.wait() == [2, 2]
    assert (
        "manifest.json lacks 'state.schedule.draw_samples'" in job.said()
        and "Traceback" not in job.said()
    )


def test_another_student_is_refused(
    server: Server, settings, recipe, whole: Path, tmp_path: Path
) -> None:
    run_dir = copy_of(whole, tmp_path / "run", CUT)
    deeper = {
        "model_name_or_path": recipe["teacher_model_name_or_path"],
        "gradient_accumulation_steps": 4,
    }
    job = server.start(
        1, {**settings, **deeper, "output_dir": str(run_dir), "resume_from_checkpoint": True}
    )
    assert job.wait() == [2]
    assert (
        "holds another student" in job.said()
        and "layers.1" in job.said()
        and "Traceback" not in job.said()
    )


@pytest.mark.parametrize("world, accumulation", [(2, 2), (1, 4)])
def test_a_checkpoint_of_the_model_alone_is_refused(
    server: Server, settings, tmp_path: Path, world: int, accumulation: int
) -> None:
    mine = {
        **settings,
        "output_dir": str(tmp_path / "run"),
        "save_only_model": True,
        "max_steps": CUT,
    }
    server.run(2, mine)
    resume = {
        "resume_from_checkpoint": True,
        "gradient_accumulation_steps": accumulation,
        "max_steps": STEPS,
    }
    job = server.start(world, {**mine, **resume})
    assert job.wait() == [2] * world, job.said()
    assert "state of" in job.said() and "Traceback" not in job.said()

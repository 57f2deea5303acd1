"""Runs that are killed or stopped, wherever they are, and go on: all losses and weights as if
nothing had happened.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from gkd_ds.checkpoint import manifest
from tests.dist.rank_server import Job, Server
from tests.dist.runs import assert_same, rows

KILLED, STOPPED = -9, 75


# Every kind of phase, a checkpoint after every update.
SETTINGS = {
    "max_steps": 12,
    "save_strategy": "steps",
    "save_steps": 1,
    "save_total_limit": 2,
    "eval_strategy": "steps",
    "eval_steps": 2,
    "seq_kd": True,
    "resume_from_checkpoint": "auto",
}


def cut(server: Server, settings: dict[str, Any], point: str, occurrence: int, rank: int) -> Job:
    """Start or go on, kill one rank; the other must notice and end by itself, not successfully."""
    job = server.start(2, settings, fault=f"kill:{point}:{occurrence}:{rank}")
    codes = job.wait()
    assert codes[rank] == KILLED, f"{codes}\n{job.said()}"
    assert codes[1 - rank] not in (0, None), f"{codes}\n{job.said()}"
    return job


def finish_and_compare(server: Server, settings: dict[str, Any], whole: Path) -> None:
    server.run(2, settings)
    run_dir = settings["output_dir"]
    assert_same(run_dir, whole)
    ours, theirs = rows(run_dir, "eval/loss"), rows(whole, "eval/loss")
    assert list(ours) == list(theirs)
    for step, row in theirs.items():
        for name in ("eval/loss", "eval/on_policy_loss", "eval/on_policy_entropy"):
            assert ours[step][name] == row[name], (step, name)
    for name in ("model.safetensors",):
        assert Path(run_dir, name).read_bytes() == (whole / name).read_bytes()


# Three cuts in a row each. A process that resumes counts from one again; a window has one of each
# phase, an evaluation two rollouts, two scores and two of itself.
CHAINS = [
    [("rollout", 3, 0), ("score", 2, 1), ("learn", 4, 0)],
    [("update", 2, 1), ("evaluation", 2, 0), ("mid-rollout", 3, 1)],
    [("mid-score", 5, 0), ("mid-learn", 5, 1), ("mid-evaluation", 1, 1)],
]


@pytest.mark.parametrize(
    "chain", CHAINS, ids=lambda chain: "-".join(point for point, _, _ in chain)
)
def test_killed_in_every_phase(
    server: Server, settings, whole: Path, tmp_path: Path, chain
) -> None:
    mine = {**settings, "output_dir": str(tmp_path / "run")}
    for point, occurrence, rank in chain:
        cut(server, mine, point, occurrence, rank)
    finish_and_compare(server, mine, whole)


# Asked to stop in one phase; the next one would last for ever. What is abandoned is done again by
# the next process, an evaluation too: a window's update and the evaluation after it; that
# evaluation's first measurement and second rollout.
STOPS = [
    ("term:rollout:1:1,sleep:score:1", 0),
    ("term:score:2:0,sleep:learn:2", 1),
    ("term:update:1:1,sleep:rollout:2", 2),
    ("term:evaluation:1:0,sleep:rollout:2", 2),
]


def test_a_stop_is_obeyed_before_the_next_phase(
    server: Server, settings, whole: Path, tmp_path: Path
) -> None:
    mine = {**settings, "output_dir": str(tmp_path / "run")}
    for fault, step in STOPS:
        job = server.start(2, mine, fault=fault)
        assert job.wait() == [STOPPED, STOPPED], f"{fault}\n{job.said()}"
        assert (
            f"stopped after update {step}: SIGTERM" in job.said() and "sleep at" not in job.said()
        )
    finish_and_compare(server, mine, whole)


def test_an_evaluation_at_the_end_of_an_epoch_is_never_lost(
    server: Server, settings, whole: Path, tmp_path: Path
):
    """Killed in it, when the checkpoint of its step is written already; then after it, before the
    next checkpoint.
    """
    mine = {
        **settings,
        "output_dir": str(tmp_path / "run"),
        "eval_strategy": "epoch",
        "num_train_epochs": 4,
    }
    cut(server, mine, "evaluation", 1, 0)
    assert Path(tmp_path / "run" / "checkpoint-3").is_dir() and not rows(
        tmp_path / "run", "eval/loss"
    )
    cut(server, mine, "rollout", 3, 1)
    assert list(rows(tmp_path / "run", "eval/loss")) == [3]
    server.run(2, mine)
    assert_same(tmp_path / "run", whole)
    ours, theirs = rows(tmp_path / "run", "eval/loss"), rows(whole, "eval/loss")
    assert list(ours) == [3, 6, 9, 12]
    for step in (6, 12):
        assert ours[step]["eval/on_policy_loss"] == theirs[step]["eval/on_policy_loss"]


@pytest.mark.parametrize("rank, first", [(0, "save.begin"), (1, "save.write")])
def test_killed_at_every_write_step_of_a_save(
    server: Server, settings, whole: Path, tmp_path: Path, rank: int, first: str
) -> None:
    """One process after the other, each killed one step later in its first save, until a save has
    no more steps.
    """
    mine = {**settings, "output_dir": str(tmp_path / "run")}
    killed_at: list[str] = []
    while killed_at.count(first) < 2:
        job = cut(server, mine, "save", len(killed_at) + 1, rank)
        killed_at += re.findall(r"GKD_FAULT: kill at (\S+)", job.said(rank))
    expected = {"save.write", "save.file", "save.hash"}
    if rank == 0:
        expected |= {
            f"save.{step}"
            for step in ("begin", "manifest", "latest_text", "rename", "latest", "done")
        }
    assert set(killed_at) == expected
    finish_and_compare(server, mine, whole)
    saved = manifest.verify(tmp_path / "run" / "checkpoint-12").files
    beside = [name for name in saved if not name.startswith("engine/")]  # rank 0's: a whole model
    assert killed_at.count("save.file") == 2, "model and optimizer states"
    assert killed_at.count("save.hash") == 2 + (len(beside) if rank == 0 else 0)
    assert {"model.safetensors", "tokenizer.json", "trainer_state.json"} <= set(beside)

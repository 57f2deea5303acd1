"""Rollouts that go on from the last epoch's: the same run as without, on any number of ranks, and
when it goes on from the middle of an epoch.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.dist.rank_server import Server
from tests.dist.runs import assert_same, copy_of, rows

REORDERING = 1e-4
STEPS, WINDOWS, CUT = 8, 3, 4  # windows of an epoch; the cut is inside of the second
SETTINGS = {
    "max_steps": STEPS,
    "save_strategy": "steps",
    "save_steps": CUT,
    "lmbda": 1.0,
    "temperature": 1.0,
    "learning_rate": 1e-4,
    "max_new_tokens": 16,
    "log_rollouts": 10,
    "rollout_speculation": "previous_epoch",
    "speculation_share": 0.8,
}


def written(run_dir: Path) -> dict[tuple[int, str], tuple[int, str]]:
    """What rank 0 completed with what, by window and prompt."""
    lines = map(json.loads, (run_dir / "rollouts.jsonl").read_text().splitlines())
    return {(r["step"], r["prompt"]): (r["sample_id"], r["completion"]) for r in lines}


def saved(run_dir: Path) -> list[int]:
    """Tokens that were not decoded, window by window."""
    return [row["perf/tokens_saved"] for row in rows(run_dir).values()]


def test_every_window_is_what_decoding_alone_makes_it(
    server: Server, settings, whole: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    mine = {**settings, "output_dir": str(run_dir)}
    server.run(2, mine, module="tests.dist.without_drafts")
    assert_same(run_dir, whole)
    assert written(run_dir) == written(whole)
    assert saved(run_dir) == [0] * STEPS
    assert saved(whole)[:WINDOWS] == [0] * WINDOWS and sum(saved(whole)) > 50
    for row in rows(whole).values():
        assert row["perf/student_gathers"] == 1
        assert (0 < row["perf/accepted_share"] <= 1) == (row["perf/tokens_saved"] > 0)
    ids = [sample_id for sample_id, _ in written(whole).values()]
    assert any(id < 10 for id in ids[10:]) and any(id >= 10 for id in ids), "a share has its own"


@pytest.mark.parametrize("world, accumulation", [(2, 2), (1, 4)])
def test_a_run_goes_on_with_the_drafts_of_its_checkpoint(
    server: Server, settings, whole: Path, tmp_path: Path, world: int, accumulation: int
) -> None:
    run_dir = copy_of(whole, tmp_path / "run", CUT)
    layout = {"gradient_accumulation_steps": accumulation, "resume_from_checkpoint": True}
    server.run(world, {**settings, **layout, "output_dir": str(run_dir)})
    assert_same(run_dir, whole, 0.0 if world == 2 else REORDERING)
    assert saved(run_dir) == saved(whole)
    ours = written(run_dir)
    later = {key: value for key, value in written(whole).items() if key[0] > CUT}
    assert later and {key: ours[key] for key in later} == later

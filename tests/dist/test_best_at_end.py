"""A run that is to end with its best checkpoint: whatever is wrong with that, it ends with a student."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.dist.rank_server import Server
from tests.dist.runs import rows

NOT_SAVED, STOPPED = 74, 75
# The larger the better: the best of a run that learns is its first evaluation.
SETTINGS = {
    "max_steps": 4,
    "lmbda": 0.0,
    "learning_rate": 1e-3,
    "save_strategy": "steps",
    "save_steps": 1,
    "eval_strategy": "steps",
    "eval_steps": 1,
    "eval_on_policy": False,
    "load_best_model_at_end": True,
    "greater_is_better": True,
    "gradient_accumulation_steps": 1,
}


def weights(run_dir: Path) -> dict[str, torch.Tensor]:
    return load_file(run_dir / "model.safetensors")


def equal(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(ours[name], weight) for name, weight in theirs.items())


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_it_ends_with_the_best(server: Server, settings, tmp_path: Path, stage: int) -> None:
    mine = {**settings, "deepspeed": {"zero_optimization": {"stage": stage}}}
    mine["output_dir"] = str(tmp_path / "run")
    said = server.run(2, mine).said()
    losses = {step: row["eval/loss"] for step, row in rows(tmp_path / "run", "eval/loss").items()}
    assert max(losses, key=losses.get) == 1 and len(set(losses.values())) == 4
    assert "checkpoint-1, the best that was saved" in said
    last = {**mine, "load_best_model_at_end": False, "output_dir": str(tmp_path / "last")}
    last |= {"save_only_model": True}
    server.run(2, last)
    best = weights(tmp_path / "last" / "checkpoint-1")
    assert equal(weights(tmp_path / "run"), best)
    assert not equal(weights(tmp_path / "last"), best)
    assert "| updates | 1 |" in (tmp_path / "run" / "README.md").read_text()


def test_a_damaged_best_checkpoint_leaves_the_last_student(
    server: Server, settings, tmp_path: Path
) -> None:
    """Damaged while the run goes on: known at the end alone. The student is there, and is not called
    the best.
    """
    run_dir = tmp_path / "run"
    mine = {**settings, "output_dir": str(run_dir), "resume_from_checkpoint": "auto"}
    stopped = server.start(2, mine, fault="term:update:3")
    assert stopped.wait() == [STOPPED, STOPPED], stopped.said()
    damaged = min((run_dir / "checkpoint-1" / "engine").glob("*optim_states.pt"))
    content = bytearray(damaged.read_bytes())
    content[-5] ^= 1
    damaged.write_bytes(content)
    job = server.start(2, mine)
    assert job.wait() == [NOT_SAVED, NOT_SAVED], job.said()
    said = job.said()
    assert "the best checkpoint was not loaded" in said and damaged.name in said
    assert f"the student in {run_dir} is the one of the last update, 4" in said
    assert "Traceback" not in said and not (run_dir / "FINISHED").exists()
    whole = {**settings, "load_best_model_at_end": False, "output_dir": str(tmp_path / "whole")}
    server.run(2, whole)
    assert equal(weights(run_dir), weights(tmp_path / "whole"))


def test_a_best_evaluation_without_a_checkpoint(server: Server, settings, tmp_path: Path) -> None:
    """Evaluations come twice as often as checkpoints: the best of those that have one counts, and is
    not pruned.
    """
    mine = {**settings, "save_steps": 2, "save_total_limit": 1, "output_dir": str(tmp_path / "run")}
    said = server.run(2, mine).said()
    assert "checkpoint-2, the best that was saved" in said
    assert {path.name for path in (tmp_path / "run").glob("checkpoint-*")} == {
        "checkpoint-2",
        "checkpoint-4",
    }


def test_no_evaluation_at_all(server: Server, settings, tmp_path: Path) -> None:
    mine = {**settings, "eval_delay": 10, "output_dir": str(tmp_path / "run")}
    said = server.run(1, mine).said()
    assert "no evaluation has a checkpoint" in said and (tmp_path / "run" / "FINISHED").exists()


def test_another_metric_chooses_anew(server: Server, settings, tmp_path: Path) -> None:
    """The last of four is the best; then, with one update more, the first of five."""
    mine = {**settings, "output_dir": str(tmp_path / "run"), "resume_from_checkpoint": "auto"}
    said = server.run(1, {**mine, "greater_is_better": False}).said()
    assert "the best that was saved" not in said, "it is the student at hand"
    said = server.run(1, {**mine, "max_steps": 5}).said()
    assert "greater_is_better was False and is now True" in said
    assert "checkpoint-1, the best that was saved" in said

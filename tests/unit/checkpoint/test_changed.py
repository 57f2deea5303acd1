"""Every field that acts has its place in what a resume does about changes, and keeps to it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gkd_ds.checkpoint.changed import changes, settings
from gkd_ds.config.changes import CHANGES, TABLE, Change
from gkd_ds.config.config import GKDConfig
from gkd_ds.config.fields import GROUPS

ACTING = {option.name for options in GROUPS.values() for option in options}


@pytest.fixture
def now(tmp_path: Path) -> dict:
    return settings(GKDConfig(output_dir=str(tmp_path)))


def test_every_field_that_acts_is_placed_once() -> None:
    assert CHANGES.keys() == ACTING
    assert sum(len(names.split()) for names in TABLE.values()) == len(ACTING)
    assert set(TABLE) == set(Change)


@pytest.mark.parametrize("name", sorted(ACTING - {"hub_token"}))  # which is in no checkpoint
def test_a_change_is_named_unless_no_window_is_another_for_it(now: dict, name: str) -> None:
    sentences = list(changes({**now, name: "before"}, now))
    if CHANGES[name] is Change.QUIET:
        assert sentences == []
    else:
        (sentence,) = sentences
        assert sentence.startswith(f"differs from the checkpoint: {name} was before and is now ")
    assert list(changes(now, now)) == []
    assert list(changes({k: v for k, v in now.items() if k != name}, now)) == []


@pytest.mark.parametrize(
    "name, passed, effect",
    [
        ("eval_on_start", (), "which changes nothing: it acts before the first update"),
        ("model_name_or_path", (), "; the weights are the checkpoint's"),
        ("learning_rate", ("optimizer",), "changes nothing: the optimizer is one that was passed"),
        ("warmup_steps", ("optimizer", "schedule"), "changes nothing: the schedule is one that"),
        ("warmup_steps", ("optimizer",), None),
        ("learning_rate", (), None),
        ("beta", (), None),
    ],
)
def test_what_a_change_does_not_do_is_said(now: dict, name: str, passed: tuple, effect) -> None:
    (sentence,) = changes({**now, name: "before"}, now, passed)
    _, _, rest = sentence.partition(f" is now {now[name]}")
    assert (effect in rest) if effect else rest == ""


def test_what_was_measured_otherwise_is_said_where_evaluations_are_compared(tmp_path: Path) -> None:
    best = {"eval_strategy": "steps", "load_best_model_at_end": True, "save_steps": 10}
    now = settings(GKDConfig(output_dir=str(tmp_path), **best))
    (sentence,) = changes({**now, "beta": 0.9}, now)
    assert "evaluations before and after it are compared as if they were of one kind" in sentence


@pytest.mark.parametrize("field", ["deepspeed", "teacher_deepspeed"])
def test_what_a_deepspeed_file_holds_counts_and_not_its_name(tmp_path: Path, field: str) -> None:
    file, zero = tmp_path / "zero.json", {"stage": 3, "reduce_bucket_size": 1000}
    file.write_text(json.dumps({"zero_optimization": zero}))
    config = GKDConfig(output_dir=str(tmp_path), **{field: str(file)})
    before = settings(config)
    file.rename(tmp_path / "moved.json")
    moved = GKDConfig(output_dir=str(tmp_path), **{field: str(tmp_path / "moved.json")})
    assert list(changes(before, settings(moved))) == []
    (tmp_path / "moved.json").write_text(
        json.dumps({"zero_optimization": {**zero, "reduce_bucket_size": 2000}})
    )
    assert list(changes(before, settings(moved))) == [
        f"differs from the checkpoint: {field}.zero_optimization.reduce_bucket_size was 1000 and is "
        "now 2000"
    ]

"""What a run remembers goes into a checkpoint and comes back; a state of another kind is refused in
one sentence.
"""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainerState

from gkd_ds.checkpoint.manifest import Manifest
from gkd_ds.checkpoint.progress import (
    STATE,
    TRAINER_STATE,
    Mean,
    Progress,
    check_state,
    differences,
    initial_state,
)
from gkd_ds.config.config import GKDConfig
from gkd_ds.monitor.guards import BadUpdates, RateLimit, WindowStats
from gkd_ds.runtime.errors import InputError
from gkd_ds.runtime.provenance import library_versions

PROGRESS = Progress(
    bad_updates=BadUpdates(limit=5, total=3, in_a_row=1, kinds=["loss"]),
    epoch_ended_at=3,
    evaluation_due=True,
    evaluations=1,
    train_loss=Mean(1.5, 3),
    unlogged_loss=Mean(0.25, 1),
    last_update={"grad_norm": 0.5, "learning_rate": 1e-4, "epoch": 1.5},
    history=[WindowStats(1, 20.0, 0.5, 0.25, None), WindowStats(2, 20.0, 0.5, 0.25, 2.0)],
    told=RateLimit(last={"loops": 2}),
)


def found(config: GKDConfig, **changes: Any) -> Manifest:
    """A manifest as it is read back."""
    state = {
        "trainer_state": dataclasses.asdict(
            TrainerState(global_step=4, log_history=[{"loss": 1.0}])
        ),
        "progress": dataclasses.asdict(PROGRESS),
        "tracker_run_id": "abc",
        "config": {**config.to_dict(), **changes},
        "adapter": None,
        "schedule": {
            **{
                name: 4
                for name in ("num_samples", "window_samples", "seed", "data_seed", "draw_samples")
            },
            "drop_last": False,
            "training data": "fingerprint",
        },
    }
    return Manifest(
        Path("run/checkpoint-4"),
        4,
        1,
        1,
        {},
        json.loads(json.dumps(state)),
        library_versions(),
    )


@pytest.fixture
def config(tmp_path: Path) -> GKDConfig:
    return GKDConfig(output_dir=str(tmp_path), max_bad_updates=7)


def test_it_comes_back(config: GKDConfig) -> None:
    manifest = found(config)
    check_state(manifest)
    back = Progress.of(manifest.state["progress"], config)
    assert back == dataclasses.replace(PROGRESS, bad_updates=BadUpdates(7, 3, 1, ["loss"]))


def places(shape: Any, path: tuple = ()) -> Iterator[tuple]:
    """Where something with a name stands in a state."""
    if isinstance(shape, dict):
        for name, inner in shape.items():
            yield (*path, name)
            yield from places(inner, (*path, name))
    elif isinstance(shape, list):
        yield from places(shape[0], (*path, 0))


@pytest.mark.parametrize("damage", ["missing", "wrong"])
@pytest.mark.parametrize(
    "place",
    [*places(STATE), *places(TRAINER_STATE, ("trainer_state",))],
    ids=lambda place: ".".join(map(str, place)),
)
def test_a_state_of_another_kind_is_refused_by_name(
    config: GKDConfig, place: tuple, damage: str
) -> None:
    manifest = copy.deepcopy(found(config))
    part = manifest.state
    for name in place[:-1]:
        part = part[name]
    if damage == "missing":
        del part[place[-1]]
    else:
        may_be_dict = isinstance(part[place[-1]], dict) or place == ("adapter",)
        part[place[-1]] = "of another kind" if may_be_dict else {"of": "another kind"}
    with pytest.raises(InputError) as caught:
        check_state(manifest)
    sentence = str(caught.value)
    assert (
        sentence.startswith("cannot resume from run/checkpoint-4: ") and f"{place[-1]}" in sentence
    )
    assert "\n" not in sentence


def test_differences_that_matter_are_said(
    config: GKDConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert differences(found(config), config) == []
    unimportant = {
        "logging_steps": 3.0,
        "output_dir": "elsewhere",
        "save_total_limit": 9,
        "local_rank": 5,
    }
    assert differences(found(config, **unimportant), config) == []
    assert differences(found(config, beta=0.7, lr_scheduler_type="cosine"), config) == [
        "differs from the checkpoint: beta was 0.7 and is now 0.5",
        "differs from the checkpoint: lr_scheduler_type was cosine and is now linear",
    ]
    (tmp_path / "torch-0.1.dist-info").mkdir()  # another version, as far as Python can tell
    (tmp_path / "torch-0.1.dist-info" / "METADATA").write_text("Name: torch\nVersion: 0.1\n")
    before = found(config)
    monkeypatch.syspath_prepend(str(tmp_path))
    (sentence,) = differences(before, config)
    assert (
        sentence
        == f"differs from the checkpoint: torch was {before.versions['torch']} and is now 0.1"
    )


@pytest.mark.parametrize(
    ("settings", "epochs", "updates"),
    [
        ({"num_train_epochs": 1.5}, 2, 5),
        ({"max_steps": 3, "num_train_epochs": 9}, 1, 3),
        ({"max_steps": 7}, 3, 7),
    ],
)
def test_the_state_says_how_many_epochs_there_will_be(
    settings: dict[str, Any], epochs: int, updates: int
) -> None:
    """As transformers says it, where max_steps decides."""
    state = initial_state(GKDConfig(**settings), windows_per_epoch=3)
    assert (state.num_train_epochs, state.max_steps) == (epochs, updates)

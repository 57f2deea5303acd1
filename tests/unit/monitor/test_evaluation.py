"""Which evaluation is the best."""

from __future__ import annotations

from pathlib import Path

import pytest

from gkd_ds.config.config import GKDConfig
from gkd_ds.monitor.evaluation import best_evaluation

NAN = float("nan")
HISTORY = [
    {"loss": 9.0, "step": 1},
    {"eval_loss": NAN, "eval_on_policy_loss": 0.3, "step": 1},
    {"eval_loss": 0.5, "eval_on_policy_loss": NAN, "step": 2},
    {"eval_loss": 0.4, "eval_on_policy_loss": 0.2, "step": 3},
    {"eval_loss": 0.4, "eval_on_policy_loss": 0.1, "step": 4},
    {"train_loss": 0.1, "step": 4},
]


@pytest.mark.parametrize(
    "metric, greater, steps, best",
    [
        ("loss", False, {1, 2, 3, 4}, (3, 0.4)),
        ("eval_loss", True, {1, 2, 3, 4}, (2, 0.5)),
        ("on_policy_loss", False, {1, 2, 3, 4}, (4, 0.1)),
        ("loss", False, {2, 4}, (4, 0.4)),
        ("loss", False, {1}, None),
        ("on_policy_loss", True, {2, 4}, (4, 0.1)),
        ("loss", False, set(), None),
        (None, None, {1, 2, 3, 4}, None),
    ],
)
def test_the_best_of_those_that_count(tmp_path: Path, metric, greater, steps, best) -> None:
    config = GKDConfig(
        output_dir=str(tmp_path), metric_for_best_model=metric, greater_is_better=greater
    )
    assert best_evaluation(config, HISTORY, steps.__contains__) == best

"""padding_free on real ranks: the same updates, without a padded token."""

from __future__ import annotations

import pytest

from tests.dist import runs

SETTINGS = {"max_steps": 3, "lmbda": 0.5, "per_device_train_batch_size": 2, "do_eval": True,
            "eval_strategy": "steps", "eval_steps": 3}  # fmt: skip


@pytest.mark.parametrize("field", ["padding_free", "packing"])
def test_a_run_without_padding_is_the_padded_run(server, whole, settings, tmp_path, field):
    run_dir = tmp_path / "run"
    server.run(2, {**settings, field: True, "output_dir": str(run_dir)})
    runs.assert_same(run_dir, whole, tolerance=1e-6)
    padded, packed = (runs.rows(directory) for directory in (whole, run_dir))
    tokens = [
        (padded[step]["perf/padded_tokens"], packed[step]["perf/padded_tokens"]) for step in padded
    ]
    assert all(before >= after for before, after in tokens)
    assert any(before > after for before, after in tokens)
    evaluated = [runs.rows(directory, "eval/loss")[3] for directory in (whole, run_dir)]
    assert evaluated[0]["eval/loss"] == pytest.approx(evaluated[1]["eval/loss"], rel=1e-6)

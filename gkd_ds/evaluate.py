"""Measures a student directory against the teacher of a recipe, on the recipe's test split. Writes
nothing.

    python -m gkd_ds.evaluate --config recipe.yaml --model_name_or_path runs/quickstart

What the numbers mean: monitor/evaluation.py.
"""

from __future__ import annotations

import sys

from gkd_ds.config.config import GKDConfig
from gkd_ds.runtime import ranks
from gkd_ds.train import build, check_inputs, command, leave


def main(argv: list[str] | None = None) -> int:
    """The exit code; the metrics go to stdout."""

    def work(config: GKDConfig) -> int:
        metrics = build(config).evaluate()
        if ranks.rank() == 0:
            print("\n".join(f"{name:28} {value:.6g}" for name, value in metrics.items()))
        return 0

    return command(
        [*(sys.argv[1:] if argv is None else argv), "--eval_strategy", "epoch"], work, check_inputs
    )


if __name__ == "__main__":
    leave(main())

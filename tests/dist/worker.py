"""Scenarios that need the engines, all in one launch because starting ranks costs more than running
them.

    PYTHONPATH=. deepspeed --num_accelerators 2 --module tests.dist.worker MATERIALS RESULTS [SCENARIO ...]
    PYTHONPATH=. python -m tests.dist.worker MATERIALS RESULTS seed_example rollouts

MATERIALS is what `tests.dist.materials` made. Every rank writes RESULTS/<scenario>.<rank>.json:
what the scenario returned, or the traceback of what it raised. The tests beside this file compare
those with plain torch.
"""

# ruff: noqa: E402
from __future__ import annotations

import json
import sys
import time
import traceback

# Before anything else is imported: gkd_ds must run where none of these is installed (peft needs
# accelerate).
ABSENT = ("trl", "accelerate", "peft")
sys.modules.update(dict.fromkeys(ABSENT))

from gkd_ds import GKDConfig
from gkd_ds.engine import process
from gkd_ds.runtime import ranks
from gkd_ds.train import leave
from tests.dist.scenarios import (
    bad_updates,
    engines,
    fields,
    neighbours,
    nvme,
    parity,
    surface,
    windows,
)
from tests.dist.scenarios.common import ARGUMENTS, FIELDS, RESULTS


def blocked_imports() -> dict:
    """Runs last: what was imported in spite of the block above."""
    return {
        "imported": [
            name for name, module in sys.modules.items() if module and name.split(".")[0] in ABSENT
        ]
    }


SCENARIOS = [
    parity.seed_example,
    parity.update,
    parity.rollouts,
    parity.hybrid_engine,
    parity.families,
    parity.unusual_families,
    engines.counts,
    engines.teacher_places,
    engines.scale_features,
    nvme.teacher_on_nvme,
    nvme.optimizer_on_nvme,
    parity.evaluation,
    surface.own_metrics,
    surface.overrides,
    surface.models_in_engines,
    surface.changes,
    fields.optimizers,
    fields.measures,
    fields.callback_states,
    fields.compiled,
    fields.first_rank_first,
    windows.sources,
    windows.resume,
    windows.generation_that_raises,
    engines.precision,
    neighbours.neighbours,
    windows.callbacks,
    bad_updates.faults,
    blocked_imports,
]


def main(wanted: list[str]) -> None:
    process.start(GKDConfig(output_dir=str(RESULTS / "unused"), ddp_timeout=FIELDS["ddp_timeout"]))
    for scenario in SCENARIOS:
        if wanted and scenario.__name__ not in wanted:
            continue
        started = time.monotonic()
        try:
            outcome = {"result": scenario()}
        except Exception:
            traceback.print_exc()
            outcome = {"error": traceback.format_exc()}
        seconds = time.monotonic() - started
        path = RESULTS / f"{scenario.__name__}.{ranks.rank()}.json"
        path.write_text(json.dumps({**outcome, "seconds": seconds}))
        print(f"=== rank {ranks.rank()}: {scenario.__name__} {seconds:.1f} s", flush=True)


if __name__ == "__main__":
    main(ARGUMENTS[2:])
    leave(0)

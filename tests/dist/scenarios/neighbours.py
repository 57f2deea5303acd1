"""Rows whose batch changes them, and noise that only training mode has: right, or refused at the
start.
"""

from __future__ import annotations

from gkd_ds.runtime.errors import InputError
from tests.dist.scenarios.common import build, train

REFUSED = {
    "written across the switch": {"student": "longrope-s", "lmbda": 1.0},
    "written by the teacher": {"teacher": "longrope-t", "lmbda": 0.0, "seq_kd": True},
    "dynamic student": {"student": "dynamic", "lmbda": 0.0},
    "dynamic teacher": {"teacher": "dynamic", "lmbda": 0.0},
    "jitter in training mode": {"student": "jitter", "lmbda": 0.0, "disable_dropout": False},
}


def neighbours() -> dict:
    """One window of the data's rows, which are of 20 to 90 tokens; and what each of REFUSED says.

    longrope's tables switch behind 40 tokens, and so do dynamic's.
    """
    fields = {"lmbda": 0.0, "per_device_train_batch_size": 8, "eval_on_policy": False}
    results = {
        name: train(f"rows-{name}", student=name, teacher="longrope-t", **fields)
        for name in ("longrope-s", "jitter")
    }
    results["refused"] = {}
    for name, case in REFUSED.items():
        try:
            trainer = build(f"rows-{name.replace(' ', '-')}", **{**fields, **case})
            assert trainer.pipeline is not None  # built, and tried out, when it is asked for
        except InputError as error:
            results["refused"][name] = str(error)
    return results

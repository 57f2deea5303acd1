"""transformers' reporting integrations, as the configuration asks for them."""

from __future__ import annotations

from transformers import TrainerCallback
from transformers.integrations import (
    get_reporting_integration_callbacks,
    is_tensorboard_available,
)

from gkd_ds.config.config import GKDConfig
from gkd_ds.monitor.tracker import SINKS, reported_to
from gkd_ds.runtime.errors import InputError, first_line


def callbacks_of(config: GKDConfig) -> list[TrainerCallback]:
    """The callbacks of a run with this configuration. Raises InputError where a package is
    missing.
    """
    names = reported_to(config)
    if "tensorboard" in names and not is_tensorboard_available():
        raise _missing("tensorboard", "it needs the package tensorboard")
    callbacks: list[TrainerCallback] = []
    for name in names:
        if name in SINKS:
            continue
        try:
            callbacks += [
                integration() for integration in get_reporting_integration_callbacks([name])
            ]
        except (ImportError, RuntimeError, ValueError) as error:
            raise _missing(name, first_line(error).rstrip(".")) from error
    return callbacks


def may_add_metrics(callbacks: list[TrainerCallback | type[TrainerCallback]]) -> bool:
    """Whether any of them is told of evaluations and is not transformers' own: it may add to the
    metrics, as `evaluate` of a subclass may.
    """
    kinds = [one if isinstance(one, type) else type(one) for one in callbacks]
    return any(not kind.on_evaluate.__module__.startswith("transformers.") for kind in kinds)


def _missing(name: str, reason: str) -> InputError:
    reason = reason.split(". ")[0]
    return InputError(
        f"GKDConfig field 'report_to' names {name}, which cannot be used here ({reason}); install "
        "it, or leave it out."
    )

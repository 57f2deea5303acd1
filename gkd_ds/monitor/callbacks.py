"""Callbacks that the configuration asks for: transformers' reporting integrations, and what happens
every so many updates.
"""

from __future__ import annotations

from typing import Any

from deepspeed.accelerator import get_accelerator
from transformers import TrainerCallback, TrainerState
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
    if config.torch_empty_cache_steps:
        callbacks.append(EmptiesCache(config.torch_empty_cache_steps))
    return callbacks


def _missing(name: str, reason: str) -> InputError:
    reason = reason.split(". ")[0]
    return InputError(
        f"GKDConfig field 'report_to' names {name}, which cannot be used here ({reason}); install "
        "it, or leave it out."
    )


class EmptiesCache(TrainerCallback):
    """Gives unused memory of the accelerator back after every `steps` updates."""

    def __init__(self, steps: int):
        self.steps = steps

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        if state.global_step % self.steps == 0:
            get_accelerator().empty_cache()

"""torch.compile of the student's engine, through DeepSpeed."""

from __future__ import annotations

import torch

from gkd_ds.config.config import GKDConfig
from gkd_ds.runtime.errors import InputError, show


def require_backend(config: GKDConfig) -> None:
    """Raise InputError for a backend that this torch does not have."""
    if config.torch_compile:
        known = torch._dynamo.list_backends(exclude_tags=None)
        if config.torch_compile_backend not in known:
            raise InputError(
                f"GKDConfig field 'torch_compile_backend' is {show(config.torch_compile_backend)}; "
                f"it must be one of {', '.join(known)}."
            )


def compile_engine(engine, config: GKDConfig) -> None:
    """Let torch compile what the engine runs, as it comes to it; the weights' gathers under ZeRO-3
    stay outside.
    """
    if config.torch_compile:
        mode = {"mode": config.torch_compile_mode} if config.torch_compile_mode else {}
        engine.compile(backend=config.torch_compile_backend, compile_kwargs=mode)

"""Where and with what the checks ran."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from typing import Any

import torch

from gkd_ds.engine import accelerator
from tools.preflight import gpus

LIBRARIES = (
    "torch",
    "transformers",
    "deepspeed",
    "datasets",
    "trl",
    "flash_attn",
    "huggingface_hub",
)


def machine() -> dict[str, Any]:
    return {
        "accelerator": accelerator.device().type,
        "cards": gpus(),
        "cpus": os.cpu_count(),
        "python": platform.python_version(),
        "cuda": torch.version.cuda,
        "versions": {name: _version(name) for name in LIBRARIES},
    }


def is_cpu() -> bool:
    return accelerator.on_cpu()


def _version(name: str) -> str | None:
    """None where it is not installed."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None

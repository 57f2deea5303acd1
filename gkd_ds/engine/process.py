"""This process as one of a run's: joining the process group of DeepSpeed, and leaving it."""

from __future__ import annotations

import atexit
import logging
import warnings

import deepspeed
import torch
import transformers

from gkd_ds.config.config import GKDConfig
from gkd_ds.engine import accelerator
from gkd_ds.runtime.errors import InputError
from gkd_ds.runtime.process_group import join


def start(config: GKDConfig) -> None:
    """Set the process up as `config` says, and join the process group. Raises InputError."""
    logging.getLogger("DeepSpeed").setLevel(config.deepspeed_log_level.upper())
    if config.deepspeed_log_level in ("error", "critical"):
        # DeepSpeed calls collectives by names that torch deprecates, and transformers renames its
        # switch for checkpointing: a line per call. A bar per model that is read or written is
        # chatter, too.
        warnings.filterwarnings(
            "ignore", category=FutureWarning, module=r"torch\.distributed|transformers"
        )
        transformers.utils.logging.disable_progress_bar()
    if config.use_cpu and not accelerator.on_cpu():
        raise InputError(
            "use_cpu is set but DeepSpeed has chosen an accelerator; set DS_ACCELERATOR=cpu as "
            "well."
        )
    accelerator.refuse_missing_precision(config)
    if config.tf32 is not None:
        torch.set_float32_matmul_precision("high" if config.tf32 else "highest")
    if config.full_determinism:
        torch.use_deterministic_algorithms(True)
    join(config.ddp_backend, config.ddp_timeout)


def leave_at_exit() -> None:
    """Leave the process group when the program ends, after a run that all ranks have finished
    together.

    A thread of gloo's that still holds Python objects is otherwise taken down by the interpreter,
    now and then with SIGABRT ("terminate called without an active exception").
    """
    atexit.unregister(_leave)
    atexit.register(_leave)


def _leave() -> None:
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def print_communication() -> None:
    """What DeepSpeed's communication logger has seen, on rank 0's stdout, where a DeepSpeed file
    switches it on.

    Nobody else calls its summary. Collective.
    """
    if deepspeed.comm.comms_logger.enabled:
        deepspeed.comm.log_summary()

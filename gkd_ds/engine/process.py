"""This process as one of a run's: joining the process group of DeepSpeed, and leaving it."""

from __future__ import annotations

import atexit
import datetime
import logging
import os
import socket
import warnings

import deepspeed
import torch
import transformers
from deepspeed.accelerator import get_accelerator

from gkd_ds.config.config import GKDConfig
from gkd_ds.engine import accelerator, rendezvous
from gkd_ds.runtime.errors import InputError


def start(config: GKDConfig) -> None:
    """Join the process group: the launcher's, or one of a single process when there is no launcher.
    Raises InputError.

    A CPU run must not spend three minutes building DeepSpeed's shared-memory communication op; gloo
    does without.
    """
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
    if torch.distributed.is_initialized() and deepspeed.comm.is_initialized():
        return
    if "RANK" not in os.environ:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        alone = {
            "RANK": 0,
            "LOCAL_RANK": 0,
            "WORLD_SIZE": 1,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
        }
        os.environ.update({name: str(value) for name, value in alone.items()})
    place = None if torch.distributed.is_initialized() else rendezvous.meet(config.ddp_timeout)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    get_accelerator().set_device(int(os.environ["LOCAL_RANK"]))
    deepspeed.init_distributed(
        dist_backend=config.ddp_backend or get_accelerator().communication_backend_name(),
        timeout=datetime.timedelta(seconds=config.ddp_timeout),
        auto_mpi_discovery=False,
        verbose=False,
    )
    del place


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

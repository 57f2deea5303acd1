"""Joining the process group of the run, by DeepSpeed."""

from __future__ import annotations

import datetime
import os
import socket

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator

from gkd_ds.runtime import rendezvous


def join(backend: str | None, timeout: int) -> None:
    """Join the launcher's process group, or make one of a single process where there is no
    launcher. Does nothing the second time.

    `backend` is torch.distributed's (None: the accelerator's), `timeout` that of a collective, in
    seconds. Raises InputError where the ranks cannot meet.

    A CPU run must not spend three minutes building DeepSpeed's shared-memory communication
    op; gloo does without.
    """
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
            "LOCAL_SIZE": 1,  # on a CPU DeepSpeed would count its nodes again and again
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
        }
        os.environ.update({name: str(value) for name, value in alone.items()})
    place = None if torch.distributed.is_initialized() else rendezvous.meet(timeout)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    get_accelerator().set_device(int(os.environ["LOCAL_RANK"]))
    deepspeed.init_distributed(
        dist_backend=backend or get_accelerator().communication_backend_name(),
        timeout=datetime.timedelta(seconds=timeout),
        auto_mpi_discovery=False,
        verbose=False,
    )
    del place

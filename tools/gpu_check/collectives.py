"""What ZeRO asks of the communication backend, of one rank."""

from __future__ import annotations

import time
from pathlib import Path

import deepspeed.comm as dist
import torch
from deepspeed.accelerator import get_accelerator

from gkd_ds.engine import accelerator
from gkd_ds.runtime.process_group import join
from tools.gpu_check.outcome import Outcome, judge

ENTRIES = 1 << 24  # 64 MiB in fp32


def one_rank(directory: Path) -> Outcome:
    """With one rank every collective gives back what it was given; and an all-reduce, timed."""
    join(None, timeout=40)
    given = torch.randn(ENTRIES, device=accelerator.device())
    wrong = []
    for name, collective in (
        ("all_reduce", lambda: _in_place(dist.all_reduce, given)),
        ("broadcast", lambda: _in_place(lambda tensor: dist.broadcast(tensor, src=0), given)),
        ("all_gather", lambda: _into(dist.all_gather_into_tensor, given)),
        ("reduce_scatter", lambda: _into(dist.reduce_scatter_tensor, given)),
    ):
        if not torch.equal(collective(), given):
            wrong.append(name)
    dist.barrier()
    seconds = min(_seconds(lambda: dist.all_reduce(given)) for _ in range(5))
    backend = torch.distributed.get_backend()
    said = f"wrong: {', '.join(wrong)}" if wrong else "all four collectives are right"
    return judge(
        not wrong,
        f"{backend}, one rank: {said}; an all-reduce of 64 MiB takes {seconds * 1e3:.2f} ms.",
        backend=backend,
        wrong=wrong,
        all_reduce_s=seconds,
    )


def _in_place(collective, given: torch.Tensor) -> torch.Tensor:
    tensor = given.clone()
    collective(tensor)
    return tensor


def _into(collective, given: torch.Tensor) -> torch.Tensor:
    tensor = torch.zeros_like(given)
    collective(tensor, given)
    return tensor


def _seconds(work) -> float:
    get_accelerator().synchronize()
    started = time.perf_counter()
    work()
    get_accelerator().synchronize()
    return time.perf_counter() - started

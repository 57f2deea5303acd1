"""What the ranks of one run tell each other: small Python values, and decisions that all of them
share.

Everything here works in a single process without torch.distributed, too. Each function is a
collective: every rank calls it, in the same order. None of it is meant for the hot path.
"""

import os
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from gkd_ds.runtime.errors import InputError

T = TypeVar("T")


def rank() -> int:
    """This process's rank; before torch.distributed starts, what the launcher says."""
    return dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """The number of processes that take part in collectives: 1 until torch.distributed has
    started.
    """
    return dist.get_world_size() if dist.is_initialized() else 1


def gather(value: Any) -> list[Any]:
    """Every rank's `value` (picklable), in the order of the ranks, on every rank."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def broadcast(value: Any) -> Any:
    """Rank 0's `value` (picklable) on every rank."""
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def run_on_all_ranks(
    work: Callable[[], T],
    failure: Callable[[int, Exception], Exception] = lambda rank, error: error,
    catch: type[Exception] = Exception,
) -> list[T]:
    """Do `work` on this rank; return every rank's result, or raise the same error on every rank.

    Where `work` raises `catch`, `failure(rank, error)` makes the error that all ranks raise; it
    must be picklable. Of several failures, all ranks raise that of the lowest rank. Whatever fails,
    no rank is left waiting in this collective. `work` itself may hold collectives only if all ranks
    reach them.
    """
    cause, outcome = None, (None, None)
    try:
        outcome = (work(), None)
    except catch as error:  # the other ranks must hear of it before this one leaves
        cause, outcome = error, (None, failure(rank(), error))
    outcomes = gather(outcome)
    for _, problem in outcomes:
        if problem is not None:
            if problem is not cause:
                problem.__cause__ = cause
            raise problem
    return [result for result, _ in outcomes]


def barrier() -> None:
    """Return when every rank has called this."""
    gather(None)


def all_reduce_max(values: list[int]) -> list[int]:
    """The largest of each integer over all ranks: one all-reduce of int64, and one wait for the
    device.
    """
    if world_size() == 1:
        return list(values)
    tensor = torch.tensor(values, dtype=torch.int64, device=_device())
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return tensor.tolist()


def any_rank(flag: bool) -> bool:
    """Whether `flag` holds on at least one rank."""
    return bool(all_reduce_max([int(flag)])[0])


def all_reduce_sum(values: list[float]) -> list[float]:
    """The sum of each number over all ranks: one all-reduce of `len(values)` float64, and one host
    sync.
    """
    if world_size() == 1:
        return list(values)
    tensor = torch.tensor(values, dtype=torch.float64, device=_device())
    dist.all_reduce(tensor)
    return tensor.tolist()


def refuse_differences(fields: dict[str, str], what: str) -> None:
    """Raise the same InputError on every rank when the ranks were started with different `fields`.

    `fields` maps a name (a configuration field, "training data") to its value or digest; `what`
    names the whole for the sentence ("configuration").
    """
    everyone = gather(fields)
    for other, theirs in enumerate(everyone):
        for name in sorted({*everyone[0], *theirs}):
            mine, their = everyone[0].get(name, "nothing"), theirs.get(name, "nothing")
            if mine != their:
                raise InputError(
                    f"the ranks were started with different {what}: '{name}' is {mine} on rank 0 "
                    "and "
                    f"{their} on rank {other}; start all ranks with the same recipe, code and data."
                )


def _device() -> str:
    if dist.get_backend() == "gloo":
        return "cpu"
    from deepspeed.accelerator import (
        get_accelerator,  # late: it takes seconds, and gloo does without
    )

    return get_accelerator().current_device_name()

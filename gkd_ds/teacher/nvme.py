"""A teacher on NVMe: buffers that fit its layers, reading ahead, and swap files that are still what
was written.

DeepSpeed (read in 0.19.8) swaps a partitioned parameter when its shard has at least 1 MiB, one file
each, and reads each into a pinned buffer of `buffer_count` equal ones. Too few or too small
buffers, or a file that is gone, are assertions deep inside it, long after the weights were loaded.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from deepspeed.runtime.swap_tensor.utils import MIN_AIO_BYTES
from torch import nn
from transformers import PreTrainedModel

from gkd_ds.engine import causal_lm, zero
from gkd_ds.runtime import ranks
from gkd_ds.runtime.errors import InputError


class SwapFileError(RuntimeError):
    """A swap file is not what was written: no target can be trusted any more."""


def is_used(ds_config: dict[str, Any]) -> bool:
    """Whether the parameters go to NVMe."""
    return (ds_config["zero_optimization"].get("offload_param") or {}).get("device") == "nvme"


def fit_buffers(ds_config: dict[str, Any], model: PreTrainedModel, element_size: int) -> None:
    """Resolve "auto" for `buffer_count` and `buffer_size` of an NVMe teacher in `ds_config`, or
    check the numbers.

    `model` may be on the meta device; `element_size` is in bytes. A whole layer is in the buffers
    at a time, and one buffer more is the least; "auto" has room for the next layer, too, which is
    read meanwhile (`read_ahead`). Raises InputError where the numbers given are too small.
    """
    if not is_used(ds_config):
        return
    block = ds_config["zero_optimization"]["offload_param"]
    units = [
        *causal_lm.decoder_layers(model),
        model.get_input_embeddings(),
        model.get_output_embeddings(),
    ]
    shards = [list(_swapped(unit.parameters(), element_size)) for unit in units]
    matrices = max(map(len, shards))
    size = max((size for unit in shards for size in unit), default=MIN_AIO_BYTES)
    for name, least, best in (
        ("buffer_count", matrices + 1, max(1, 2 * matrices)),
        ("buffer_size", size, size),
    ):
        value = block.get(name, "auto")
        if value == "auto":
            block[name] = best
        elif value < least:
            raise InputError(
                f"teacher_deepspeed sets offload_param.{name} to {value}, but this teacher needs "
                f"{least}; "
                'write "auto", or at least that.'
            )


def read_ahead(parameters: Iterable[nn.Parameter]) -> None:
    """Start to read the shards of `parameters` that are on NVMe only, as far as buffers are free.

    DeepSpeed itself reads ahead twice what it is gathering at that moment: one parameter, where
    gathering does not take long. Fetching a parameter waits for all reads: this is called when what
    is used meanwhile is here. Not a collective.
    """
    away = [p for p in parameters if zero.is_only_on_nvme(p)]
    if away:
        swapper = away[0].nvme_swapper
        swapper.swap_in(away[: swapper.available_swap_in_buffers()], async_op=True)


def _swapped(parameters: Iterable[nn.Parameter], element_size: int) -> Iterable[int]:
    """Elements of this rank's shards that go to NVMe."""
    for parameter in parameters:
        shard = math.ceil(zero.full_numel(parameter) / ranks.world_size())
        if shard * element_size >= MIN_AIO_BYTES:
            yield shard


class SwapFiles:
    """The swap files of a teacher, and what they were once all of them were written; then they are
    only read.
    """

    def __init__(self, model: PreTrainedModel):
        swapped = [p for p in model.parameters() if zero.is_on_nvme(p)]
        self.written = {
            path: _state(path) for path in (Path(p.nvme_swapper.get_path(p)) for p in swapped)
        }
        self.anywhere = ranks.any_rank(bool(self.written))

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Around what reads them: no data from a file that was changed before or meanwhile is used.

        Raises SwapFileError on all ranks when one of them misses a file, or finds another one. A
        collective.
        """
        self._check()
        try:
            yield
        except (
            RuntimeError,
            AssertionError,
        ) as error:  # DeepSpeed's, when it reads less than it wants
            if problem := self._problem():
                raise SwapFileError(problem) from error
            raise
        self._check()

    def _check(self) -> None:
        if not self.anywhere:
            return
        problem = next(filter(None, ranks.gather(self._problem())), None)
        if problem:
            raise SwapFileError(problem)

    def _problem(self) -> str | None:
        for path, written in self.written.items():
            found = _state(path)
            if found != written:
                what = _difference(found, written)
                return (
                    f"the swap file {path} of the teacher on rank {ranks.rank()} {what}; something "
                    "else writes to "
                    "offload_param.nvme_path: give this run a directory of its own and resume."
                )
        return None


def _state(path: Path) -> tuple[int, int, int] | None:
    """(bytes, time of the last change, inode) of a file, None where there is none."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return found.st_size, found.st_mtime_ns, found.st_ino


def _difference(found: tuple[int, int, int] | None, written: tuple[int, int, int]) -> str:
    if found is None:
        return "is gone"
    return (
        f"has {found[0]} bytes instead of {written[0]}"
        if found[0] != written[0]
        else "was written anew"
    )

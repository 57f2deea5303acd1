"""Loads a checkpoint that another number of ranks wrote: every rank cuts its part out of the old
ranks' files.

ZeRO-3 cuts each parameter, flattened, into one piece per rank, and chains the pieces of a group of
parameters to one flat tensor; the optimizer's moments lie beside it in the same order. With the
shapes, which every file of model states lists, that is all one needs to find any stretch of any
parameter again:

    old ranks    |-- rank 0 --|-- rank 1 --|-- rank 2 (padded) --|
    new ranks    |------ rank 0 ------|------ rank 1 (padded) ------|

DeepSpeed's own way, a conversion to its universal format (ds_to_universal.py), needs the space of
the checkpoint once more, unpickles without restriction, and on loading gives every parameter group
the settings of the first: weight decay on biases and norms. Here nothing is written, files are
mapped, and only data are unpickled.
"""

from __future__ import annotations

import copy
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from deepspeed.runtime.engine import DeepSpeedEngine
from torch import Tensor

from gkd_ds.checkpoint.engine_files import TAG, read, require_same_student
from gkd_ds.runtime.errors import InputError

OPTIMIZER_FILE = re.compile(r"(?:bf16_)?zero_pp_rank_(\d+)_mp_rank_00_optim_states\.pt")
MODEL_FILE = "zero_pp_rank_0_mp_rank_00_model_states.pt"


def load_engine(
    engine: DeepSpeedEngine, directory: Path, old_world: int, rank: int, world: int
) -> None:
    """Load `directory`, verified by checkpoint.find and written by `old_world` ranks, into rank
    `rank` of `world`.

    Weights, moments, loss scale, learning-rate schedule and counters are those of the checkpoint. A
    collective. Raises InputError, on all ranks, for what cannot be resharded.
    """
    require_same_student(engine, directory)
    if engine.zero_optimization_stage() != 3:
        raise InputError(
            f"{directory} was written by {old_world} ranks, and only at ZeRO stage 3 can it be "
            f"given to {world}; start "
            f"{old_world} ranks."
        )
    model_states = read(directory / TAG / MODEL_FILE, map_location="cpu")
    optimizer = engine.optimizer
    state = _optimizer_state(optimizer, _Old(directory / TAG, old_world, model_states), rank, world)
    optimizer.checkpoint_event_prologue()
    optimizer.load_state_dict([state] * world)
    optimizer.checkpoint_event_epilogue()
    buffers = dict(engine.module.named_buffers())
    for name in model_states["buffer_names"]:
        buffers[name].copy_(model_states["module"][name])
    if engine.lr_scheduler is not None:
        engine.lr_scheduler.load_state_dict(model_states["lr_scheduler"])
    for name in ("global_steps", "global_samples", "skipped_steps"):
        setattr(engine, name, model_states[name])


@dataclass(frozen=True)
class _Place:
    """Where a parameter is: its group, and where its piece begins in that group's flat tensor (on
    every old rank).
    """

    group: int
    offset: int
    shape: torch.Size


class _Old:
    """The optimizer files of all old ranks, mapped into memory."""

    def __init__(self, directory: Path, world: int, model_states: dict[str, Any]):
        self.directory, self.world = directory, world
        files = {
            int(m[1]): path
            for path in directory.iterdir()
            if (m := OPTIMIZER_FILE.fullmatch(path.name))
        }
        if sorted(files) != list(range(world)):
            raise InputError(
                f"{directory} holds no optimizer file of each of its {world} ranks; resume from "
                "another."
            )
        self.ranks = [
            read(files[rank], map_location="cpu", mmap=True)["optimizer_state_dict"]
            for rank in range(world)
        ]
        self.places = {}
        for group, shapes in enumerate(model_states["param_shapes"]):
            offset = 0
            for name, shape in shapes.items():
                self.places[name] = _Place(group, offset, shape)
                offset += math.ceil(shape.numel() / world)

    def flat(self, rank: int, group: int, key: str) -> Any:
        """One rank's flat tensor of a group: the fp32 weights, or what its optimizer keeps under
        `key`.
        """
        state = self.ranks[rank]
        return state["fp32_flat_groups"][group] if key == "fp32" else self.moments(rank, group)[key]

    def moments(self, rank: int, group: int) -> dict[str, Any]:
        return self.ranks[rank]["optimizer_state_dict"]["state"].get(group, {})

    def cut(self, name: str, key: str, begin: int, end: int) -> Tensor:
        """Elements [begin, end) of a flattened parameter; past its end there are zeros."""
        place = self.places[name]
        numel = place.shape.numel()
        piece = math.ceil(numel / self.world)
        result = torch.zeros(end - begin, dtype=self.flat(0, place.group, key).dtype)
        for rank in range(self.world):
            first, last = max(begin, rank * piece), min(end, (rank + 1) * piece, numel)
            if first < last:
                start = place.offset + first - rank * piece
                result[first - begin : last - begin] = self.flat(rank, place.group, key)[
                    start : start + last - first
                ]
        return result


def _optimizer_state(optimizer: Any, old: _Old, rank: int, world: int) -> dict[str, Any]:
    """What `optimizer.state_dict()` would have returned on this rank, had `world` ranks written the
    checkpoint.
    """
    groups = [
        [(optimizer.param_names[p], torch.Size(p.ds_shape)) for p in group]
        for group in optimizer.fp16_groups
    ]
    state: dict[int, dict[str, Any]] = {}
    flat_groups = []
    for number, group in enumerate(groups):
        sources = [old.places[name].group for name, _ in group]
        flat_groups.append(_chain(old, group, "fp32", rank, world))
        state[number] = {}
        for key, value in old.moments(0, sources[0]).items():
            flat = (
                isinstance(value, Tensor) and value.shape == old.flat(0, sources[0], "fp32").shape
            )
            # Copied, because several new groups may be parts of one old group, and each counts its
            # own steps.
            state[number][key] = (
                _chain(old, group, key, rank, world) if flat else copy.deepcopy(value)
            )
            if not flat and isinstance(value, Tensor) and value.dim():
                raise InputError(
                    f"the optimizer keeps {key!r} in a form that only the {old.world} ranks which "
                    "wrote it can read; "
                    "start as many."
                )
    saved = old.ranks[0]
    members: list[list[int]] = [[] for _ in optimizer.optimizer.param_groups]
    for number in range(len(groups)):
        members[optimizer.sub_group_to_group_id[number]].append(number)
    param_groups = saved["optimizer_state_dict"]["param_groups"]
    if len(param_groups) != len(members):
        raise InputError(
            f"{old.directory} has other groups of parameters than this run; keep the student and "
            "optim."
        )
    return {
        **{
            key: value
            for key, value in saved.items()
            if key not in ("optimizer_state_dict", "fp32_flat_groups")
        },
        "fp32_flat_groups": flat_groups,
        "optimizer_state_dict": {
            "state": state,
            "param_groups": [
                {**group, "params": mine} for group, mine in zip(param_groups, members)
            ],
        },
    }


def _chain(
    old: _Old, group: list[tuple[str, torch.Size]], key: str, rank: int, world: int
) -> Tensor:
    """This rank's flat tensor of a group: its piece of every parameter, one after the other."""
    pieces = []
    for name, shape in group:
        piece = math.ceil(shape.numel() / world)
        pieces.append(old.cut(name, key, rank * piece, (rank + 1) * piece))
    return torch.cat(pieces)

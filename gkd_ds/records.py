"""What the phases of a window hand to each other.

A window is everything between two optimizer updates, of one rank. Sequences are stored without
padding, as token lists; each engine pads them its own way (prompts on the left to decode, whole
sequences on the right to score and learn, where causal attention then needs no mask).
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor


class Source(str, Enum):
    """Who wrote a completion. What is sampled stands first, the student's own before all."""

    STUDENT = "student"
    TEACHER = "teacher"
    DATA = "data"


@dataclass(frozen=True)
class Sample:
    """One prompt of a window, before anybody completed it.

    `sample_id` = epoch * len(dataset) + row: it names the sample in the whole run, and with the
    seed and a position it determines every token that is drawn for it.
    """

    sample_id: int
    prompt_ids: list[int]
    data_completion_ids: list[int]
    source: Source


@dataclass(frozen=True)
class Rollout:
    """A completed sample. `completion_ids` ends with the stop token where one was written
    (`stopped`).
    """

    sample_id: int
    source: Source
    prompt_ids: list[int]
    completion_ids: list[int]
    stopped: bool

    def __len__(self) -> int:
        return len(self.prompt_ids) + len(self.completion_ids)


@dataclass(frozen=True)
class SequenceBatch:
    """Some rollouts as one right-padded tensor.

    `input_ids_BT` holds every token but the last of each sequence's end padding; `index_N` are the
    flat positions (b * T + t) whose hidden states predict a completion token, in rollout order;
    `tokens_N` are those tokens. A batch without rollouts has one dummy row, so that every rank runs
    the same collectives.
    """

    input_ids_BT: Tensor
    index_N: Tensor
    tokens_N: Tensor


def sequence_batch(rollouts: list[Rollout], pad_id: int, device: torch.device) -> SequenceBatch:
    """Pad on the right. The completion's positions come from lengths, never from comparing ids with
    the pad id.
    """
    width = max((len(r) for r in rollouts), default=1)
    ids, index, tokens = [], [], []
    for row, rollout in enumerate(rollouts):
        ids.append(rollout.prompt_ids + rollout.completion_ids + [pad_id] * (width - len(rollout)))
        first = row * width + len(rollout.prompt_ids) - 1
        index.extend(range(first, first + len(rollout.completion_ids)))
        tokens.extend(rollout.completion_ids)
    as_tensor = lambda values: torch.tensor(values, dtype=torch.long, device=device)  # noqa: E731
    return SequenceBatch(as_tensor(ids or [[pad_id]]), as_tensor(index), as_tensor(tokens))


@dataclass(frozen=True)
class TeacherTargets:
    """The teacher's last hidden states at the completion positions of one rollout list,
    concatenated: `[N, E]`.

    Not logits: `[N, V]` would be 20 to 70 times larger. The teacher's head is applied in the loss,
    chunk by chunk. `offsets[i]:offsets[i + 1]` are the rows of rollout i.
    """

    hidden_NE: Tensor
    offsets: list[int]

    def of(self, rows: list[int]) -> Tensor:
        """The targets of some rollouts, in the order given."""
        parts = [self.hidden_NE[self.offsets[row] : self.offsets[row + 1]] for row in rows]
        return torch.cat(parts) if parts else self.hidden_NE[:0]

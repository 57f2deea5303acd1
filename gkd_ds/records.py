"""What the phases of a window hand to each other.

A window is everything between two optimizer updates, of one rank. Sequences are stored without
padding, as token lists; each engine pads them its own way (prompts on the left to decode, whole
sequences on the right to score and learn, where causal attention then needs no mask).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

import torch
from torch import Tensor


class Source(str, Enum):
    """Who wrote a completion. Sampled sources come first, the student before the teacher."""

    STUDENT = "student"
    TEACHER = "teacher"
    DATA = "data"


@dataclass(frozen=True)
class Sample:
    """One prompt of a window, before anybody completed it.

    `sample_id` = epoch * len(dataset) + row: it names the sample in the whole run, and with the
    seed and a position it determines every token that is drawn for it. A row that repeats its draws
    (rollout_speculation) has the id of the first epoch in every epoch. `draft_ids` may be what it
    was completed with before: a hint, which changes how fast it is completed and not with what.
    """

    sample_id: int
    prompt_ids: list[int]
    data_completion_ids: list[int]
    source: Source
    draft_ids: list[int] = field(default_factory=list)


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
class Completions:
    """What samples were completed with: `token_ids[i]` and whether a stop token ended it.

    `decoded_sequences` counts decode steps x sequences that were computed, `prefilled_tokens`
    padded prompt tokens, `drafted_tokens` those of drafts, of which `accepted_tokens` were drawn
    again.
    """

    token_ids: list[list[int]]
    stopped: list[bool]
    decoded_sequences: int
    prefilled_tokens: int
    drafted_tokens: int = 0
    accepted_tokens: int = 0


@dataclass(frozen=True)
class SequenceBatch:
    """Some rollouts as one right-padded tensor.

    `input_ids_BT` holds every token but the last of each sequence's end padding; `index_N` are the
    flat positions (b * T + t) whose hidden states predict a completion token, in rollout order;
    `tokens_N` are those tokens. A batch without rollouts has one dummy sequence, so that every rank
    runs the same collectives. `extra` is what the model is given beside the tokens, if anything.
    """

    input_ids_BT: Tensor
    index_N: Tensor
    tokens_N: Tensor
    extra: dict[str, Tensor] = field(default_factory=dict)


def sequence_batch(rollouts: list[Rollout], pad_id: int, device: torch.device) -> SequenceBatch:
    """Pad on the right. The completion's positions come from lengths, never from comparing ids with
    the pad id.
    """
    width = max((len(r) for r in rollouts), default=1)
    ids, places, tokens = [], [], []
    for index, rollout in enumerate(rollouts):
        ids.append(rollout.prompt_ids + rollout.completion_ids + [pad_id] * (width - len(rollout)))
        first = index * width + len(rollout.prompt_ids) - 1
        places.extend(range(first, first + len(rollout.completion_ids)))
        tokens.extend(rollout.completion_ids)
    as_tensor = lambda values: torch.tensor(values, dtype=torch.long, device=device)  # noqa: E731
    return SequenceBatch(as_tensor(ids or [[pad_id]]), as_tensor(places), as_tensor(tokens))


def packed_batch(rollouts: list[Rollout], pad_id: int, device: torch.device) -> SequenceBatch:
    """One line without padding, `[1, T]`. transformers keeps attention within each sequence, as it
    sees from the positions where one begins.
    """
    ids, positions, places, tokens = [], [], [], []
    for rollout in rollouts:
        first = len(ids) + len(rollout.prompt_ids) - 1
        places.extend(range(first, first + len(rollout.completion_ids)))
        positions.extend(range(len(rollout)))
        ids.extend(rollout.prompt_ids + rollout.completion_ids)
        tokens.extend(rollout.completion_ids)
    as_tensor = lambda values: torch.tensor(values, dtype=torch.long, device=device)  # noqa: E731
    line_1T, positions_1T = as_tensor([ids or [pad_id]]), as_tensor([positions or [0]])
    extra = {"position_ids": positions_1T}
    return SequenceBatch(line_1T, as_tensor(places), as_tensor(tokens), extra)


class TargetForm(str, Enum):
    """What a teacher's targets are. The loss asks for the form, never for the teacher's class."""

    HIDDEN_STATES = "hidden states"  # `[N, E]`, which the loss multiplies by the teacher's head


@dataclass(frozen=True)
class TeacherTargets:
    """What the teacher says about every completion token of a list of rollouts, concatenated.

    `hidden_NE` are its last hidden states at the completion positions. Logits `[N, V]` would be 20
    to 70 times larger, so the loss applies the teacher's head, chunk by chunk.
    `offsets[i]:offsets[i + 1]` are the tokens of rollout i.
    """

    hidden_NE: Tensor
    offsets: list[int]
    form: TargetForm = TargetForm.HIDDEN_STATES

    def of(self, indices: list[int]) -> Tensor:
        """The targets of some rollouts, in the order given."""
        parts = [self.hidden_NE[self.offsets[i] : self.offsets[i + 1]] for i in indices]
        return torch.cat(parts) if parts else self.hidden_NE[:0]

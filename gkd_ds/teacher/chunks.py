"""A window in chunks, for a teacher that runs here: how large they may be, and their results put
together again.

Shapes: E the teacher's width, N completion tokens of the window.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from gkd_ds.engine import accelerator, zero
from gkd_ds.engine.cache_size import largest
from gkd_ds.records import Rollout, TeacherTargets


def tokens_per_chunk(model: PreTrainedModel, itemsize: int, memory_mb: int) -> int:
    """Tokens whose activations in a layer fit into `memory_mb` MiB, at `itemsize` bytes a number.

    In the MLP, where a layer is widest, about four tensors are alive at once.
    """
    text = model.config.get_text_config()
    widest = max(4 * text.hidden_size, largest(text, "intermediate_size"))
    return max(1, memory_mb * 2**20 // (4 * widest * itemsize))


class TargetsInOrder:
    """Collects the hidden states of chunks, and gives them back in the order of `rollouts`.

    Those of no token at all have the width and dtype of the output layer's weight `head_VE`.
    """

    def __init__(self, rollouts: list[Rollout], head_VE: nn.Parameter):
        self._lengths = [len(rollout.completion_ids) for rollout in rollouts]
        self._hidden: list[Tensor | None] = [None] * len(rollouts)
        width = zero.full_shape(head_VE)[-1]
        self._none_NE = torch.zeros(0, width, dtype=head_VE.dtype, device=accelerator.device())

    def add(self, chunk: list[int], hidden_NE: Tensor) -> None:
        """`hidden_NE` of the rollouts that `chunk` names."""
        for index, part in zip(chunk, hidden_NE.split([self._lengths[i] for i in chunk])):
            self._hidden[index] = part

    def targets(self, memory_mb: int) -> TeacherTargets:
        """All of them, on the host where they take more than `memory_mb` MiB."""
        offsets = [0]
        for length in self._lengths:
            offsets.append(offsets[-1] + length)
        hidden_NE = torch.cat([self._none_NE, *self._hidden])
        if hidden_NE.numel() * hidden_NE.element_size() > memory_mb * 2**20:
            hidden_NE = hidden_NE.cpu()
        return TeacherTargets(hidden_NE, offsets)

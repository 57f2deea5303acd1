"""A window's targets, put together again from chunks in any order."""

from __future__ import annotations

import pytest
import torch

from gkd_ds.records import Rollout, Source
from gkd_ds.teacher.chunks import TargetsInOrder, tokens_per_chunk

ROLLOUTS = [
    Rollout(index, Source.DATA, [1], list(range(2, 2 + length)), True)
    for index, length in enumerate((2, 1, 3))
]

HEAD_VE = torch.nn.Parameter(torch.zeros(9, 4))


def test_targets_are_in_the_rollouts_order():
    hidden = [torch.full((len(r.completion_ids), 4), float(r.sample_id)) for r in ROLLOUTS]
    scored = TargetsInOrder(ROLLOUTS, HEAD_VE)
    scored.add([2, 0], torch.cat([hidden[2], hidden[0]]))
    scored.add([], hidden[0][:0])
    scored.add([1], hidden[1])
    targets = scored.targets(memory_mb=1)
    assert torch.equal(targets.hidden_NE, torch.cat(hidden)) and targets.offsets == [0, 2, 3, 6]


def test_no_rollouts_have_targets_of_the_right_width():
    scored = TargetsInOrder([], HEAD_VE)
    targets = scored.targets(memory_mb=1)
    assert targets.hidden_NE.shape == (0, 4) and targets.offsets == [0]


@pytest.mark.parametrize("itemsize, expected", [(4, 512), (2, 1024)])
def test_a_chunk_has_four_of_the_widest_tensors(model, itemsize, expected):
    text = model.config.get_text_config()
    widest = max(4 * text.hidden_size, text.intermediate_size)
    memory_mb = 4 * widest * 4 * 512 / 2**20
    assert tokens_per_chunk(model, itemsize, memory_mb) == expected

"""What the phases hand on: positions come from lengths, whatever the token ids are."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gkd_ds.records import Rollout, Source, TeacherTargets, sequence_batch

CPU = torch.device("cpu")


def rollout(prompt: list[int], completion: list[int]) -> Rollout:
    return Rollout(0, Source.DATA, prompt, completion, True)


def test_positions_and_tokens_of_a_ragged_batch() -> None:
    batch = sequence_batch(
        [rollout([5, 6, 7], [8, 9]), rollout([4], [3, 2, 1, 0, 9])], pad_id=0, device=CPU
    )
    assert batch.input_ids_BT.tolist() == [[5, 6, 7, 8, 9, 0], [4, 3, 2, 1, 0, 9]]
    assert batch.index_N.tolist() == [2, 3, 6, 7, 8, 9, 10]
    assert batch.tokens_N.tolist() == [8, 9, 3, 2, 1, 0, 9]


@settings(deadline=None)
@given(
    st.lists(
        st.tuples(
            st.lists(st.integers(0, 3), min_size=1, max_size=9),
            st.lists(st.integers(0, 3), max_size=9),
        ),
        min_size=1,
        max_size=6,
    )
)
def test_each_position_is_the_one_before_its_token_also_when_pad_is_a_real_token(rows) -> None:
    rollouts = [rollout(prompt, completion) for prompt, completion in rows]
    batch = sequence_batch(rollouts, pad_id=0, device=CPU)
    width = batch.input_ids_BT.shape[1]
    assert batch.tokens_N.tolist() == [token for r in rollouts for token in r.completion_ids]
    expected = [
        (b, len(r.prompt_ids) - 1 + n)
        for b, r in enumerate(rollouts)
        for n in range(len(r.completion_ids))
    ]
    assert [(i // width, i % width) for i in batch.index_N.tolist()] == expected
    following = [batch.input_ids_BT[b, t + 1].item() for b, t in expected]
    assert following == batch.tokens_N.tolist()


def test_a_batch_without_rollouts_still_has_a_row_to_run() -> None:
    batch = sequence_batch([], pad_id=7, device=CPU)
    assert (
        batch.input_ids_BT.tolist() == [[7]]
        and batch.index_N.numel() == batch.tokens_N.numel() == 0
    )
    assert batch.index_N.dtype == batch.tokens_N.dtype == torch.long


def test_targets_of_some_rollouts_in_any_order() -> None:
    targets = TeacherTargets(torch.arange(12.0).view(6, 2), offsets=[0, 2, 2, 5, 6])
    assert targets.of([3, 0])[:, 0].tolist() == [10, 0, 2]
    assert targets.of([1]).shape == (0, 2) and targets.of([]).shape == (0, 2)

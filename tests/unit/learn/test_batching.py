"""Groups of similar length: a partition, within its limit, and as cheap as the best of all
partitions.
"""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gkd_ds.learn.batching import length_groups


def cost(groups: list[list[int]], lengths: list[int], overhead: int) -> int:
    return sum(len(group) * max(lengths[i] for i in group) + overhead for group in groups)


def partitions(items: list[int]):
    """All ways to divide `items` into groups, in any order and not only along their lengths."""
    if not items:
        yield []
        return
    first, rest = items[0], items[1:]
    for partition in partitions(rest):
        yield [[first], *partition]
        for place in range(len(partition)):
            yield [*partition[:place], [first, *partition[place]], *partition[place + 1 :]]


def allowed(groups: list[list[int]], lengths: list[int], limit: int) -> bool:
    return all(
        len(group) == 1 or len(group) * max(lengths[i] for i in group) <= limit for group in groups
    )


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(1, 30), max_size=7), st.integers(1, 100), st.integers(0, 40))
def test_no_partition_is_cheaper(lengths: list[int], limit: int, overhead: int) -> None:
    groups = length_groups(lengths, limit, overhead)
    assert allowed(groups, lengths, limit)
    best = min(
        cost(p, lengths, overhead)
        for p in partitions(list(range(len(lengths))))
        if allowed(p, lengths, limit)
    )
    assert cost(groups, lengths, overhead) == best


@settings(deadline=None)
@given(st.lists(st.integers(1, 4000), max_size=80), st.integers(1, 20_000), st.integers(0, 500))
def test_every_sequence_is_in_one_group_longest_first(
    lengths: list[int], limit: int, overhead: int
) -> None:
    groups = length_groups(lengths, limit, overhead)
    assert sorted(index for group in groups for index in group) == list(range(len(lengths)))
    in_order = [lengths[index] for group in groups for index in group]
    assert in_order == sorted(lengths, reverse=True)
    assert allowed(groups, lengths, limit)


@pytest.mark.parametrize(
    "lengths, expected", [([], []), ([9], [[0]]), ([3, 3, 3, 3], [[0, 1], [2, 3]])]
)
def test_small_cases(lengths: list[int], expected: list[list[int]]) -> None:
    assert length_groups(lengths, 6, 1) == expected


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(1, 12), max_size=7), st.integers(1, 60), st.integers(0, 40))
def test_no_group_is_on_both_sides_of_the_switch(
    lengths: list[int], limit: int, overhead: int
) -> None:
    """And none is cheaper among those that are not."""
    switch = 6

    def on_one_side(groups: list[list[int]]) -> bool:
        return all(len({lengths[i] > switch for i in group}) == 1 for group in groups)

    groups = length_groups(lengths, limit, overhead, switch)
    assert allowed(groups, lengths, limit) and on_one_side(groups)
    best = min(
        cost(p, lengths, overhead)
        for p in partitions(list(range(len(lengths))))
        if allowed(p, lengths, limit) and on_one_side(p)
    )
    assert cost(groups, lengths, overhead) == best

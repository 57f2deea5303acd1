"""Grouping ragged sequences so that little is spent on padding."""

from __future__ import annotations

import numpy as np


def length_groups(
    lengths: list[int], token_limit: int, overhead_tokens: int, switch: int | None = None
) -> list[list[int]]:
    """Partition sequences into groups that are each padded to their longest: indices into
    `lengths`, longest first.

    Minimises padded tokens + `overhead_tokens` per group, exactly, by dynamic programming over the
    sorted lengths. No group has more than `token_limit` padded tokens, unless it is a single
    sequence, and none has sequences up to a length of `switch` beside longer ones. Empty input
    gives no group.
    """
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    longest = np.array([lengths[index] for index in order], dtype=np.int64)
    best = np.zeros(len(order) + 1)
    first_of_last_group = np.zeros(len(order) + 1, dtype=np.int64)
    for end in range(1, len(order) + 1):
        members = end - np.arange(end)
        padded = members * longest[:end]
        allowed = (padded <= token_limit) | (members == 1)
        if switch is not None:
            allowed &= (longest[:end] > switch) == (longest[end - 1] > switch)
        cost = np.where(allowed, best[:end] + padded + overhead_tokens, np.inf)
        first_of_last_group[end] = cost.argmin()
        best[end] = cost.min()
    groups, end = [], len(order)
    while end:
        first = int(first_of_last_group[end])
        groups.append(order[first:end])
        end = first
    return groups[::-1]


def packed_groups(lengths: list[int], token_limit: int) -> list[list[int]]:
    """Partition sequences into lines of at most `token_limit` tokens, unless it is a single
    sequence: longest first, each into the fullest line that has room (best-fit decreasing). Empty
    input gives no line.
    """
    lines: list[list[int]] = []
    tokens: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda index: (-lengths[index], index)):
        room = [line for line in range(len(lines)) if tokens[line] + lengths[index] <= token_limit]
        if room:
            line = max(room, key=lambda line: tokens[line])
        else:
            line = len(lines)
            lines.append([])
            tokens.append(0)
        lines[line].append(index)
        tokens[line] += lengths[index]
    return lines

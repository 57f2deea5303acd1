"""How long rows can become: by who completes them, and within max_length."""

from __future__ import annotations

import pytest

from gkd_ds import GKDConfig
from gkd_ds.data.examples import Examples, TokenLists
from gkd_ds.data.lengths import RowLengths, Span
from gkd_ds.records import Source

STUDENT, TEACHER, DATA = Source.STUDENT, Source.TEACHER, Source.DATA


def examples(*lengths: tuple[int, int]) -> Examples:
    prompts, completions = TokenLists(), TokenLists()
    for prompt, completion in lengths:
        prompts.append([7] * prompt)
        completions.append([7] * completion)
    return Examples(prompts, completions, "")


TRAIN = examples((5, 20), (30, 4), (9, 9))


@pytest.mark.parametrize(
    "fields, spans",
    [
        ({"lmbda": 0.0}, [Span(DATA, 18, 34)]),
        ({"lmbda": 1.0}, [Span(STUDENT, 5, 40)]),
        ({"lmbda": 0.5}, [Span(STUDENT, 5, 40), Span(DATA, 18, 34)]),
        ({"lmbda": 0.5, "seq_kd": True}, [Span(STUDENT, 5, 40), Span(TEACHER, 5, 40)]),
        ({"lmbda": 1.0, "max_length": 36}, [Span(STUDENT, 5, 36)]),
        ({"lmbda": 1.0, "max_length": None}, [Span(STUDENT, 5, 40)]),
    ],
)
def test_training_rows(fields: dict, spans: list[Span]) -> None:
    config = GKDConfig(max_new_tokens=10, **fields)
    lengths = RowLengths.of(config, TRAIN, {})
    assert lengths.spans == tuple(spans)
    assert lengths.shortest == min(span.shortest for span in spans)
    assert lengths.longest == max(span.longest for span in spans)


def test_evaluation_counts_as_far_as_it_is_evaluated() -> None:
    config = GKDConfig(lmbda=0.0, max_new_tokens=10, eval_max_samples=2)
    sets = {"a": TRAIN, "b": examples((50, 1), (2, 2), (90, 9))}
    expected = [Span(DATA, 25, 34), Span(STUDENT, 5, 40), Span(DATA, 4, 51), Span(STUDENT, 2, 60)]
    assert RowLengths.of(config, None, sets).spans == tuple(expected)
    config.eval_on_policy = False
    assert RowLengths.of(config, None, sets).spans == (Span(DATA, 25, 34), Span(DATA, 4, 51))


def test_further_sets_come_on_top() -> None:
    config = GKDConfig(lmbda=0.0, eval_on_policy=False)
    lengths = RowLengths.of(config, TRAIN, {}).with_sets(config, {"": examples((70, 1))})
    assert (lengths.shortest, lengths.longest) == (18, 71)


def test_nothing_to_read_is_no_row() -> None:
    assert RowLengths.of(GKDConfig(), None, {}).longest == 1

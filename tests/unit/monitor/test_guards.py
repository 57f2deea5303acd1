"""Bad updates are counted and stop a run; signs of decay become sentences, rarely."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gkd_ds.monitor.guards import (
    BadUpdates,
    RateLimit,
    TrainingStopped,
    WindowStats,
    findings,
    looping_share,
    loops,
    trimmed,
    warnings,
)

HEALTHY = WindowStats(step=0, mean_length=40.0, finished_share=0.9, looping_share=0.05, entropy=2.0)


def history(healthy: int, then: list[dict]) -> list[WindowStats]:
    stats = [HEALTHY] * healthy + [replace(HEALTHY, **change) for change in then]
    return [replace(each, step=step) for step, each in enumerate(stats, start=1)]


def test_bad_updates_in_a_row_stop_the_run() -> None:
    bad = BadUpdates(limit=3)
    assert bad.record(1, None) is None
    assert (
        bad.record(2, "loss")
        == "update 2 was skipped: NaN or Inf in the loss (1 in a row, 1 in all)"
    )
    assert bad.record(3, "gradients") is not None
    assert bad.record(4, None) is None and bad.in_a_row == 0
    assert bad.record(5, "gradients") is not None
    assert bad.record(6, "gradients") is not None
    with pytest.raises(TrainingStopped) as caught:
        bad.record(7, "gradients")
    message = str(caught.value)
    assert (
        message.startswith("3 updates in a row up to step 7")
        and "(5 skipped in the whole run)" in message
    )
    assert "NaN or Inf in the gradients" in message and "; lower learning_rate" in message


def test_diagnosis_names_the_teacher_first() -> None:
    bad = BadUpdates(limit=2)
    bad.record(1, "teacher targets")
    with pytest.raises(TrainingStopped, match="teacher targets .*check the teacher's weights"):
        bad.record(2, "loss")


def test_counters_survive_a_resume() -> None:
    bad = BadUpdates(limit=2, total=7, in_a_row=1)
    with pytest.raises(TrainingStopped, match="8 skipped"):
        bad.record(9, "loss")


@given(st.lists(st.floats(1, 200), max_size=60))
def test_a_trimmed_history_has_the_same_findings(lengths: list[float]) -> None:
    whole = history(0, [{"mean_length": length} for length in lengths])
    kept: list[WindowStats] = []
    for number, stats in enumerate(whole, start=1):
        kept = trimmed([*kept, stats])
        assert findings(kept) == findings(whole[:number])
    assert len(kept) <= 25


def test_unknown_kind_is_our_mistake() -> None:
    with pytest.raises(AssertionError):
        BadUpdates(limit=2).record(1, "weather")


SENTENCE = [
    17,
    4,
    99,
    23,
    8,
    54,
    31,
    2,
    76,
    12,
    45,
    67,
    88,
    91,
    5,
    14,
    3,
    29,
    61,
    70,
    11,
    13,
    37,
    41,
]


@pytest.mark.parametrize(
    ("tokens", "is_loop"),
    [
        (SENTENCE, False),
        ([], False),
        ([5] * 23, False),  # too short to say
        (SENTENCE + [5] * 24, True),
        (SENTENCE + [5, 6, 7] * 8, True),
        (SENTENCE + [5, 6, 7] * 8 + [5], True),  # cut inside a round
        (SENTENCE + [5, 6, 7] * 7, False),  # 21 tokens
        (SENTENCE + list(range(16)) * 4, True),
        (SENTENCE + list(range(16)) * 3, False),
        (SENTENCE + list(range(17)) * 9, False),  # longer than any period that is looked for
        (SENTENCE + [5] * 40 + [6], False),  # it got out of it
    ],
)
def test_loops(tokens: list[int], is_loop: bool) -> None:
    assert loops(tokens) is is_loop


@given(
    start=st.lists(st.integers(0, 9), max_size=30),
    gram=st.lists(st.integers(0, 9), min_size=1, max_size=16),
    more=st.integers(0, 40),
)
def test_any_repeated_gram_is_a_loop(start: list[int], gram: list[int], more: int) -> None:
    tail = (gram * 40)[: max(24, 4 * len(gram)) + more]
    assert loops(start + tail)


def test_looping_share() -> None:
    assert looping_share([]) == 0.0
    assert looping_share([SENTENCE, [5] * 30, [6] * 30, SENTENCE]) == 0.5


@pytest.mark.parametrize(
    ("change", "sign", "part"),
    [
        ({"mean_length": 5.0}, "length collapse", "5 tokens, at first 40"),
        ({"mean_length": 200.0}, "length explosion", "200 tokens, at first 40"),
        ({"looping_share": 0.5}, "loops", "50% of the completions"),
        ({"finished_share": 0.1}, "missing end", "90% of the completions"),
        ({"entropy": 0.1}, "entropy collapse", "0.100 nats per token, at first 2.000"),
        ({"entropy": 0.001}, "entropy collapse", "0.001 nats"),
    ],
)
def test_findings(change: dict, sign: str, part: str) -> None:
    found = findings(history(20, [change] * 5))
    assert list(found) == [sign] and part in found[sign]
    assert findings(history(20, [change])) == {}, "one odd window is no finding"
    assert findings(history(2, [change] * 5)) == {}, "nothing to compare with yet"


def test_healthy_and_unmeasured() -> None:
    assert findings([]) == {} == findings(history(100, []))
    assert findings(history(20, [{"entropy": None}] * 5)) == {}
    assert (
        findings(history(20, [{"mean_length": 90.0, "entropy": 0.5, "finished_share": 0.4}] * 5))
        == {}
    )


def test_warnings_are_rare() -> None:
    limit, told = RateLimit(every=50), []
    windows = history(20, [{"looping_share": 0.9}] * 200)
    for count in range(len(windows)):
        told += warnings(windows[: count + 1], limit)
    assert len(told) == 4 and told[0].startswith("step 23: ") and told[1].startswith("step 73: ")
    assert warnings([], limit) == []

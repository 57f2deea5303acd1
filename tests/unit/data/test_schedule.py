"""Which samples a window holds, and who completes them: none lost or repeated, the same for any
number of ranks.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gkd_ds.data.schedule import SampleOrder, StepScheduler, hashed_uniform
from gkd_ds.records import Source

SCHEDULER = StepScheduler(
    num_samples=100,
    micro_batch_size=2,
    micro_batches=3,
    world_size=2,
    seed=5,
    lmbda=0.5,
    seq_kd=False,
)


def window(scheduler: StepScheduler, step: int) -> list[list[int]]:
    """Per micro-batch, the places of all ranks."""
    return [
        [
            place
            for rank in range(scheduler.world_size)
            for place in scheduler.places(step, micro_batch, rank)
        ]
        for micro_batch in range(scheduler.micro_batches)
    ]


@settings(deadline=None)
@given(
    samples=st.integers(1, 120),
    batch=st.integers(1, 7),
    accumulation=st.integers(1, 5),
    world=st.integers(1, 6),
    epoch=st.integers(0, 3),
)
def test_an_epoch_has_every_sample_once_in_order(
    samples, batch, accumulation, world, epoch
) -> None:
    scheduler = replace(
        SCHEDULER,
        num_samples=samples,
        micro_batch_size=batch,
        micro_batches=accumulation,
        world_size=world,
    )
    steps = range(epoch * scheduler.windows_per_epoch, (epoch + 1) * scheduler.windows_per_epoch)
    assert {scheduler.epoch_of(step) for step in steps} == {epoch}
    seen = [place for step in steps for places in window(scheduler, step) for place in places]
    assert seen == list(range(samples))
    assert all(any(window(scheduler, step)) for step in steps), "no window is empty"


@settings(deadline=None)
@given(
    samples=st.integers(1, 120),
    batch=st.integers(1, 7),
    accumulation=st.integers(1, 5),
    world=st.integers(1, 6),
)
def test_drop_last_gives_whole_windows_only(samples, batch, accumulation, world) -> None:
    scheduler = StepScheduler(
        samples, batch, accumulation, world, seed=0, lmbda=0.5, seq_kd=False, drop_last=True
    )
    seen = Counter(
        place
        for step in range(scheduler.windows_per_epoch)
        for places in window(scheduler, step)
        for place in places
    )
    if samples >= scheduler.window_samples:
        assert len(seen) == samples // scheduler.window_samples * scheduler.window_samples
    else:
        assert len(seen) == samples, "a dataset smaller than one window is still trained on"
    assert set(seen.values()) == {1}


@pytest.mark.parametrize("world", [1, 2, 4])
def test_the_same_global_batch_holds_the_same_samples_for_any_number_of_ranks(world: int) -> None:
    one = replace(SCHEDULER, micro_batch_size=8, world_size=1)
    many = replace(SCHEDULER, micro_batch_size=8 // world, world_size=world)
    for step in range(30):
        assert window(many, step) == window(one, step)
        assert [many.source(step, m) for m in range(3)] == [one.source(step, m) for m in range(3)]


def test_ranks_split_a_micro_batch_evenly_until_the_epoch_ends() -> None:
    scheduler = replace(SCHEDULER, num_samples=15)  # windows of 12: the second one has 3
    assert [list(scheduler.places(1, 0, rank)) for rank in (0, 1)] == [[12, 13], [14]]
    assert [list(scheduler.places(1, 1, rank)) for rank in (0, 1)] == [[], []]


@pytest.mark.parametrize("seq_kd, other", [(False, Source.DATA), (True, Source.TEACHER)])
def test_lmbda_at_its_ends_leaves_no_choice(seq_kd: bool, other: Source) -> None:
    for lmbda, only in ((0.0, other), (1.0, Source.STUDENT)):
        scheduler = replace(SCHEDULER, lmbda=lmbda, seq_kd=seq_kd)
        assert {scheduler.source(step, m) for step in range(500) for m in range(3)} == {only}


@pytest.mark.parametrize("lmbda", [0.1, 0.5, 0.8])
def test_lmbda_is_the_share_of_on_policy_micro_batches(lmbda: float) -> None:
    scheduler = replace(SCHEDULER, lmbda=lmbda)
    draws = [scheduler.source(step, m) is Source.STUDENT for step in range(4000) for m in range(3)]
    deviation = (lmbda * (1 - lmbda) / len(draws)) ** 0.5
    assert abs(sum(draws) / len(draws) - lmbda) < 4 * deviation
    repeated = sum(a == b for a, b in zip(draws, draws[1:])) / (len(draws) - 1)
    assert abs(repeated - (lmbda**2 + (1 - lmbda) ** 2)) < 0.03, (
        "neighbouring draws are independent"
    )


def test_seeds_draw_differently_and_a_seed_draws_the_same() -> None:
    drawn = {
        seed: tuple(replace(SCHEDULER, seed=seed).source(step, 0) for step in range(64))
        for seed in (0, 1, 2, 0x50)
    }
    assert len(set(drawn.values())) == 4
    assert hashed_uniform(3, 1, 4) == hashed_uniform(3, 1, 4) != hashed_uniform(3, 4, 1)
    assert all(0 <= hashed_uniform(-seed, seed) < 1 for seed in range(1000))


@pytest.mark.parametrize(
    "world, batch, accumulation", [(1, 12, 1), (1, 1, 12), (3, 2, 2), (4, 3, 1), (12, 1, 1)]
)
def test_another_layout_keeps_the_draws_it_is_told(
    world: int, batch: int, accumulation: int
) -> None:
    new = replace(
        SCHEDULER,
        micro_batch_size=batch,
        micro_batches=accumulation,
        world_size=world,
        draw_samples=4,
        num_samples=91,
    )
    old = replace(SCHEDULER, num_samples=91)
    assert old.draw_samples == 4
    for step in range(40):
        places = [place for micro_batch in window(old, step) for place in micro_batch]
        assert sorted(place for places in window(new, step) for place in places) == places
        drawn = [
            old.source(step, m) for m, stretch in enumerate(window(old, step)) for _ in stretch
        ]
        assert [new.source_at(step, place) for place in places] == drawn
        assert new.sources(step) == set(drawn)


# -- The order of samples


def test_an_epoch_visits_every_sample_once_and_depends_on_seed_and_epoch_alone():
    orders = {
        (seed, epoch): SampleOrder(101, seed).permutation(epoch).tolist()
        for seed in (0, 1, -5)
        for epoch in (0, 1)
    }
    assert all(sorted(order) == list(range(101)) for order in orders.values())
    assert len({tuple(order) for order in orders.values()}) == len(orders)
    assert SampleOrder(101, 1).permutation(1).tolist() == orders[1, 1]
    assert SampleOrder(0, 1).permutation(0).tolist() == []


def test_the_order_is_the_same_with_every_version_of_every_library():
    assert SampleOrder(10, 1).permutation(0).tolist() == [6, 1, 2, 8, 4, 0, 3, 7, 5, 9]


def test_every_position_gets_every_sample_equally_often():
    counts = Counter()
    for epoch in range(6000):
        counts.update(enumerate(SampleOrder(5, 3).permutation(epoch).tolist()))
    assert len(counts) == 25 and all(
        1050 < count < 1350 for count in counts.values()
    )  # 1200 +- 5 sigma


def test_draws_repeat_for_a_share_of_what_the_student_completes() -> None:
    rows = range(1000)
    none, all_, some = (
        replace(SCHEDULER, num_samples=1000, repeating_share=s) for s in (0, 1, 0.3)
    )
    ids = lambda scheduler, epoch: [  # noqa: E731
        scheduler.sample_id(epoch, row, Source.STUDENT) for row in rows
    ]
    assert ids(none, 2) == [2000 + row for row in rows]
    assert ids(all_, 2) == ids(some, 0) == list(rows)
    one, other = ids(some, 1), ids(some, 2)
    repeating = [{id for id in epoch if id < 1000} for epoch in (one, other)]
    assert all(id in (row, 1000 + row) for row, id in enumerate(one))
    assert all(250 < len(found) < 350 for found in repeating)
    assert len(repeating[0] & repeating[1]) < 150, "others in every epoch"
    for source in (Source.TEACHER, Source.DATA):
        assert all_.sample_id(2, 7, source) == 2007


@pytest.mark.parametrize(
    ("samples", "epochs"),
    [  # 8 samples are 2 micro-batches of all ranks
        (8, [1, 2]),
        (12, [1, 2]),
        (16, [0.75, 1, 1.75, 2]),
        (26, [3 / 7, 6 / 7, 1, 10 / 7]),
    ],
)
def test_an_open_epoch_counts_its_micro_batches(samples: int, epochs: list[float]) -> None:
    """As transformers does: the last window of an epoch may have fewer."""
    scheduler = replace(SCHEDULER, num_samples=samples)
    after = [scheduler.epochs_after(step + 1) for step in range(len(epochs))]
    assert after == pytest.approx(epochs)


@settings(deadline=None)
@given(samples=st.integers(1, 60), step=st.integers(0, 40), drop_last=st.booleans())
def test_samples_until_a_step_are_those_of_its_windows(samples, step, drop_last) -> None:
    scheduler = replace(SCHEDULER, num_samples=samples, drop_last=drop_last)
    seen = [place for one in range(step) for places in window(scheduler, one) for place in places]
    assert scheduler.samples_until(step) == len(seen)

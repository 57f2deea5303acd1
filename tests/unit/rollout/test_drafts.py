"""The store of drafts: what is kept comes back, for whom it is kept, in how much room, and through
a checkpoint.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from gkd_ds.records import Rollout, Sample, Source
from gkd_ds.rollout import drafts
from gkd_ds.rollout.drafts import FILE, Drafts
from gkd_ds.runtime.errors import InputError

ROWS = 5
WRITTEN = {0: [7, 8, 9], 3: [300], 4: list(range(50))}


def written(tokens: dict[int, list[int]], source: Source = Source.STUDENT) -> list[Rollout]:
    return [Rollout(row, source, [1, 2], ids, False) for row, ids in tokens.items()]


def drafts_of(store: Drafts, rows=range(ROWS), source: Source = Source.STUDENT) -> dict:
    given = store.given_to([Sample(row, [1, 2], [], source) for row in rows])
    assert [sample.sample_id for sample in given] == list(rows)
    return {sample.sample_id: sample.draft_ids for sample in given if sample.draft_ids}


@pytest.fixture
def store(tmp_path: Path) -> Drafts:
    store = Drafts(tmp_path, ROWS, 1)
    store.keep(written(WRITTEN))
    return store


def test_what_was_kept_last_comes_back(store: Drafts) -> None:
    assert drafts_of(store) == WRITTEN
    assert drafts_of(store, [4, 1]) == {4: WRITTEN[4]} and drafts_of(store, []) == {}
    store.keep(written({4: [1], 1: [2, 3]}))
    assert drafts_of(store) == WRITTEN | {4: [1], 1: [2, 3]}


def test_only_what_repeats_its_draws_has_drafts(store: Drafts) -> None:
    """Not the rows of other sources, of another epoch's draws, or of evaluations."""
    assert drafts_of(store, [0, 3], Source.TEACHER) == drafts_of(store, [ROWS, 1 << 48]) == {}
    store.keep(written({0: [5], 1: [5]}, Source.DATA) + written({ROWS: [5], 1 << 48: [5]}))
    assert drafts_of(store) == WRITTEN


def test_room_is_bounded(tmp_path: Path) -> None:
    """What is longer than a row's share is cut, and nobody else's is touched."""
    rows = 2**20 // 4 // 3
    store = Drafts(tmp_path, rows, 1)
    store.keep(written({row: [row, 1, 2, 3, 4] for row in (0, 1, 2, rows - 1)}))
    assert drafts_of(store, [0, 1, 2, 3, rows - 1]) == {
        row: [row, 1, 2] for row in (0, 1, 2, rows - 1)
    }
    assert os.fstat(store._file.fileno()).st_size <= 2**20
    assert list(tmp_path.iterdir()) == [], "a killed run leaves nothing behind"
    with pytest.raises(InputError, match="no room for one token of each of 262,145 rows"):
        Drafts(tmp_path, 2**20 // 4 + 1, 1)


def test_a_bad_disk_costs_drafts_alone(store: Drafts, tmp_path: Path, monkeypatch, caplog) -> None:
    def refuse(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as full:
        full.setattr(drafts.os, "pwrite", refuse)
        store.keep(written({0: [1, 1]}))
    assert "draft of row 0 is lost: No space left on device" in caplog.text
    write = os.pwrite
    with monkeypatch.context() as nearly_full:
        nearly_full.setattr(drafts.os, "pwrite", lambda file, raw, at: write(file, raw[:6], at))
        store.keep(written({3: [1, 2]}))
    assert drafts_of(store) == {3: [1], 4: WRITTEN[4]}
    read = os.pread
    with monkeypatch.context() as broken:
        broken.setattr(
            drafts.os, "pread", lambda file, n, at: refuse() if n == 200 else read(file, n, at)
        )
        with pytest.raises(OSError):
            store.save(tmp_path)
        assert drafts_of(store) == {3: [1]}
    assert "draft of row 4 is lost" in caplog.text


def test_a_checkpoint_holds_them(store: Drafts, tmp_path: Path) -> None:
    beats = []
    store.save(tmp_path, lambda: beats.append(1))
    assert beats and (tmp_path / FILE).stat().st_size == 4 * (ROWS + 3 + 1 + 50)
    other = Drafts(tmp_path, ROWS, 1)
    other.load(tmp_path, 301)
    assert drafts_of(other) == WRITTEN
    other.slot = 2  # as with less room
    other.load(tmp_path, 301)
    assert drafts_of(other) == {row: ids[:2] for row, ids in WRITTEN.items()}
    without = Drafts(tmp_path, ROWS, 1)
    without.load(tmp_path / "a checkpoint without drafts", 301)
    assert drafts_of(without) == {}


def test_anything_else_in_a_checkpoint_is_refused(store: Drafts, tmp_path: Path) -> None:
    store.save(tmp_path)
    with pytest.raises(InputError, match="tokens that are not in the vocabulary"):
        Drafts(tmp_path, ROWS, 1).load(tmp_path, 300)
    for rows in (ROWS - 1, ROWS + 1, 1000):
        with pytest.raises(InputError, match=f"does not hold drafts of {rows:,} rows"):
            Drafts(tmp_path, rows, 1).load(tmp_path, 301)
    content = (tmp_path / FILE).read_bytes()
    for wrong in (content[:-1], content + b"1234", b"", b"\xff" * 4 + content[4:]):
        (tmp_path / FILE).write_bytes(wrong)
        with pytest.raises(InputError, match="does not hold drafts"):
            Drafts(tmp_path, ROWS, 1).load(tmp_path, 301)

"""Files that are written durably, and folders that one run owns."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from gkd_ds.runtime import files
from gkd_ds.runtime.files import claim_folder
from tests import ROOT


@pytest.fixture
def flushed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of what was forced onto the disk, in order."""
    names, fsync = [], os.fsync

    def record(descriptor: int) -> None:
        names.append(os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", record)
    return names


def test_a_new_directory_is_flushed_with_its_parent(tmp_path: Path, flushed: list[str]) -> None:
    files.make_durably(tmp_path / "run")
    files.make_durably(tmp_path / "run")
    assert (tmp_path / "run").is_dir() and flushed == [tmp_path.name]


def test_a_link_is_replaced_and_not_followed(tmp_path: Path, flushed: list[str]) -> None:
    other, path = tmp_path / "other", tmp_path / "latest"
    other.write_text("precious")
    path.symlink_to(other)
    files.write_durably(path, "checkpoint-4\n")
    assert (path.read_text(), other.read_text()) == ("checkpoint-4\n", "precious")
    assert flushed == ["latest"]


def test_content_is_replaced_at_once(
    tmp_path: Path, flushed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b"old")
    files.replace_content(path, b"new")
    assert path.read_bytes() == b"new" and flushed == ["metrics.jsonl.tmp"]

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        files.replace_content(path, b"newest")
    assert path.read_bytes() == b"new"


def test_runs_at_the_same_time_have_files_of_their_own(tmp_path):
    """DeepSpeed names the files of all runs alike. Another call without the cache is what another
    process does.
    """
    first = claim_folder(str(tmp_path), 0)
    assert claim_folder(str(tmp_path), 0) == first, (
        "both engines of a run, and all that ask for them"
    )
    second = claim_folder.__wrapped__(str(tmp_path), 0)
    assert first != second and {Path(place).parent for place in (first, second)} == {tmp_path}
    assert claim_folder(str(tmp_path), 1) == first, "the other ranks have other names there"


def test_the_place_of_a_run_that_has_ended_is_taken_again(tmp_path):
    command = (
        f"from gkd_ds.runtime.files import claim_folder; print(claim_folder({str(tmp_path)!r}, 0))"
    )
    places = [
        subprocess.check_output([sys.executable, "-c", command], cwd=ROOT, text=True)
        for _ in range(2)
    ]
    assert places[0] == places[1] != ""

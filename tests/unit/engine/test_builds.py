"""Builds of ops: by one process at a time, and never waiting for one that was killed.

The compiler is held up by a header that is a pipe.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
from torch.utils import cpp_extension
from torch.utils.file_baton import FileBaton

from gkd_ds.engine import builds
from tests import ROOT
from tests.dist.rank_server import poll

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="builds need g++")
BUILD = """
import sys
from torch.utils import cpp_extension
from gkd_ds.engine import builds
with builds.taking_turns():
    folder = sys.argv[1]
    cpp_extension.load("op", [f"{folder}/op.cpp"], build_directory=folder, is_python_module=False)
print("built")
"""
HOLD = """
import fcntl, os, sys, time
mark, lock = sys.argv[1:]
os.open(mark, os.O_CREAT | os.O_EXCL)
if lock:
    fcntl.flock(os.open(lock, os.O_CREAT | os.O_RDWR), fcntl.LOCK_EX)
print("building", flush=True)
time.sleep(600)
"""


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """Of an op whose header is a pipe. Nothing builds there any more afterwards."""
    (tmp_path / "op.cpp").write_text('#include "value.h"\nextern "C" int op() { return VALUE; }\n')
    os.mkfifo(tmp_path / "value.h")
    yield tmp_path
    end_all(tmp_path)


def end_all(folder: Path) -> None:
    """Kill who builds in `folder`, and what that has started."""
    words = str(folder)
    everybody = [
        process
        for process in psutil.process_iter(["cmdline", "cwd"])
        if words in (process.info["cmdline"] or []) or process.info["cwd"] == words
    ]
    for process in everybody:
        process.kill()
    psutil.wait_procs(everybody, 30)


def start_build(folder: Path) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", BUILD, str(folder)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait_for_the_compiler(folder: Path) -> int:
    """The writing end of the header that it reads; while it is open, the compiler waits."""
    ends: list[int] = []

    def is_there() -> bool:
        try:
            ends.append(os.open(folder / "value.h", os.O_WRONLY | os.O_NONBLOCK))
        except OSError as error:
            assert error.errno == errno.ENXIO
        return bool(ends)

    poll(is_there, "no compiler came", 120)
    return ends[0]


@pytest.mark.skipif(shutil.which("g++") is None, reason="builds need g++")
def test_a_killed_build_is_followed_by_another_at_once(folder: Path) -> None:
    """Its mark is seconds old. What it has started and what goes on is waited for, not raced."""
    first = start_build(folder)
    header = wait_for_the_compiler(folder)
    first.kill()
    first.communicate()
    assert (folder / "lock").exists()
    second = start_build(folder)
    assert "Waiting for another process that builds" in second.stdout.readline()
    end_all(folder)
    os.close(header)
    second.communicate()
    assert (folder / "lock").exists()

    (folder / "value.h").unlink()
    (folder / "value.h").write_text("#define VALUE 7\n")
    third = start_build(folder)
    output, _ = third.communicate(timeout=120)
    assert third.returncode == 0 and output == "built\n", output


@contextmanager
def builder(mark: Path, lock: Path | None) -> Iterator[subprocess.Popen]:
    """A process that is building: torch's alone, or one of ours that holds `lock`, too."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(mark), str(lock or "")], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "building\n"
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


@pytest.fixture
def turn(tmp_path: Path) -> Iterator[tuple[threading.Thread, builds.Turn]]:
    """A thread that waits for its turn once it is started."""
    mine = builds.Turn(str(tmp_path / "lock"))
    thread = threading.Thread(target=mine.try_acquire, daemon=True)
    yield thread, mine
    mine.release()
    assert not (tmp_path / "lock").exists()


@pytest.mark.parametrize("kind", ["torch's", "ours"])
def test_a_live_build_is_waited_for_and_a_dead_one_is_not(tmp_path, turn, kind) -> None:
    thread, _ = turn
    lock = tmp_path / builds.OURS if kind == "ours" else None
    with builder(tmp_path / "lock", lock):
        thread.start()
        thread.join(1.5)
        assert thread.is_alive() and (tmp_path / "lock").exists()
    thread.join(30)
    assert not thread.is_alive()


def test_without_locks_the_age_of_the_mark_decides(tmp_path, turn, monkeypatch) -> None:
    """On such a folder the build may be another host's."""

    def no_locks(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    thread, _ = turn
    mark = tmp_path / "lock"
    mark.touch()
    thread.start()
    thread.join(1.5)
    assert thread.is_alive()
    os.utime(mark, (0, time.time() - builds.LONGEST - 60))
    thread.join(30)
    assert not thread.is_alive()


def test_torch_is_left_as_it_was() -> None:
    with builds.taking_turns():
        assert cpp_extension.FileBaton is builds.Turn
    assert cpp_extension.FileBaton is FileBaton

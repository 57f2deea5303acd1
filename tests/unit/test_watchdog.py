"""The watchdog in real processes that really hang."""

import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from gkd_ds.interrupts import STUCK
from gkd_ds.watchdog import Watchdog

PROGRAM = """
import ctypes, sys, threading, time
from gkd_ds import watchdog

watchdog.GRACE = 1.0

def score_the_teacher():
    {hang}

with watchdog.Watchdog(0.5, sys.argv[1]) as dog:
    dog.beat("score")
    score_the_teacher()
"""


def hang(how: str, run_dir: Path) -> tuple[int, str, float]:
    """(exit code, stderr, seconds) of a process that hangs like this."""
    command = [sys.executable, "-c", PROGRAM.format(hang=how), str(run_dir)]
    started = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    return done.returncode, done.stderr, time.monotonic() - started


@pytest.mark.parametrize("how", ["time.sleep(3600)", "threading.Lock().acquire(); threading.Event().wait()"])
def test_hang_is_ended_and_explained(tmp_path: Path, how: str) -> None:
    code, stderr, seconds = hang(how, tmp_path)
    assert code == STUCK == 70
    report = (tmp_path / "watchdog-rank0.txt").read_text()
    for text in (stderr, report):
        assert "rank 0" in text and "phase 'score'" in text and "in score_the_teacher" in text
    assert seconds < 30


def test_report_directory_missing(tmp_path: Path) -> None:
    code, stderr, _ = hang("time.sleep(3600)", tmp_path / "missing")
    assert code == STUCK and "in score_the_teacher" in stderr and "was not written" in stderr


def test_hang_inside_a_c_call_that_holds_the_interpreter(tmp_path: Path) -> None:
    """No thread of Python can run then; faulthandler's timer ends the process."""
    code, stderr, _ = hang("time.sleep(0.2); ctypes.PyDLL(None).sleep(3600)", tmp_path)
    assert code == 1 and "in score_the_teacher" in stderr


def test_beats_keep_it_quiet(tmp_path: Path) -> None:
    """Four seconds of work, in pieces, under a timeout of two."""
    program = PROGRAM.replace("Watchdog(0.5", "Watchdog(2.0")
    beating = "[(dog.beat('rollout'), time.sleep(0.1)) for _ in range(40)]"
    command = [sys.executable, "-c", program.format(hang=beating), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "") and not list(tmp_path.iterdir())


def test_thread_ends_with_the_block(tmp_path: Path) -> None:
    with Watchdog(600.0, tmp_path):
        assert "watchdog" in [thread.name for thread in threading.enumerate()]
    assert "watchdog" not in [thread.name for thread in threading.enumerate()]

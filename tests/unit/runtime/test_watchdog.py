"""The watchdog in real processes that really hang."""

import os
import subprocess
import sys
import threading
import time
import traceback
from pathlib import Path

import pytest

from gkd_ds.runtime.exit_codes import STUCK
from gkd_ds.runtime.watchdog import Watchdog

PROGRAM = """
import ctypes, sys, threading, time
from gkd_ds.runtime import watchdog

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


@pytest.mark.parametrize(
    "how", ["time.sleep(3600)", "threading.Lock().acquire(); threading.Event().wait()"]
)
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


def test_ranks_that_only_waited_report_as_well(tmp_path: Path) -> None:
    """Rank 1 would wait for an hour; rank 0's report makes it say at once where it is. Reports of
    old runs do not.
    """
    for rank in (0, 1):
        (tmp_path / f"watchdog-rank{rank}.txt").write_text("of an old run\n")
    wait = "print('waits', flush=True); time.sleep(3600)"
    program = PROGRAM.replace("Watchdog(0.5", "Watchdog(3600").format(hang=wait)
    command, environment = (
        [sys.executable, "-c", program, str(tmp_path)],
        {**os.environ, "RANK": "1"},
    )
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as waiting:
        assert waiting.stdout.readline() == "waits\n"
        assert hang("time.sleep(3600)", tmp_path)[0] == STUCK
        assert waiting.wait(30) == STUCK
    reports = [(tmp_path / f"watchdog-rank{rank}.txt").read_text() for rank in (0, 1)]
    assert "rank 0 on" in reports[0] and "made no progress" in reports[0]
    assert (
        "rank 1 on" in reports[1]
        and "phase 'score'" in reports[1]
        and "watchdog-rank0.txt appeared" in reports[1]
    )
    assert all("in score_the_teacher" in report for report in reports)


def test_a_report_is_not_written_through_a_link(tmp_path: Path) -> None:
    run_dir, precious = tmp_path / "run", tmp_path / "precious"
    run_dir.mkdir()
    precious.write_text("mine")
    (run_dir / "watchdog-rank0.txt").symlink_to(precious)
    code, _, _ = hang("time.sleep(3600)", run_dir)
    assert code == STUCK and precious.read_text() == "mine"
    assert "in score_the_teacher" in (run_dir / "watchdog-rank0.txt").read_text()


def test_an_error_says_in_which_phase_it_came(tmp_path: Path) -> None:
    with pytest.raises(ConnectionError) as caught, Watchdog(600.0, tmp_path) as watchdog:
        watchdog.beat("learn")
        raise ConnectionError("closed by peer")
    assert "rank 0 was in phase 'learn'" in "".join(traceback.format_exception(caught.value))


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

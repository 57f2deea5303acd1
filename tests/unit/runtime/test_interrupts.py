"""Requests to stop in one process: noted, never acted on by themselves, agreed once. Real ranks:
tests/dist.
"""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from gkd_ds.checkpoint import manifest
from gkd_ds.config.config import GKDConfig
from gkd_ds.runtime.errors import InputError
from gkd_ds.runtime.exit_codes import STOPPED
from gkd_ds.runtime.interrupts import SIGNALS, Interrupts, StopAgreed


@pytest.mark.parametrize("number", SIGNALS)
def test_signal_is_noted_and_handlers_come_back(number: signal.Signals) -> None:
    before = [signal.getsignal(each) for each in SIGNALS]
    with Interrupts() as interrupts:
        assert interrupts.agreed_reason() is None
        for _ in range(3):  # a second one changes nothing
            os.kill(os.getpid(), number)
        assert interrupts.agreed_reason() == f"{number.name} was received by rank 0"
        assert interrupts.agreed_reason() == f"{number.name} was received by rank 0"
    assert [signal.getsignal(each) for each in SIGNALS] == before
    with interrupts:
        assert interrupts.agreed_reason() is None, "the run goes on in the same process"


def test_handlers_come_back_after_an_error() -> None:
    before = [signal.getsignal(each) for each in SIGNALS]
    with pytest.raises(KeyError), Interrupts():
        raise KeyError
    assert [signal.getsignal(each) for each in SIGNALS] == before


def test_strongest_signal_is_named() -> None:
    with Interrupts() as interrupts:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGUSR1)
        assert interrupts.agreed_reason() == "SIGTERM was received by rank 0"


def test_stop_file(tmp_path: Path) -> None:
    stop_file = tmp_path / "STOP"
    stop_file.touch()
    interrupts = Interrupts(stop_file)
    assert interrupts.agreed_reason() is None, "a file from an earlier run stops nothing"
    stop_file.touch()
    assert interrupts.agreed_reason() == f"the stop file {stop_file} was found"
    assert not stop_file.exists(), "obeyed, so it must not stop the next run as well"


@pytest.mark.parametrize("what", ["data", "directory", "link"])
def test_a_stop_file_that_is_something_else_is_refused_and_stays(tmp_path: Path, what: str) -> None:
    stop_file = tmp_path / "data.jsonl"
    if what == "data":
        stop_file.write_text("rows\n")
    elif what == "directory":
        stop_file.mkdir()
    else:
        stop_file.symlink_to(tmp_path / "elsewhere")
    for refuse in (
        lambda: Interrupts(stop_file),
        GKDConfig(output_dir=str(tmp_path / "run"), stop_file=str(stop_file)).validate_files,
    ):
        with pytest.raises(InputError, match="stop_file.* is no empty file"):
            refuse()
    assert stop_file.is_symlink() or stop_file.exists()
    if what == "data":
        with pytest.raises(InputError, match="stop_file.*cannot be looked at"):
            Interrupts(stop_file / "STOP")


def test_time_budget_leaves_room_for_the_next_window() -> None:
    interrupts = Interrupts(max_runtime=1.0)
    stopped_after = None
    for window in range(10):
        time.sleep(0.3)
        if interrupts.agreed_reason():
            stopped_after = window
            break
    assert stopped_after == 2  # 0.9 s are over, and 0.3 s more would be too many
    assert "time budget of 1 s" in interrupts.agreed_reason()


def test_first_window_is_always_allowed() -> None:
    """However long the models take to load, a requeued run makes progress."""
    interrupts = Interrupts(max_runtime=60.0)
    interrupts._started -= 50.0
    assert interrupts.agreed_reason() is None


def test_a_spent_budget_does_not_abandon_a_window() -> None:
    interrupts = Interrupts(max_runtime=0.01)
    time.sleep(0.02)
    interrupts.raise_if_stop_requested(between_windows=False)
    with pytest.raises(StopAgreed, match="time budget of 0.01 s"):
        interrupts.raise_if_stop_requested()


def test_works_outside_the_main_thread(tmp_path: Path) -> None:
    reasons = []

    def run() -> None:
        with Interrupts(tmp_path / "STOP") as interrupts:
            (tmp_path / "STOP").touch()
            reasons.append(interrupts.agreed_reason())

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert reasons and "stop file" in reasons[0]


PROGRAM = """
import sys, time
from pathlib import Path
from gkd_ds.checkpoint import store
from gkd_ds.runtime.exit_codes import STOPPED
from gkd_ds.runtime.interrupts import Interrupts

run_dir = Path(sys.argv[1])

def write(directory):
    print("saving", flush=True)
    for part in range(10):
        (directory / str(part)).write_text("x" * 1000)
        time.sleep(0.05)

with Interrupts() as interrupts:
    print("ready", flush=True)
    while not interrupts.agreed_reason():
        time.sleep(0.01)
    store.save(run_dir, 1, write, {})
    sys.exit(STOPPED)
"""


def test_second_signal_does_not_tear_a_checkpoint(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    assert process.stdout.readline() == "saving\n"
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGTERM):
        time.sleep(0.03)
        process.send_signal(number)
    assert process.wait(timeout=30) == STOPPED == 75
    process.stdout.close()
    assert len(manifest.verify(tmp_path / "checkpoint-1").files) == 10

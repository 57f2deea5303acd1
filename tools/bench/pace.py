"""How a benchmarked process and the driver talk: the driver lets one update happen at a time and
gets its times back.

Each case runs in a process of its own. All processes of a comparison live at the same time,
waiting; the driver wakes them in turn, so that every side sees the same machine (run.py). What is
timed is everything between two ends of an update: data, sampling, logging and all that the trainer
does around them.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Client, Connection
from typing import Any

from deepspeed.accelerator import get_accelerator
from transformers import TrainerCallback


class Pace:
    """The worker's end. `phase` times parts of an update; `step` ends one and waits for leave to do
    the next.
    """

    def __init__(self, address: str, name: str, rank: int):
        self.connection: Connection = Client(address, family="AF_UNIX")
        self.connection.send({"name": name, "rank": rank})
        self.seconds: dict[str, float] = defaultdict(float)
        self.counted: dict[str, Any] = {}
        self.started = self.cpu = 0.0
        self.read_bytes = 0

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] += time.perf_counter() - started

    def timed(self, name: str, function):
        """`function`, timed as a phase."""

        def run(*args, **kwargs):
            with self.phase(name):
                return function(*args, **kwargs)

        return run

    def ready(self, **facts: Any) -> None:
        """Everything is loaded and checked: tell the driver and wait for the first update."""
        reset_peak()
        self.connection.send({"ready": True, "loaded_mb": resident_mb(), **facts})
        self._wait()

    def step(self) -> None:
        """An update has ended, on the accelerator too."""
        get_accelerator().synchronize()
        seconds, cpu = time.perf_counter() - self.started, time.process_time() - self.cpu
        report = {
            "seconds": seconds,
            "cpu": cpu,
            "phases": dict(self.seconds),
            "peak_mb": peak_mb(),
        }
        report |= {"read_bytes": _read_bytes() - self.read_bytes, **self.counted}
        self.connection.send(report)
        self._wait()

    def _wait(self) -> None:
        self.connection.recv()
        self.seconds.clear()
        self.read_bytes = _read_bytes()
        self.started, self.cpu = time.perf_counter(), time.process_time()


class PaceCallback(TrainerCallback):
    """Puts a trainer (transformers', TRL's or ours: the same callback) under the driver's
    control.
    """

    def __init__(self, pace: Pace, on_begin=None):
        self.pace, self.on_begin, self.update_started = pace, on_begin, 0.0

    def on_train_begin(self, args, state, control, **kwargs):
        self.pace.ready(**(self.on_begin() if self.on_begin else {}))

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.update_started = time.perf_counter()

    def on_optimizer_step(self, args, state, control, **kwargs):
        self.pace.seconds["update"] += time.perf_counter() - self.update_started

    def on_step_end(self, args, state, control, **kwargs):
        self.pace.step()


def resident_mb() -> float:
    return _status("VmRSS")


def peak_mb() -> float:
    """The most memory this process has had since `reset_peak`."""
    return _status("VmHWM")


def reset_peak() -> None:
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")


def _read_bytes() -> int:
    """Bytes that this process has read from storage, not from the page cache."""
    with open("/proc/self/io") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("read_bytes:"))


def _status(name: str) -> float:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) / 1024 for line in file if line.startswith(name + ":"))

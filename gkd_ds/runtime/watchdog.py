"""Ends a job that makes no progress, and says where each rank was.

A rank that hangs in a collective, a dead network file system or a lost GPU would hold its
allocation until the queue's limit. So every phase reports a beat, and a thread watches the time
since the last one:

    with Watchdog(config.watchdog_timeout, run_dir) as watchdog:
        watchdog.beat("rollout")

When a rank's last beat is older than the timeout, its phase and the stacks of its threads go to
stderr and to `<run_dir>/watchdog-rank<N>.txt`, and the process ends with exit code 70
(exit_codes.STUCK). The watchdogs of the other ranks see that file and do the same before a launcher
ends them: where each rank was tells which one is to blame. A beat must come at least once per
timeout on every rank, so choose a timeout longer than the longest phase.
"""

import faulthandler
import os
import socket
import sys
import threading
import time
from pathlib import Path
from typing import TextIO

from gkd_ds.runtime import ranks
from gkd_ds.runtime.exit_codes import STUCK
from gkd_ds.runtime.files import open_anew

GRACE = 10.0  # seconds for writing the report to run_dir, which may be what hangs


class Watchdog:
    """A thread that ends this process, by os._exit, when `beat` was not called for `timeout`
    seconds.

    A thread of Python can only look while nobody holds the interpreter. For a C call that holds it
    for ever, faulthandler's own timer ends the process half a timeout later, with the stacks on
    stderr and exit code 1.
    """

    def __init__(self, timeout: float, run_dir: str | Path) -> None:
        self.timeout = timeout
        self.interval = min(timeout / 10, 5.0)  # seconds between two looks
        self.report = Path(run_dir) / f"watchdog-rank{ranks.rank()}.txt"
        self._last = (time.monotonic(), "start")
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> "Watchdog":
        self.beat("start")
        self._old_reports = self._reports()  # of runs before this one
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: object
    ) -> None:
        if (
            error is not None
        ):  # of the ranks that lose their connection to one that died, this is the last word
            error.add_note(f"rank {ranks.rank()} was in phase '{self._last[1]}'")
        self._done.set()
        self._thread.join()
        faulthandler.cancel_dump_traceback_later()

    def beat(self, phase: str) -> None:
        """Note that this rank is alive and enters `phase`. Costs a microsecond; call it in loops,
        too.
        """
        self._last = (time.monotonic(), phase)

    def _watch(self) -> None:
        while not self._done.wait(self.interval):
            faulthandler.dump_traceback_later(
                self.timeout * 1.5 + GRACE, exit=True, file=sys.__stderr__
            )
            beat, phase = self._last
            silent = time.monotonic() - beat
            if silent > self.timeout:
                self._end(
                    f"made no progress for {silent:.0f} s in phase '{phase}' (watchdog_timeout "
                    f"{self.timeout:g} s)"
                )
            elif report := self._new_report():
                self._end(f"was in phase '{phase}', for {silent:.0f} s, when {report} appeared")

    def _reports(self) -> set[tuple[str, int]]:
        """Names and times of what watchdogs have written to the run's directory."""
        return {
            (path.name, path.stat().st_mtime_ns)
            for path in self.report.parent.glob("watchdog-rank*.txt")
        }

    def _new_report(self) -> str | None:
        try:
            return min((name for name, _ in self._reports() - self._old_reports), default=None)
        except (
            OSError
        ):  # one is just being written, or the file system is away; the next look will see
            return None

    def _end(self, what: str) -> None:
        host, process = socket.gethostname(), os.getpid()
        sentence = f"gkd_ds watchdog: rank {ranks.rank()} on {host} (process {process}) {what}."
        _dump(sentence, sys.__stderr__)
        others_look = 2 * self.interval  # seconds
        faulthandler.dump_traceback_later(GRACE + others_look, exit=True, file=sys.__stderr__)
        try:
            with open_anew(self.report) as file:
                _dump(sentence, file)
        except OSError as error:
            print(f"gkd_ds watchdog: {self.report} was not written: {error}", file=sys.__stderr__)
        time.sleep(
            others_look
        )  # the launcher, or a broken connection, would end them before they have reported
        os._exit(STUCK)


def _dump(sentence: str, file: TextIO) -> None:
    print(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {sentence}", file=file, flush=True)
    faulthandler.dump_traceback(file=file, all_threads=True)
    file.flush()

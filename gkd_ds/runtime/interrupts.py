"""From a signal or a stop file to one decision that all ranks share.

A scheduler's SIGTERM, a Ctrl-C or a full time budget reaches the ranks at different moments, or
only one of them. If each acted on its own, the others would wait for it in a collective. So a
signal only leaves a note, and at safe points the ranks agree whether to stop:

    with Interrupts(stop_file=run_dir / "STOP", max_runtime=config.max_runtime) as interrupts:
        try:
            for each window:
                rollout
                interrupts.raise_if_stop_requested(between_windows=False)
                score, learn, update
                interrupts.raise_if_stop_requested()
        except StopAgreed as reason:
            save, close the tracker, then ranks.barrier() and sys.exit(exit_codes.STOPPED)

A window that is abandoned between two of its phases costs nothing but time: it is a function of
(seed, step), and the run that goes on repeats it.

    touch RUN_DIR/STOP        # stops a run from any host; the file is removed when the run obeys

Which signals: SIGTERM, SIGINT and SIGUSR1, sent to any rank. A launcher that is ended counts as a
request, too: on one host `deepspeed` dies of a signal at once and tells nobody. Its second process,
`deepspeed.launcher.launch`, passes SIGTERM and SIGINT on as SIGTERM, kills what is left after 30 s,
and then exits with 1 whatever its ranks did. Where a phase takes longer than that, or the exit code
matters, use the stop file.
"""

import signal
import threading
import time
from pathlib import Path
from types import FrameType

from gkd_ds.runtime import launcher, ranks
from gkd_ds.runtime.files import check_stop_file

SIGNALS = (signal.SIGUSR1, signal.SIGINT, signal.SIGTERM)


class StopAgreed(Exception):
    """All ranks stop here; the message says why."""


class Interrupts:
    """Notes requests to stop on this rank; `agreed_reason` turns them into the decision of all
    ranks.

    Make it as early as possible: `max_runtime` (seconds) counts from here, and a stop file that is
    already there is one that an earlier run did not get to see, so rank 0 removes it; InputError,
    on all ranks, if it is more than an empty file. Handlers are installed on `with` (in the main
    thread only; elsewhere Python allows none) and the previous ones restored at its end. Leave the
    block only after a barrier: the launcher sends SIGTERM to the other ranks as soon as one has
    exited.

    Where the process itself ends with the run, set `afterwards` to signal.SIG_IGN: it is put in
    place of the previous handlers, so that one more signal cannot replace the exit code meanwhile.
    """

    afterwards: signal.Handlers | None = None

    def __init__(
        self, stop_file: str | Path | None = None, max_runtime: float | None = None
    ) -> None:
        self.stop_file = Path(stop_file) if stop_file is not None else None
        self.max_runtime = max_runtime
        self._started = time.monotonic()
        self._previous_point: float | None = None
        self._longest_gap = 0.0  # seconds between two points between windows so far
        self._received = 0  # index of the strongest signal in SIGNALS + 1
        self._reason: str | None = None
        self._handlers: dict[int, object] = {}
        if self.stop_file is not None:
            check_stop_file(self.stop_file)
            if ranks.rank() == 0:
                self.stop_file.unlink(missing_ok=True)

    def __enter__(self) -> "Interrupts":
        self._received, self._reason = (
            0,
            None,
        )  # a run that was stopped may go on in the same process
        if threading.current_thread() is threading.main_thread():
            self._handlers = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler if self.afterwards is None else self.afterwards)
        self._handlers = {}

    def _note(self, number: int, frame: FrameType | None) -> None:
        """The handler. It must never raise, however often it is called: a save may be under way."""
        self._received = max(self._received, 1 + SIGNALS.index(number))

    def raise_if_stop_requested(self, between_windows: bool = True) -> None:
        """Raise StopAgreed, on all ranks, when `agreed_reason` has one."""
        if reason := self.agreed_reason(between_windows):
            raise StopAgreed(reason)

    def agreed_reason(self, between_windows: bool = True) -> str | None:
        """Why all ranks stop now, or None. A collective (one all-reduce of one integer) for safe
        points.

        Once there is a reason it stays, and no more collectives are made. The time budget only
        counts between windows: a run that begins with its budget spent must still get a window
        done.
        """
        if self._reason is None:
            world = ranks.world_size()
            strongest = ranks.all_reduce_max(
                [self._request(between_windows) * world + ranks.rank() % world]
            )[0]
            request, rank = divmod(strongest, world)
            self._reason = self._sentence(request, rank)
            if self._reason and ranks.rank() == 0 and self.stop_file is not None:
                self.stop_file.unlink(missing_ok=True)
        return self._reason

    def _request(self, between_windows: bool) -> int:
        """0 nothing, 1 stop file, 2 time budget, 3 launcher gone, 4 on: signals. Rank 0 watches
        file and clock.
        """
        if self._received:
            return 3 + self._received
        if launcher.is_gone():
            return 3
        if ranks.rank() != 0:
            return 0
        if between_windows and self._budget_is_spent():
            return 2
        return 1 if self.stop_file is not None and self.stop_file.exists() else 0

    def _budget_is_spent(self) -> bool:
        """Whether it would run out in the middle of the next window."""
        now = time.monotonic()
        if self._previous_point is not None:
            self._longest_gap = max(self._longest_gap, now - self._previous_point)
        self._previous_point = now
        return (
            self.max_runtime is not None
            and now - self._started + self._longest_gap >= self.max_runtime
        )

    def _sentence(self, request: int, rank: int) -> str | None:
        if request == 0:
            return None
        if request == 1:
            return f"the stop file {self.stop_file} was found"
        if request == 2:
            return f"the time budget of {self.max_runtime:g} s does not allow another window"
        if request == 3:
            return f"the deepspeed launcher that started rank {rank} was ended"
        return f"{signal.Signals(SIGNALS[request - 4]).name} was received by rank {rank}"

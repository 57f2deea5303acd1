"""Real gloo ranks in milliseconds: processes forked from one that has imported torch but computed
nothing.

    PYTHONPATH=. python -m tests.dist.forked      # shows that two ranks add up

Use it from a fresh process, never from pytest's own: torch must not have started threads before the
fork.
"""

import os
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path

import torch.distributed as dist

from gkd_ds.runtime import faults, ranks

HUNG = -signal.SIGALRM


def run(world: int, work: Callable[[], None], fault: str = "", limit: int = 30) -> list[int]:
    """Run `work` on `world` ranks with GKD_FAULT=`fault`; return the exit codes, negative for
    signals.

    0 means that `work` returned, 1 that it raised (the traceback is on stderr), HUNG that it took
    more than `limit` seconds.
    """
    with tempfile.TemporaryDirectory() as meeting_place:
        children = []
        for rank in range(world):
            child = os.fork()
            if child == 0:
                _be_rank(rank, world, Path(meeting_place), work, fault, limit)
            children.append(child)
        return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def _be_rank(
    rank: int, world: int, meeting_place: Path, work: Callable[[], None], fault: str, limit: int
) -> None:
    code = 1
    try:
        signal.alarm(limit)
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world))
        faults.arm(fault)
        dist.init_process_group(
            "gloo", init_method=f"file://{meeting_place}/store", rank=rank, world_size=world
        )
        work()
        code = 0
    except SystemExit as request:
        code = request.code if isinstance(request.code, int) else 1
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _show() -> None:
    print(f"rank {ranks.rank()}: {ranks.gather(ranks.rank() + 1)}", flush=True)


if __name__ == "__main__":
    print(run(2, _show))

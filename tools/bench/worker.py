"""One benchmarked process: `python -m tools.bench.worker SOCKET NAME`, with the case as JSON on
standard input.

Started by run.py only, which says on which accelerator (DS_ACCELERATOR). Standard output and error belong to the libraries (they end up in a log
file).
"""

from __future__ import annotations

import os
import sys

import deepspeed
import torch

from tools.bench.case import Case
from tools.bench.pace import Pace

# DeepSpeed would compile its shared-memory communication op for three minutes; gloo does without
# it.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def main() -> None:
    address, name = sys.argv[1:]
    case = Case.from_json(sys.stdin.read())
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    pace = Pace(address, name, case.rank)
    SIDES[case.side](case, pace)
    raise SystemExit("the case ran out of updates before the driver was done")


def _ours(case: Case, pace: Pace) -> None:
    from tools.bench import ours  # late: a process imports its own side only

    ours.run(case, pace)


def _peer(name: str):
    def run(case: Case, pace: Pace) -> None:
        from tools.bench import peers

        getattr(peers, name)(case, pace)

    return run


def _part(name: str):
    def run(case: Case, pace: Pace) -> None:
        from tools.bench import parts

        getattr(parts, name)(case, pace)

    return run


PARTS = (
    "matmul",
    "generate",
    "bandwidth_cpu",
    "bandwidth_nvme",
    "loss_ours",
    "loss_dense",
    "loss_chunked",
)
SIDES = {
    "ours": _ours,
    **{name: _peer(name) for name in ("trl_gkd", "trl_distillation", "deepspeed_rollout")},
    **{name: _part(name) for name in PARTS},
}

if __name__ == "__main__":
    main()

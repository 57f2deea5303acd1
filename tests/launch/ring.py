"""The outside of a training run without a model, to test launching: all-reduces until its steps are
done.

    deepspeed --num_accelerators 2 --module tests.launch.ring --output_dir DIR --steps 3

It behaves as gkd_ds.train promises: stops at DIR/STOP with exit code 75, goes on from where it
stopped, and leaves DIR/FINISHED. Each rank writes what it was started with to DIR/rank-N.json.
"""

import argparse
import json
import os
import socket
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist


def main() -> int:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    for name in (
        "config",
        "run_name",
        "resume_from_checkpoint",
        "local_rank",
        "lmbda",
        "beta",
        "stop_file",
    ):
        parser.add_argument(f"--{name}")
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=0.1, help="of each step")
    parser.add_argument(
        "--stuck_at", type=int, help="the first start hangs after this step, and STOP does not help"
    )
    args = parser.parse_args()
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    args.output_dir.mkdir(parents=True, exist_ok=True)
    facts = {
        "host": socket.gethostname(),
        "world": world,
        "environ": dict(os.environ),
        "argv": sys.argv,
    }
    (args.output_dir / f"rank-{rank}.json").write_text(json.dumps(facts))
    done = args.output_dir / "steps.txt"
    step = len(done.read_text().splitlines()) if done.exists() else 0
    stuck_at = args.stuck_at if step == 0 else None
    dist.barrier()
    stopped = torch.zeros(1)
    while step < args.steps and not stopped.item():
        if step == stuck_at:
            time.sleep(3600)
        step += 1
        time.sleep(args.seconds)
        total = torch.ones(1)
        dist.all_reduce(total)
        assert total.item() == world
        if rank == 0:
            with open(done, "a") as file:
                file.write(f"{step}\n")
            stopped[0] = stuck_at is None and (args.output_dir / "STOP").exists()
        dist.broadcast(stopped, 0)
    if rank == 0 and step >= args.steps:
        (args.output_dir / "FINISHED").touch()
    elif rank == 0:
        print(f"stopped after update {step}: the stop file was found", flush=True)
    dist.barrier()
    return 0 if step >= args.steps else 75


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    os._exit(code)  # as gkd_ds.train leaves: gloo's threads must not see the interpreter go

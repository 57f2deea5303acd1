"""Which `aio` settings read a drive fastest: a table, and the block for a file of ds_configs.

    python tools/aio_tune.py --dir /local/nvme        # a minute

Reads are made as an offloaded teacher makes them: DeepSpeed's own reader fetches the matrices of a
layer, one file each, past the page cache into pinned memory, and waits for all of them.
(DeepSpeed's `ds_nvme_tune` starts a process for every measurement and prints keys that its
configuration does not know.) Needs libaio-dev and a C++ compiler.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch

MATRICES = 7  # of a Llama or Qwen layer
# A setting within this share of the fastest is as good: repeated runs differ by more.
AS_GOOD = 0.05


@dataclass
class Setting:
    """One `aio` block, and the GB/s of every time it was measured."""

    intra_op_parallelism: int
    queue_depth: int
    block_size: int
    single_submit: bool = False
    overlap_events: bool = True
    read: list[float] = field(default_factory=list)
    write: list[float] = field(default_factory=list)

    def block(self) -> dict:
        """The `aio` block of a DeepSpeed file."""
        names = (
            "block_size",
            "queue_depth",
            "intra_op_parallelism",
            "single_submit",
            "overlap_events",
        )
        return {name: getattr(self, name) for name in names}

    def measure(self, aio_handle, buffers: list[torch.Tensor], files: list[str]) -> None:
        """Write, then read all files once; `aio_handle` is DeepSpeed's class."""
        handle = aio_handle(**self.block())
        for speeds, start in ((self.write, handle.async_pwrite), (self.read, handle.async_pread)):
            began = time.perf_counter()
            for buffer, file in zip(buffers, files):
                start(buffer, file, 0)
            if handle.wait() != len(files):
                raise OSError("DeepSpeed's reader lost a request")
            speeds.append(
                sum(buffer.nbytes for buffer in buffers) / (time.perf_counter() - began) / 1e9
            )


def grid() -> list[Setting]:
    """Threads, depth and block in every combination, cheapest first; then the two flags."""
    sizes = itertools.product((1, 2, 4), (8, 32, 128), (256 << 10, 1 << 20))
    settings = [Setting(*size) for size in sizes]
    other_flags = ((False, False), (True, False), (True, True))
    return settings + [Setting(2, 32, 1 << 20, single, overlap) for single, overlap in other_flags]


def best(settings: list[Setting]) -> Setting:
    """The cheapest setting (fewest threads, then the shallowest queue) whose reads are as good as
    the fastest.
    """
    fastest = max(statistics.median(setting.read) for setting in settings)
    good = [
        setting
        for setting in settings
        if statistics.median(setting.read) >= (1 - AS_GOOD) * fastest
    ]
    return min(
        good,
        key=lambda setting: (
            setting.intra_op_parallelism,
            setting.queue_depth,
            -setting.block_size,
        ),
    )


def table(settings: list[Setting]) -> str:
    """One line a setting, fastest reads first."""
    lines = ["threads  depth  block KiB  single  overlap  read GB/s (quartiles)  write GB/s"]
    for s in sorted(settings, key=lambda setting: -statistics.median(setting.read)):
        low, middle, high = statistics.quantiles(s.read, n=4)
        lines.append(
            f"{s.intra_op_parallelism:7}{s.queue_depth:7}{s.block_size >> 10:11}{str(s.single_submit).lower():>8}"
            f"{str(s.overlap_events).lower():>9}{middle:11.2f} "
            f"({low:.2f}-{high:.2f}){statistics.median(s.write):12.2f}"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dir", type=Path, required=True, help="a directory on the drive")
    parser.add_argument(
        "--file_mb", type=int, default=16, help="MiB of a file: a rank's shard of a matrix"
    )
    parser.add_argument(
        "--repeats", type=int, default=7, help="times each setting is measured, in a shuffled order"
    )
    args = parser.parse_args()
    if not args.dir.is_dir():
        sys.exit(f"--dir {args.dir} is not a directory; make it, on the drive to be measured.")

    from deepspeed.ops.op_builder import AsyncIOBuilder

    from gkd_ds.engine import builds

    if not AsyncIOBuilder().is_compatible(verbose=False):
        sys.exit(
            "DeepSpeed cannot build its asynchronous reader here: apt-get install libaio-dev g++."
        )
    aio_handle = builds.load(AsyncIOBuilder()).aio_handle
    pinner = aio_handle()  # owns the pinned memory, and must outlive it
    element = torch.empty(0, dtype=torch.uint8)
    buffers = [pinner.new_cpu_locked_tensor(args.file_mb << 20, element) for _ in range(MATRICES)]
    settings = grid()
    with tempfile.TemporaryDirectory(dir=args.dir) as directory:
        files = [f"{directory}/{index}.swp" for index in range(MATRICES)]
        for _ in range(args.repeats + 1):  # the first time makes the files
            for setting in random.sample(settings, len(settings)):
                setting.measure(aio_handle, buffers, files)
    for setting in settings:
        del setting.read[0], setting.write[0]
    print(
        f"{MATRICES} files of {args.file_mb} MiB in {args.dir}, {args.repeats} times each, medians"
    )
    print(table(settings))
    print(f"\nthe cheapest within {AS_GOOD:.0%} of the fastest reads:")
    print(json.dumps({"aio": best(settings).block()}, indent=2))


if __name__ == "__main__":
    main()

"""Run the benchmark: the same distillation through gkd_ds and through its peers, side by side.

    bash tools/bench/run.sh                                      # everything: results.json, results.md, results.png
    python -m tools.bench.run --quick                            # a smoke run of everything, in a few minutes
    python -m tools.bench.run --groups fixed/8192 zero3/8192     # some of it

README.md beside this file says what is compared and how. Run it from the project's root, on a quiet
machine.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection, Listener, wait
from pathlib import Path
from typing import Any

from tools.bench.case import Case
from tools.bench.groups import ALLOCATOR, Group, all_groups
from tools.bench.parity import TOLERANCE, largest_difference
from tools.bench.report import machine, write_reports
from tools.bench.workload import make_models

STARTUP_SECONDS = 1800  # a shared machine can be slow


class Side:
    """One side of a comparison: a process per rank, waiting to be told to do an update."""

    def __init__(self, name: str, case: Case, threads: int, allocator: bool, place: Path):
        self.name, self.case, self.log = name, case, place / "log.txt"
        place.mkdir(parents=True)
        self.address = str(place / "socket")
        self.listener = Listener(self.address, family="AF_UNIX")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        self.processes = []
        for rank in range(case.world_size):
            environment = dict(os.environ, OMP_NUM_THREADS=str(threads), HF_HUB_OFFLINE="1")
            environment |= {"TOKENIZERS_PARALLELISM": "false", "TRL_EXPERIMENTAL_SILENCE": "1"}
            environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            if (
                case.world_size > 1
            ):  # alone, a rank would make TRL wrap its model for data parallelism
                environment |= {
                    "RANK": str(rank),
                    "LOCAL_RANK": str(rank),
                    "WORLD_SIZE": str(case.world_size),
                }
            if allocator:
                environment["GLIBC_TUNABLES"] = ALLOCATOR
            process = subprocess.Popen(
                [sys.executable, "-m", "tools.bench.worker", self.address, name],
                stdin=subprocess.PIPE,
                stdout=self.log.open("ab"),
                stderr=subprocess.STDOUT,
                env=environment,
            )
            process.stdin.write(dataclasses.replace(case, rank=rank).to_json().encode())
            process.stdin.close()
            self.processes.append(process)
        self.connections: list[Connection] = []
        self.facts: dict[str, Any] = {}
        self.reports: list[dict[str, Any]] = []

    def wait_until_ready(self) -> None:
        """Until every rank has loaded its models and been through the parity batch."""
        self.listener._listener._socket.settimeout(5)
        deadline = time.monotonic() + STARTUP_SECONDS
        by_rank: dict[int, Connection] = {}
        while len(by_rank) < self.case.world_size:
            try:
                connection = self.listener.accept()
            except TimeoutError:
                self._check(deadline)
                continue
            by_rank[connection.recv()["rank"]] = connection
        self.connections = [by_rank[rank] for rank in sorted(by_rank)]
        self.facts = self._receive(deadline)[0]

    def update(self) -> dict[str, Any]:
        """One update of all ranks: rank 0's report; times and peaks are the slowest's and the
        largest rank's.
        """
        for connection in self.connections:
            connection.send("go")
        reports = self._receive(time.monotonic() + STARTUP_SECONDS)
        merged = dict(reports[0])
        for name in ("seconds", "peak_mb"):
            merged[name] = max(report[name] for report in reports)
        merged["cpu"] = sum(report["cpu"] for report in reports)
        return merged

    def end(self) -> None:
        """The trainers would now save models; nothing of that is wanted."""
        self.listener.close()
        for process in self.processes:
            process.kill()
            process.wait()

    def _receive(self, deadline: float) -> list[dict[str, Any]]:
        received: dict[int, dict[str, Any]] = {}
        while len(received) < len(self.connections):
            for connection in wait(self.connections, timeout=5):
                rank = self.connections.index(connection)
                try:
                    received[rank] = connection.recv()
                except (EOFError, ConnectionResetError):
                    self._fail("ended")
            self._check(deadline)
        return [received[rank] for rank in sorted(received)]

    def _check(self, deadline: float) -> None:
        if any(process.poll() is not None for process in self.processes):
            self._fail("ended")
        if time.monotonic() > deadline:
            self._fail("does not answer")

    def _fail(self, what: str) -> None:
        raise SystemExit(f"{self.name} {what}; the end of its log:\n{self.log.read_text()[-6000:]}")


@dataclass
class Settings:
    warmup: int
    runs: int
    threads: int
    work_dir: Path


def run_group(group: Group, settings: Settings) -> dict[str, Any]:
    """All sides of a group, gated by parity, then timed in alternating order."""
    print(f"== {group.name}", flush=True)
    models = settings.work_dir / f"models-{group.workload.vocabulary}"
    make_models(models, group.workload.vocabulary)
    place = settings.work_dir / group.name.replace("/", "-")
    sides: dict[str, Side] = {}
    warmup, runs = (1, 1) if settings.runs == 1 else (settings.warmup, group.runs or settings.runs)
    try:
        for name, given in group.sides.items():
            here = place / name
            gated = group.gated and name not in group.parts
            case = dataclasses.replace(
                given,
                models=models,
                output_dir=here / "output",
                parity_file=here / "gradients.pt" if gated else None,
                windows=warmup + runs + 1,
            )
            sides[name] = Side(
                name, case, settings.threads // case.world_size, group.allocator, here
            )
            if len(sides) % 2 == 0:  # the imports of two at a time fill two cores
                sides[name].wait_until_ready()
        for side in sides.values():
            if not side.facts:
                side.wait_until_ready()
        parity = check_parity(group, sides)
        for number in range(warmup + runs):
            order = list(sides.values())
            for side in order if number % 2 == 0 else order[::-1]:
                report = side.update()
                if number >= warmup:
                    side.reports.append(report)
                print(f"   {number:2d} {side.name:28s} {report['seconds']:8.3f} s", flush=True)
    finally:
        for side in sides.values():
            side.end()
    return {
        "workload": dataclasses.asdict(group.workload),
        "world_size": group.world_size,
        "allocator": group.allocator,
        "parity": parity,
        "sides": {
            name: {"loaded_mb": side.facts["loaded_mb"], "runs": side.reports}
            for name, side in sides.items()
        },
    }


def check_parity(group: Group, sides: dict[str, Side]) -> dict[str, Any]:
    """Compare every gated side with the group's first. Ends the run where one disagrees: nothing is
    timed then.
    """
    gated = {name: side for name, side in sides.items() if side.case.parity_file}
    if not gated:
        return {}
    reference_name, reference = next(iter(gated.items()))
    result = {}
    for name, side in gated.items():
        loss = abs(side.facts["parity"] - reference.facts["parity"]) / abs(
            reference.facts["parity"]
        )
        gradient, worst = largest_difference(side.case.parity_file, reference.case.parity_file)
        result[name] = {
            "loss": side.facts["parity"],
            "loss_difference": loss,
            "gradient_difference": gradient,
        }
        print(
            f"   parity {name:28s} loss {loss:.1e}  gradients {gradient:.1e} ({worst})", flush=True
        )
        if not max(loss, gradient) <= TOLERANCE:
            raise SystemExit(
                f"{name} and {reference_name} disagree on identical tokens: loss by {loss:.2e}, "
                f"gradient of {worst} by "
                f"{gradient:.2e}; nothing is timed."
            )
    return result


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="tiny vocabularies and one run each: does everything work?",
    )
    parser.add_argument(
        "--groups", nargs="+", help="names, or the beginnings of names, of what to run"
    )
    parser.add_argument("--runs", type=int, default=5, help="timed updates per side (default 5)")
    parser.add_argument(
        "--threads", type=int, default=2, help="threads of all ranks of a side together (default 2)"
    )
    parser.add_argument(
        "--output", type=Path, default=Path(__file__).parent, help="where results.* are written"
    )
    parser.add_argument(
        "--list", action="store_true", help="print the names of the groups and stop"
    )
    arguments = parser.parse_args()
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # tables and floors are of one
    with tempfile.TemporaryDirectory(prefix="bench-") as temporary:
        groups = all_groups(Path(temporary), arguments.quick)
        if arguments.groups:
            groups = [group for group in groups if group.name.startswith(tuple(arguments.groups))]
        if arguments.list or not groups:
            print("\n".join(group.name for group in all_groups(Path(temporary), arguments.quick)))
            return
        settings = Settings(
            1, 1 if arguments.quick else arguments.runs, arguments.threads, Path(temporary)
        )
        results: dict[str, Any] = {
            "machine": machine(arguments.threads),
            "quick": arguments.quick,
            "groups": {},
        }
        started = time.monotonic()
        arguments.output.mkdir(parents=True, exist_ok=True)
        file = arguments.output / "results.json"
        for group in groups:
            results["groups"][group.name] = run_group(group, settings)
            results["minutes"] = (time.monotonic() - started) / 60
            file.write_text(json.dumps(results, indent=1) + "\n")
    write_reports(file)


if __name__ == "__main__":
    main()

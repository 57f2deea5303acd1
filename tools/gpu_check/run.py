"""The driver of tools/gpu_check.sh: every check in turn, one JSON, one table.

Each check has a process and a session of its own (one.py) and a time limit, at which all of them
are ended, so that one that fails or hangs leaves the others alone. On a device they run one at a
time, since they measure. On the CPU accelerator nothing that is measured means anything, and as
many run at a time as there are cores.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from tools.gpu_check.checks import CHECKS, Check
from tools.gpu_check.outcome import FAILED, SKIPPED, Outcome
from tools.gpu_check.table import markdown

LEAST_SECONDS = 10  # no check is begun for less
LOG_CHARACTERS = 4000
RUNNING: set[subprocess.Popen] = set()


def main() -> int:
    """Exit code 0: nothing failed; 1: something did; 2: wrongly called."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    arguments = parse_arguments()
    started = time.monotonic()
    # Late, since it takes seconds that a wrong call need not wait for.
    from tools.gpu_check.machine import is_cpu, machine

    report: dict[str, Any] = {"machine": machine()}
    checks = [check for check in CHECKS if check.name in (arguments.only or check.name)]
    arguments.output.mkdir(parents=True, exist_ok=True)
    deadline = started + 60 * arguments.minutes - arguments.already
    with tempfile.TemporaryDirectory(prefix="gpu-check-") as temporary:
        run = partial(run_check, place=Path(temporary), deadline=deadline, on_cpu=is_cpu())
        report["checks"] = []
        pool = ThreadPoolExecutor((os.cpu_count() or 1) if is_cpu() else 1)
        try:
            for entry in pool.map(run, checks):
                report["checks"].append(entry)
                report["seconds"] = time.monotonic() - started
                print(f"{entry['outcome']:8s}{entry['name']}: {entry['sentence']}", flush=True)
                write(report, arguments.output)  # what is known so far, should this be cut short
        finally:  # also when it is interrupted: nothing of it goes on
            pool.shutdown(wait=False, cancel_futures=True)
            for process in RUNNING.copy():
                end_session(process)
            pool.shutdown()
    print(f"{report['seconds']:.0f} s; {arguments.output}/gpu_check.json and gpu_check.md")
    return int(any(entry["outcome"] == FAILED for entry in report["checks"]))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="tools/gpu_check.sh", description="Check on one device what no CPU can."
    )
    parser.add_argument(
        "--output", type=Path, default=Path("runs/gpu_check"), help="where the two files go"
    )
    parser.add_argument("--minutes", type=float, default=9.0, help="the most that all of it takes")
    # Seconds that the script has spent on an environment.
    parser.add_argument("--already", type=float, default=0.0, help=argparse.SUPPRESS)
    parser.add_argument(
        "--only",
        nargs="+",
        metavar="CHECK",
        choices=[check.name for check in CHECKS],
        help=", ".join(check.name for check in CHECKS),
    )
    return parser.parse_args()


def run_check(check: Check, place: Path, deadline: float, on_cpu: bool) -> dict[str, Any]:
    """One check's entry in the report."""
    started = time.monotonic()
    left = deadline - started
    limit = left if on_cpu else min(check.seconds, left)  # a CPU may be busy with other work
    log = place / f"{check.name}.txt"
    if on_cpu and check.not_on_cpu:
        outcome = Outcome(SKIPPED, check.not_on_cpu)
    elif left < min(check.seconds, LEAST_SECONDS):
        outcome = Outcome(SKIPPED, "the time was over before its turn; give it more --minutes")
    else:
        outcome = in_its_own_process(check, place / check.name, log, limit)
    entry = {"name": check.name, "about": check.about, **dataclasses.asdict(outcome)}
    entry["seconds"] = time.monotonic() - started
    if outcome.outcome == FAILED and log.exists():
        entry["log"] = log.read_text(errors="replace")[-LOG_CHARACTERS:]
    return entry


def in_its_own_process(check: Check, directory: Path, log: Path, limit: float) -> Outcome:
    """What the check says of itself, or what became of it."""
    directory.mkdir()
    with log.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "tools.gpu_check.one", check.name, str(directory)],
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        RUNNING.add(process)
        try:
            code = process.wait(limit)
            became = f"its process ended with {code} and without an answer"
        except subprocess.TimeoutExpired:
            became = f"it had not answered after {limit:.0f} s"
        finally:
            RUNNING.discard(process)
            end_session(process)
    answer = directory / "outcome.json"
    if answer.exists():
        return Outcome(**json.loads(answer.read_text()))
    return Outcome(FAILED, became)


def end_session(process: subprocess.Popen) -> None:
    """End the check and whatever it has started."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass  # all of it is gone
    process.wait()


def write(report: dict[str, Any], output: Path) -> None:
    (output / "gpu_check.json").write_text(json.dumps(report, indent=1) + "\n")
    (output / "gpu_check.md").write_text(markdown(report))


if __name__ == "__main__":
    sys.exit(main())

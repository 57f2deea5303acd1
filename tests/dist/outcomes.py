"""Launches tests/dist/worker.py, and hands out what its scenarios returned."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from tests import ROOT

PATIENCE = 1500  # seconds; two free cores need a tenth of it
ON_ONE_RANK = ("seed_example", "rollouts", "own_metrics", "blocked_imports")


class Results:
    """The scenarios' outcomes: `results["update"]` is the list of what the ranks returned."""

    def __init__(self, directory: Path, world: int, log: str):
        self.directory, self.world, self.log = directory, world, log

    def __getitem__(self, scenario: str) -> list[dict]:
        return [
            self._read(self.directory / f"{scenario}.{rank}.json") for rank in range(self.world)
        ]

    def _read(self, path: Path) -> dict:
        assert path.exists(), (
            f"{path.stem} did not end; the last lines of the launch:\n{self.log[-1500:]}"
        )
        outcome = json.loads(path.read_text())
        assert "error" not in outcome, f"{path.stem}:\n{outcome['error']}"
        return outcome["result"]


def _launch(
    command: Sequence[str], directory: Path, materials: Path, world: int, scenarios: Sequence[str]
) -> Results:
    environment = {
        **os.environ,
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "WANDB_MODE": "offline",
        "WANDB_SILENT": "true",
        "HF_HUB_OFFLINE": "1",
    }
    log = directory / "log.txt"
    with (
        log.open("w") as file,
        subprocess.Popen(
            [*command, str(materials), str(directory), *scenarios],
            cwd=ROOT,
            env=environment,
            stdout=file,
            stderr=subprocess.STDOUT,
        ) as process,
    ):
        try:
            process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            process.terminate()  # the launcher ends its ranks
    return Results(directory, world, log.read_text())


def on_two_ranks(materials: Path, directory: Path) -> Results:
    """Every scenario, under the `deepspeed` launcher."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    command = [
        "deepspeed",
        "--num_accelerators",
        "2",
        "--master_port",
        port,
        "--module",
        "tests.dist.worker",
    ]
    return _launch(command, directory, materials, world=2, scenarios=[])


def on_one_rank(materials: Path, directory: Path) -> Results:
    """Those scenarios that two ranks are compared with, in a plain process without launcher."""
    return _launch(
        [sys.executable, "-m", "tests.dist.worker"],
        directory,
        materials,
        world=1,
        scenarios=ON_ONE_RANK,
    )


def losses(rows: list[dict]) -> list[float]:
    return [row["loss"] for row in rows if "loss" in row]


def everybody_s_rollouts(ranks: list[dict], name: str) -> list[dict]:
    return [rollout for rank in ranks for rollout in rank[name]["rollouts"]]

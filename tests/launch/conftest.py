"""Fixtures: two hosts, and Slurm on them, started once for all tests of this folder."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from tests import ROOT
from tests.launch.hosts import missing, two_hosts
from tests.launch.slurm_cluster import slurm_cluster


def environment() -> dict[str, str]:
    """What every command on the hosts gets: this Python first, CPU, one thread, nothing from the
    network.
    """
    return {
        "PATH": f"{Path(sys.executable).parent}:/usr/local/bin:/usr/local/sbin:/usr/bin:/usr/sbin:/bin:/sbin",
        "PYTHONPATH": str(ROOT),
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "WANDB_MODE": "offline",
        "TOKENIZERS_PARALLELISM": "false",
    }


@pytest.fixture(scope="session")
def hosts(tmp_path_factory: pytest.TempPathFactory):
    skip_unless_possible()
    with two_hosts(tmp_path_factory.mktemp("hosts")) as pair:
        for host in pair:
            host.environment.update(environment())
        yield pair


@pytest.fixture(scope="session")
def cluster(hosts):
    skip_unless_possible("slurmctld", "slurmd", "munged")
    with slurm_cluster(hosts) as running:
        yield running


@pytest.fixture(autouse=True)
def in_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands are documented for the project's root, and run there."""
    monkeypatch.chdir(ROOT)


def skip_unless_possible(*commands: str) -> None:
    problems = missing(*commands)
    if problems:
        pytest.skip("real hosts and Slurm: " + "; ".join(problems))


def log_tails(directory: Path, lines: int = 30) -> str:
    """The ends of all log files under a directory, for assertion messages."""
    tails = []
    for path in sorted(directory.rglob("*.log")):
        text = path.read_text(errors="replace").splitlines()[-lines:]
        tails.append(f"==> {os.path.relpath(path, directory)}\n" + "\n".join(text))
    return "\n".join(tails)

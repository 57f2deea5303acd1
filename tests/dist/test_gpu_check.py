"""tools/gpu_check.sh runs to its end on the CPU accelerator, and says what it skipped there and why."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests import ROOT
from tests.dist.rank_server import environment
from tools.gpu_check.checks import CHECKS

SCRIPT = ROOT / "tools" / "gpu_check.sh"
# What needs no device runs for real.
RUN = {"against_cpu", "collectives", "bench_fixed", "bench_ragged", "hybrid_native"}
EITHER = {"fp16"}  # some CPUs have it


def gpu_check(*arguments: str | Path, timeout: float = 590) -> subprocess.CompletedProcess:
    return subprocess.run(
        ["bash", SCRIPT, *map(str, arguments)],
        env={**environment(), "PYTHON": sys.executable},
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def test_it_runs_to_the_end_on_the_cpu(tmp_path: Path) -> None:
    done = gpu_check("--output", tmp_path)
    report = json.loads((tmp_path / "gpu_check.json").read_text())
    failed = [entry for entry in report["checks"] if entry["outcome"] == "failed"]
    assert done.returncode == 0 and not failed, (done.stderr, failed)
    assert report["machine"]["accelerator"] == "cpu"
    assert [entry["name"] for entry in report["checks"]] == [check.name for check in CHECKS]
    outcomes = {entry["name"]: entry["outcome"] for entry in report["checks"]}
    assert {name for name, outcome in outcomes.items() if outcome == "passed"} - EITHER == RUN
    assert all(entry["sentence"] for entry in report["checks"])
    found = {entry["name"]: entry["numbers"] for entry in report["checks"]}
    for numbers in found["against_cpu"].values():  # the CPU beside itself
        assert numbers["loss_difference"] == 0 and numbers["gaps"] == []
        assert numbers["tokens_equal"] == numbers["tokens_compared"] > 100
    for group in ("bench_fixed", "bench_ragged"):
        assert found[group]["seconds"]["gkd_ds"] > 0
    table = (tmp_path / "gpu_check.md").read_text()
    assert all(f"| {check.name}: " in table for check in CHECKS)


def test_what_is_missing_comes_from_a_folder_of_wheels(tmp_path: Path, monkeypatch) -> None:
    """Here nothing is missing: an environment is made beside the one that has all of it, and goes."""
    wheels, temporary = tmp_path / "wheels", tmp_path / "tmp"
    wheels.mkdir()
    temporary.mkdir()
    monkeypatch.setenv("TMPDIR", str(temporary))
    done = gpu_check("--wheels", wheels, "--output", tmp_path, "--only", "cuda_graph")
    assert done.returncode == 0, done.stderr
    (entry,) = json.loads((tmp_path / "gpu_check.json").read_text())["checks"]
    assert (entry["name"], entry["outcome"]) == ("cuda_graph", "skipped")
    assert not list(temporary.iterdir())


def test_a_wrong_call_says_what_to_change(tmp_path: Path) -> None:
    for arguments, sentence in (
        (["--wheels", tmp_path / "none"], "there is no folder"),
        (["--only", "everything"], "invalid choice: 'everything'"),
    ):
        done = gpu_check(*arguments)
        assert done.returncode == 2 and sentence in done.stderr


def test_the_script_is_clean() -> None:
    if not shutil.which("shellcheck"):
        pytest.skip("shellcheck is missing: apt-get install shellcheck")
    found = subprocess.run(["shellcheck", "-x", SCRIPT], capture_output=True, text=True)
    assert found.returncode == 0, found.stdout

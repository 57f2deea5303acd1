"""The planner's bytes, passes and gathers against those of real engines, in six configurations;
nine with NVMe.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import ROOT
from tests.dist.plan_cases import CASES, NVME_CASES

SETTINGS = {
    "DS_ACCELERATOR": "cpu",
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": str(ROOT),
    "HF_HUB_OFFLINE": "1",
}
TENTH = 0.1
NO_LIBAIO = pytest.mark.skipif(
    not Path("/usr/include/libaio.h").exists(), reason="NVMe offload needs libaio-dev"
)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple, dict]:
    command = [sys.executable, "-m", "tests.dist.plan_cases", str(tmp_path_factory.mktemp("plan"))]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, **SETTINGS},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return {tuple(result["case"]): result for result in found}


@pytest.fixture(
    params=[*CASES, *(pytest.param(case, marks=NO_LIBAIO) for case in NVME_CASES)], ids=str
)
def result(request: pytest.FixtureRequest, results: dict[tuple, dict]) -> dict:
    """One configuration: (ranks, where the teacher is, where the student's optimizer is)."""
    return results[request.param]


def test_memory_that_stays_is_within_a_tenth_and_in_its_place(result: dict) -> None:
    for what, places in result["measured"]["places"].items():
        assert result["predicted"]["places"].get(what, {}) == pytest.approx(places, rel=TENTH), what


def test_memory_of_every_phase_is_within_a_tenth(result: dict) -> None:
    """All tensors of the process that Python knows, in the midst of the phase."""
    assert result["predicted"]["phases"] == pytest.approx(result["measured"]["phases"], rel=TENTH)


def test_bytes_between_ranks_are_within_a_tenth(result: dict) -> None:
    """What torch's collectives brought to rank 0 in each phase. Decisions of a few bytes are not
    counted ahead.
    """
    measured, ranks = result["measured"]["ranks"], result["case"][0]
    assert result["predicted"]["ranks"] == pytest.approx(measured, rel=TENTH, abs=100)
    assert (min(measured.values()) > 100_000) == (ranks > 1)


def test_bytes_from_nvme_are_within_a_tenth(result: dict) -> None:
    """What the process had read from the drive."""
    measured = result["measured"]["nvme"]
    assert result["predicted"]["nvme"] == pytest.approx(measured, rel=TENTH)
    assert (measured["score"] > 2**20) == (result["case"][1] == "nvme")


def test_counts_are_exact(result: dict) -> None:
    assert result["predicted"]["counts"] == result["measured"]["counts"]

"""The planner's bytes, passes and gathers against those of real engines, in six configurations; eight with NVMe."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
BYTES = ["student parameters", "student gradients", "optimizer states", "teacher parameters", "teacher's head, whole"]
BYTES += ["NVMe buffers, teacher"]
COUNTS = ["teacher_bytes", "teacher_passes", "student_gathers"]


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    command = [sys.executable, "-m", "tests.dist.plan_cases", str(tmp_path_factory.mktemp("plan"))]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, **SETTINGS}, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def test_all_configurations_were_measured(cases):
    nvme = Path("/usr/include/libaio.h").exists()
    assert len({(case["ranks"], case["teacher_on"], case["optimizer_on"]) for case in cases}) == (8 if nvme else 6)


@pytest.mark.parametrize("what", BYTES)
def test_memory_is_within_a_tenth(what, cases):
    for case in cases:
        assert case["predicted"].get(what, 0) == pytest.approx(case["measured"][what], rel=0.1), (what, case)


@pytest.mark.parametrize("what", COUNTS)
def test_counts_are_exact(what, cases):
    for case in cases:
        assert case["predicted"][what] == case["measured"][what], (what, case)

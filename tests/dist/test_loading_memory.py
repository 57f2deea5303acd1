"""Loading a model of a few hundred million parameters: no rank takes the memory of the whole."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import ROOT

BUFFER = (
    256  # MiB beside the shard: the largest parameter several times, and what loading itself needs
)


@pytest.mark.parametrize("role", ["student", "teacher"])
def test_a_rank_takes_its_half_and_a_bounded_buffer(role: str):
    launcher = Path(sys.executable).with_name("deepspeed")
    command = [
        launcher,
        "--num_accelerators",
        "2",
        "--master_port",
        "29618",
        "--module",
        "tools.bench.loading",
    ]
    settings = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*command, "--role", role],
        cwd=ROOT,
        env={**os.environ, **settings},
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert [row["rank"] for row in rows] == [0, 1]
    for row in rows:
        assert row["weights"] > 1200
        assert row["anonymous"] <= row["weights"] / 2 + BUFFER, row

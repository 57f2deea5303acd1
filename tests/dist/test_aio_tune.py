"""tools/aio_tune.py with DeepSpeed's real reader on a real directory."""

from __future__ import annotations

import json
import re
import subprocess
import sys

from tests import ROOT
from tests.dist.runs import NVME
from tools import aio_tune


def tune(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "tools.aio_tune", *arguments]
    # In a fresh environment this builds DeepSpeed's reader: minutes. A build that is killed leaves
    # its lock behind.
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)


@NVME
def test_it_measures_every_setting_and_prints_a_block_that_deepspeed_knows(tmp_path):
    result = tune("--dir", str(tmp_path), "--file_mb", "1", "--repeats", "2")
    assert result.returncode == 0, result.stderr
    rows = [
        line.split() for line in result.stdout.splitlines() if re.match(r" +\d+ +\d+ +\d+ ", line)
    ]
    assert len(rows) == len(aio_tune.grid())
    assert all(float(row[5]) > 0 and float(row[-1]) > 0 for row in rows)
    block = json.loads(result.stdout[result.stdout.index("{") :])["aio"]
    for name in ("teacher_nvme.json", "student_zero3_nvme_optimizer.json"):
        assert block.keys() == json.loads((ROOT / "ds_configs" / name).read_text())["aio"].keys()
    assert not list(tmp_path.iterdir()), "its files are gone"


def test_a_directory_that_is_not_there_is_named(tmp_path):
    result = tune("--dir", str(tmp_path / "none"))
    assert result.returncode == 1
    assert (
        result.stderr
        == f"--dir {tmp_path / 'none'} is not a directory; make it, on the drive to be measured.\n"
    )


def test_the_cheapest_of_the_equally_fast_is_chosen():
    many, few, slow = (
        aio_tune.Setting(4, 128, 1 << 20),
        aio_tune.Setting(2, 8, 1 << 20),
        aio_tune.Setting(1, 8, 1 << 20),
    )
    many.read, few.read, slow.read = [3.0, 3.0], [2.9, 2.9], [2.0, 2.0]
    assert aio_tune.best([many, few, slow]) is few
    few.read = [2.7, 2.7]
    assert aio_tune.best([many, few, slow]) is many

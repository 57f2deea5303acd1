"""A rank that sleeps, or dies under the launcher: the job ends within its limit and says where."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests import ROOT
from tests.dist.rank_server import Server, environment, poll

STUCK = 70
TIMEOUT = 20.0  # seconds; more than any phase of these models takes on a busy machine
SLACK = 10.0  # seconds; nine jobs share the machine
PHASES = [
    "rollout",
    "mid-rollout",
    "score",
    "mid-score",
    "learn",
    "mid-learn",
    "update",
    "evaluation",
    "save.file",
]


SETTINGS = {
    "eval_strategy": "steps",
    "eval_steps": 1,
    "save_strategy": "steps",
    "save_steps": 1,
    "max_steps": 4,
    "lmbda": 1.0,
    "watchdog_timeout": TIMEOUT,
}


def test_a_rank_that_sleeps_in_each_phase(
    server: Server, settings: dict[str, Any], tmp_path: Path
) -> None:
    """All at once: they only sleep. Both ranks end themselves, in time; the reports name the phase
    and the stack.
    """
    jobs, asleep = {}, {}
    for number, phase in enumerate(PHASES):
        run_dir = tmp_path / phase
        jobs[phase] = server.start(
            2, {**settings, "output_dir": str(run_dir)}, fault=f"sleep:{phase}:2:{number % 2}"
        )
        jobs[phase].wait_for(f"GKD_FAULT: sleep at {phase}", number % 2)
        asleep[phase] = time.time()
    for number, (phase, job) in enumerate(jobs.items()):
        sleeper = number % 2
        assert job.wait() == [STUCK, STUCK], f"{phase}: {job.said()[-3000:]}"
        reports = [tmp_path / phase / f"watchdog-rank{rank}.txt" for rank in (0, 1)]
        for rank, path in enumerate(
            reports
        ):  # the other one waited for it in a collective, and says where
            assert f"rank {rank} on" in path.read_text() and "in phase '" in path.read_text(), phase
            # Jobs are waited for one after the other, so the time of the report is taken, not that
            # of the answer.
            assert path.stat().st_mtime - asleep[phase] < 1.5 * TIMEOUT + SLACK, (phase, rank)
        report = reports[sleeper].read_text()
        shown = phase.removeprefix("mid-").partition(".")[0]
        assert f"rank {sleeper} on" in report and f"in phase '{shown}'" in report
        assert "faults.py" in report and "in _act" in report, "the stack of the rank that hangs"
        sentence = report.splitlines()[0].partition("gkd_ds watchdog: ")[
            2
        ]  # both are dated when they are written
        assert sentence and sentence in job.said(sleeper)


def test_a_rank_that_dies_ends_the_launched_job(settings: dict[str, Any], tmp_path: Path) -> None:
    """What is left: its last words, the launcher's sentence with the exit code, and where the other
    one was.
    """
    run_dir = tmp_path / "run"
    flags = [f"--{name}={value}" for name, value in {**settings, "output_dir": run_dir}.items()]
    command = [
        Path(sys.executable).with_name("deepspeed"),
        "--num_accelerators",
        "2",
        "--module",
        "gkd_ds.train",
    ]
    with open(tmp_path / "log", "w") as log:
        launcher = subprocess.Popen(
            [*command, *flags],
            cwd=ROOT,
            env={**environment(), "GKD_FAULT": "kill:mid-learn:2:1"},
            stdout=log,
            stderr=log,
        )
        poll(
            lambda: "GKD_FAULT: kill" in (tmp_path / "log").read_text(), "the fault never came", 600
        )
        code = launcher.wait(90)
    said = (tmp_path / "log").read_text()
    assert code != 0, said
    assert "exits with return code = -9" in said, said
    assert re.search(r"rank 0 was in phase '\w+'", said), said


@pytest.mark.parametrize(
    "field, there, here",
    [
        ("learning_rate", 1e-2, 2e-2),
        ("seed", 42, 43),
        ("training data", None, None),
        ("what deepspeed holds", None, None),
        ("torch", None, None),
    ],
)
def test_ranks_that_were_started_differently(
    server: Server, recipe, tmp_path: Path, field, there, here
) -> None:
    """Refused on both, by name, before any window and any model."""
    one = {**recipe, "max_steps": 2, "output_dir": str(tmp_path / "run")}
    if field == "training data":
        data = tmp_path / "data"
        data.mkdir()
        text = Path(recipe["dataset_name"], "train.jsonl").read_text()
        (data / "train.jsonl").write_text(text.replace("plus", "minus", 1))
        link = tmp_path / "link"  # the same name on both ranks, as on hosts whose copies differ
        link.symlink_to(recipe["dataset_name"])
        one["dataset_name"] = str(link)
        other = {**one}
        del other["dataset_name"]
        other["dataset_name"] = str(data)
    elif field == "what deepspeed holds":
        for rank, bucket in enumerate((1000, 2000)):
            (tmp_path / f"host-{rank}").mkdir()
            content = {"zero_optimization": {"stage": 3, "reduce_bucket_size": bucket}}
            (tmp_path / f"host-{rank}" / "zero3.json").write_text(json.dumps(content))
        other = one = {**one, "deepspeed": "zero3.json"}
    elif field == "torch":
        for rank in range(2):
            (tmp_path / f"host-{rank}" / "torch-0.1.dist-info").mkdir(parents=True)
        (tmp_path / "host-1" / "torch-0.1.dist-info" / "METADATA").write_text(
            "Name: torch\nVersion: 0.1\n"
        )
        (tmp_path / "host-0" / "torch-0.1.dist-info").rmdir()
        other = one
    else:
        one[field] = there
        other = {**one, field: here}
    job = server.start(2, [one, other], env={"HOSTS": str(tmp_path)}, module="tests.dist.own_hosts")
    assert job.wait() == [2, 2], job.said()
    sentence = "dataset_name" if field == "training data" else field
    assert "different" in job.said(0) and f"'{sentence}'" in job.said(0)
    assert "Traceback" not in job.said() and not os.path.exists(tmp_path / "run" / "metrics.jsonl")

"""Runs that are asked to stop, by a signal, a file or the clock: one checkpoint, the right exit
code, W&B closed.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from gkd_ds.checkpoint import manifest
from tests import ROOT
from tests.dist.rank_server import LIMIT, Server, environment, poll
from tests.dist.runs import assert_same, rows
from tests.wandb_log import records

STOPPED = 75
DEEPSPEED = Path(sys.executable).with_name("deepspeed")
LAUNCHED = 600.0  # seconds: nothing is imported yet when the launcher starts its ranks
LONG = 500  # updates: more than anybody waits for


SETTINGS = {"max_steps": LONG, "save_strategy": "no", "lr_scheduler_type": "constant"}


def wait_for_update(run_dir: Path, step: int, process: subprocess.Popen | None = None) -> None:
    file = run_dir / "metrics.jsonl"

    def there() -> bool:
        assert process is None or process.poll() is None, "the run has ended"
        return file.exists() and file.read_bytes().count(b"\n") >= step

    poll(there, f"update {step} never came", LIMIT if process is None else LAUNCHED)


def the_checkpoint(run_dir: Path) -> manifest.Manifest:
    """The only one, verified; nothing else is left of saving."""
    (path,) = run_dir.glob("checkpoint-*")
    found = manifest.verify(path)
    assert list(rows(run_dir)) == list(range(1, found.step + 1)), (
        "the metrics end where the checkpoint is"
    )
    return found


def wandb_exit_codes(run_dir: Path) -> list[int]:
    (file,) = run_dir.glob("wandb/offline-run-*/*.wandb")
    return [
        record.exit.exit_code
        for record in records(file)
        if record.WhichOneof("record_type") == "exit"
    ]


@pytest.mark.parametrize(
    "rank, number", [(1, signal.SIGTERM), (0, signal.SIGINT), (1, signal.SIGUSR1)]
)
def test_a_signal_to_one_rank(
    server: Server, settings, tmp_path: Path, rank: int, number: signal.Signals
) -> None:
    run_dir = tmp_path / "run"
    job = server.start(2, {**settings, "output_dir": str(run_dir), "report_to": "wandb"})
    wait_for_update(run_dir, 2)
    os.kill(job.pids[rank], number)
    asked = time.monotonic()
    assert job.wait() == [STOPPED, STOPPED], job.said()
    assert time.monotonic() - asked < 30
    step = the_checkpoint(run_dir).step
    assert f"stopped after update {step}: {number.name} was received by rank {rank}" in job.said()
    assert "resume_from_checkpoint=auto continues" in job.said()
    assert wandb_exit_codes(run_dir) == [STOPPED]


def test_signals_during_the_save_do_not_tear_it(server: Server, settings, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    faults = "term:update:2:0,term:save.file:1:1,term:save.hash:1:0,term:save.rename:1:0"
    job = server.start(2, {**settings, "output_dir": str(run_dir)}, fault=faults)
    assert job.wait() == [STOPPED, STOPPED], job.said()
    assert job.said().count("GKD_FAULT: term at") == 4
    assert the_checkpoint(run_dir).step == 2


@pytest.mark.parametrize("rank", [0, 1])
def test_a_signal_to_a_rank_that_leaves_does_not_replace_its_exit_code(
    server: Server, settings, tmp_path: Path, rank: int
) -> None:
    """The first signal was obeyed; the second comes between the end of the run and of the process."""
    faults = f"term:update:2:0,term:leave:1:{rank}"
    job = server.start(2, {**settings, "output_dir": str(tmp_path / "run")}, fault=faults)
    assert job.wait() == [STOPPED, STOPPED], job.said()
    assert "GKD_FAULT: term at leave" in job.said(rank)


def test_ranks_whose_launcher_ended_before_they_looked_do_not_begin(
    server: Server, settings, tmp_path: Path
) -> None:
    """They have what launch.py gives its ranks, and it is not there."""
    run_dir = tmp_path / "run"
    job = server.start(2, {**settings, "output_dir": str(run_dir)}, env={"CROSS_SIZE": "1"})
    assert job.wait(30) == [STOPPED, STOPPED], job.said()
    assert "the deepspeed launcher was ended before the first update" in job.said(0)
    assert job.said(1) == "" and not run_dir.exists()


def test_a_stop_saves_more_than_the_model(server: Server, settings, tmp_path: Path) -> None:
    """With save_only_model, too: also where a checkpoint of the model alone has just been written
    for this step.
    """
    run_dir = tmp_path / "run"
    mine = {
        **settings,
        "output_dir": str(run_dir),
        "save_only_model": True,
        "resume_from_checkpoint": "auto",
    }
    job = server.start(
        2, {**mine, "save_strategy": "steps", "save_steps": 2}, fault="term:update:2:1"
    )
    assert job.wait() == [STOPPED, STOPPED], job.said()
    assert the_checkpoint(run_dir).step == 2
    assert "resumed from" in server.run(2, {**mine, "max_steps": 3}).said()
    server.run(2, {**mine, "max_steps": 3, "output_dir": str(tmp_path / "whole")})
    assert_same(run_dir, tmp_path / "whole")


def test_a_stop_file_and_a_second_run_meanwhile(server: Server, settings, tmp_path: Path) -> None:
    """The second one, in the same directory, is refused and harms nothing."""
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / "STOP").touch()  # left from an earlier run: not meant for this one
    job = server.start(2, {**settings, "max_steps": 10 * LONG, "output_dir": str(run_dir)})
    wait_for_update(run_dir, 2)
    (tmp_path / "other").mkdir()
    second = {
        **settings,
        "output_dir": str(tmp_path / "other" / "run"),
        "overwrite_output_dir": True,
    }
    (tmp_path / "other" / "run").symlink_to(run_dir)
    intruder = server.start(2, second)
    assert intruder.wait() == [2, 2], intruder.said()
    assert "another run is training in" in intruder.said() and "Traceback" not in intruder.said()
    (run_dir / "STOP").touch()
    assert job.wait() == [STOPPED, STOPPED], job.said()
    assert the_checkpoint(run_dir).step >= 2 and not (run_dir / "STOP").exists()


def test_time_budget_and_what_comes_after(server: Server, settings, tmp_path: Path) -> None:
    """A budget that is spent while loading lets one window through; the same command goes on from
    there.
    """
    mine = {**settings, "max_steps": 2, "resume_from_checkpoint": "auto", "max_runtime": 0.01}
    run_dir = tmp_path / "run"
    job = server.start(2, {**mine, "output_dir": str(run_dir)})
    assert job.wait() == [STOPPED, STOPPED], job.said()
    assert the_checkpoint(run_dir).step == 1 and "time budget of 0.01 s" in job.said()
    del mine["max_runtime"]
    server.run(2, {**mine, "output_dir": str(run_dir)})
    server.run(2, {**mine, "output_dir": str(tmp_path / "whole")})
    assert_same(run_dir, tmp_path / "whole")


def launch(run_dir: Path, settings: dict[str, Any], ranks: int = 2) -> subprocess.Popen:
    """Ranks under the real launcher; their output goes to `<run_dir>.log`."""
    flags = [f"--{name}={value}" for name, value in {**settings, "output_dir": run_dir}.items()]
    with open(f"{run_dir}.log", "w") as log:
        return subprocess.Popen(
            [DEEPSPEED, "--num_accelerators", str(ranks), "--module", "gkd_ds.train", *flags],
            cwd=ROOT,
            env=environment(),
            stdout=log,
            stderr=log,
        )


def test_a_signal_to_the_launcher(settings, tmp_path: Path) -> None:
    """First to `deepspeed`, which dies and tells nobody; then, twice, to the process it has
    started, which ends all.

    The exit code is the launcher's own: minus the signal, or 1.
    """
    run_dir = tmp_path / "run"
    log = Path(f"{run_dir}.log")
    launcher = launch(run_dir, settings)
    wait_for_update(run_dir, 2, launcher)
    (inner,) = psutil.Process(launcher.pid).children()
    workers = inner.children()
    launcher.send_signal(signal.SIGTERM)
    assert launcher.wait(LAUNCHED) == -signal.SIGTERM
    _, heartbeat = psutil.wait_procs([inner, *workers], LAUNCHED)
    for process in heartbeat:
        process.kill()
    assert not heartbeat, "ranks go on without a launcher"
    first = the_checkpoint(run_dir).step
    assert (
        f"stopped after update {first}: the deepspeed launcher that started rank" in log.read_text()
    )

    launcher = launch(run_dir, {**settings, "resume_from_checkpoint": "auto"})
    wait_for_update(run_dir, first + 2, launcher)
    (inner,) = psutil.Process(launcher.pid).children()
    inner.send_signal(signal.SIGTERM)
    time.sleep(0.05)
    inner.send_signal(signal.SIGTERM)
    assert launcher.wait(LAUNCHED) == 1
    steps = sorted(manifest.verify(path).step for path in run_dir.glob("checkpoint-*"))
    assert len(steps) == 2 and steps[0] == first
    assert f"stopped after update {steps[1]}: SIGTERM was received by rank" in log.read_text()


def test_a_launcher_that_is_killed_while_its_rank_imports(settings, tmp_path: Path) -> None:
    """The rank ends by itself, long before it could have trained."""
    log = tmp_path / "run.log"
    launcher = launch(tmp_path / "run", settings, ranks=1)
    found: list[psutil.Process] = []

    def there() -> bool:
        found[:] = psutil.Process(launcher.pid).children(recursive=True)
        return len(found) == 2

    poll(there, "the rank never came", LAUNCHED)
    launcher.kill()
    launcher.wait()
    found[0].kill()
    _, left = psutil.wait_procs(found, LIMIT)
    for process in left:
        process.kill()
    assert not left, "a rank goes on without a launcher"
    assert "the deepspeed launcher was ended before the first update" in log.read_text()
    assert "Traceback" not in log.read_text() and not (tmp_path / "run").exists()


def local_sh(
    tmp_path: Path, settings: dict[str, Any], *flags: object, ranks: int = 2
) -> subprocess.Popen:
    """launch/local.sh; its ranks' output goes to `tmp_path`/log, the run to `tmp_path`/run."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("".join(f"{name}: {json.dumps(value)}\n" for name, value in settings.items()))
    command = ["bash", ROOT / "launch/local.sh", recipe, "--output_dir", tmp_path / "run", *flags]
    with open(tmp_path / "log", "w") as log:
        return subprocess.Popen(
            command, env=environment() | {"RANKS": str(ranks)}, stdout=log, stderr=log
        )


def launcher_of(script: subprocess.Popen) -> list[psutil.Process]:
    """DeepSpeed's launcher, once local.sh has started it."""
    command = ["pgrep", "--full", "--parent", str(script.pid), "deepspeed.launcher.launch"]
    found = subprocess.run(command, capture_output=True, text=True).stdout
    return [psutil.Process(int(line)) for line in found.split()]


def test_a_signal_to_local_sh_stops_with_the_code_of_a_stop(settings, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    script = local_sh(tmp_path, settings)
    wait_for_update(run_dir, 2, script)
    for _ in range(3):  # also one that comes when the ranks have ended, and the launcher not yet
        script.send_signal(signal.SIGTERM)
        time.sleep(0.3)
    assert script.wait(LAUNCHED) == STOPPED, (tmp_path / "log").read_text()
    assert (
        f"stopped after update {the_checkpoint(run_dir).step}: SIGTERM was received"
        in (tmp_path / "log").read_text()
    )


def test_a_signal_to_local_sh_before_there_are_ranks(settings, tmp_path: Path) -> None:
    """One signal is enough, and there is no run."""
    script = local_sh(tmp_path, settings)
    poll(lambda: launcher_of(script), "the launcher never came", LAUNCHED)
    launcher = launcher_of(script)
    script.send_signal(signal.SIGTERM)
    assert script.wait(LAUNCHED) not in (0, STOPPED), (tmp_path / "log").read_text()
    assert not psutil.wait_procs(launcher, 5)[1] and not (tmp_path / "run").exists()


def test_local_sh_does_not_call_a_killed_launcher_a_success(settings, tmp_path: Path) -> None:
    """The ranks notice, save and stop; a dry run still ends with 0."""
    script = local_sh(tmp_path, settings)
    wait_for_update(tmp_path / "run", 1, script)
    (launcher,) = launcher_of(script)
    everybody = [launcher, *launcher.children()]
    launcher.kill()
    assert script.wait(30) == 128 + signal.SIGKILL
    assert not psutil.wait_procs(everybody, LIMIT)[1], "ranks go on without a launcher"
    assert the_checkpoint(tmp_path / "run").step >= 1
    assert local_sh(tmp_path, settings, "--dry_run", ranks=1).wait(LAUNCHED) == 0
    assert "update" in (tmp_path / "log").read_text()

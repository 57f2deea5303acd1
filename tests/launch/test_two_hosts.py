"""Training on two real hosts: equal to one host, resumable, and ended when a host or its link
fails.
"""

from __future__ import annotations

import re
import time
from pathlib import Path

import pytest

from tests.launch import tiny_run
from tests.launch.hosts import Host, wait_until

FAILURE_SECONDS = 20  # the timeouts given to the runs whose hosts fail
SLOWNESS = 40  # seconds allowed on top for noticing it and ending processes on a busy machine


@pytest.fixture(scope="module")
def one_host(hosts, tmp_path_factory) -> list[float]:
    """The losses of an undisturbed run of two ranks on one host."""
    directory = tmp_path_factory.mktemp("one")
    recipe = tiny_run.write_recipe(directory, save_strategy="no")
    command = [
        "deepspeed",
        "--num_accelerators",
        "2",
        "--module",
        "gkd_ds.train",
        "--config",
        str(recipe),
    ]
    result = hosts[0].run(command, timeout=900)
    assert result.returncode == 0, result.stdout
    assert tiny_run.steps(directory / "run") == list(range(1, tiny_run.UPDATES + 1))
    return tiny_run.losses(directory / "run")


@pytest.fixture
def project(tmp_path: Path) -> Path:
    (tmp_path / "hostfile").write_text("worker-1 slots=1\nworker-2 slots=1\n")
    return tmp_path


def start(host: Host, project: Path, name: str, **fields):
    """launch/hostfile.sh on a recipe in `project`, its output in NAME.log."""
    recipe = tiny_run.write_recipe(project, **fields)
    arguments = ["bash", "launch/hostfile.sh", str(project / "hostfile"), str(recipe)]
    arguments += ["--resume_from_checkpoint", "auto"]
    settings = {
        "PREFLIGHT": "0",
        "PDSH_SSH_ARGS_APPEND": "-o ServerAliveInterval=2 -o ServerAliveCountMax=2",
    }
    log = open(project / f"{name}.log", "w")
    return host.start(arguments, env=settings, stdout=log, stderr=log)


def wait_for_updates(project: Path, count: int) -> None:
    log = project / "first.log"
    wait_until(
        lambda: len(tiny_run.steps(project / "run")) >= count, 600, lambda: log.read_text()[-6000:]
    )


def assert_goes_on_as_on_one_host(hosts, project: Path, one_host: list[float], **fields) -> None:
    """Start the run again: it goes on from its last checkpoint, and every loss is that of one host,
    to the last bit.
    """
    output = project / "run"
    saved = tiny_run.valid_checkpoints(output)[-1]
    code = start(hosts[0], project, "again", **fields).wait(timeout=900)
    log = (project / "again.log").read_text()
    assert code == 0, log[-6000:]
    assert saved > 0 and tiny_run.resumes(log) == [saved], log[-6000:]
    assert tiny_run.steps(output) == list(range(1, tiny_run.UPDATES + 1))
    assert tiny_run.losses(output) == one_host
    assert tiny_run.valid_checkpoints(output)[-1] == tiny_run.UPDATES


def test_two_hosts_stop_at_a_signal_resume_and_equal_one_host(hosts, project, one_host):
    launcher = start(hosts[0], project, "first")
    wait_for_updates(project, 4)
    (script,) = hosts[0].processes("bash launch/hostfile.sh")
    hosts[0].run(["kill", "-TERM", str(script)])
    assert launcher.wait(timeout=300) == 75, (project / "first.log").read_text()[-6000:]
    assert (
        "the stop file" in (project / "first.log").read_text()
        and not (project / "run" / "STOP").exists()
    )
    saved = tiny_run.valid_checkpoints(project / "run")
    made = tiny_run.steps(project / "run")
    assert saved[-1] == made[-1] < tiny_run.UPDATES
    assert_goes_on_as_on_one_host(hosts, project, one_host)


def test_a_dead_host_ends_the_other_with_the_reason_and_the_run_can_go_on(hosts, project, one_host):
    launcher = start(hosts[0], project, "first")
    wait_for_updates(project, 7)
    assert hosts[1].kill("gkd_ds.train") >= 1
    started = time.monotonic()
    assert launcher.wait(timeout=FAILURE_SECONDS + SLOWNESS) not in (0, 75)
    print(f"the launcher ended {time.monotonic() - started:.1f} s after the kill")
    for host in hosts:
        wait_until(
            lambda h=host: not h.processes("gkd_ds.train"), 45, f"{host.name}'s processes to end"
        )
    log = (project / "first.log").read_text()
    assert re.search(r"\[10\.77\.0\.2\].*reset by peer|closed by peer \[10\.77\.0\.2\]", log), log[
        -6000:
    ]
    assert_goes_on_as_on_one_host(hosts, project, one_host)


def test_a_cut_link_ends_both_hosts_within_the_timeout_and_the_run_can_go_on(
    hosts, project, one_host
):
    # The watchdog first: what rank 1 prints is lost with the link, and its report is a file.
    fields = {"watchdog_timeout": FAILURE_SECONDS, "ddp_timeout": 3 * FAILURE_SECONDS}
    launcher = start(hosts[0], project, "first", **fields)
    wait_for_updates(project, 4)
    hosts[1].link("down")
    try:
        started = time.monotonic()
        for host in hosts:
            wait_until(
                lambda h=host: not h.processes("gkd_ds.train"),
                started + FAILURE_SECONDS + SLOWNESS - time.monotonic(),
                lambda h=host: (
                    f"{h.name}'s processes to end: {(project / 'first.log').read_text()[-6000:]}"
                ),
            )
        assert launcher.wait(timeout=SLOWNESS) not in (0, 75)
        print(f"both hosts had ended {time.monotonic() - started:.1f} s after the cut")
    finally:
        hosts[1].link("up")
    stuck = r"rank {} on worker-{} \(process \d+\) made no progress for \d+ s in phase"
    log, report = (
        (project / "first.log").read_text(),
        (project / "run" / "watchdog-rank1.txt").read_text(),
    )
    assert re.search(stuck.format(0, 1), log), log[-6000:]
    assert re.search(stuck.format(1, 2), report), report
    assert_goes_on_as_on_one_host(hosts, project, one_host, **fields)

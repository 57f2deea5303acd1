"""Whether the launcher is missed: by real processes that start each other as DeepSpeed's do."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from tests import ROOT
from tests.dist.rank_server import poll

# Starts the first of its commands, hands it the others, and waits for it.
STARTS = """
import json, subprocess, sys
command, *more = json.loads(sys.argv[1])
subprocess.run([json.dumps(more) if word == "MORE" else word for word in command])
"""
# A rank that has not even imported when it is asked for the first time.
ANSWERS = """
import sys
for line in sys.stdin:
    from gkd_ds.runtime import launcher
    print(launcher.is_gone(), flush=True)
"""
PYTHON = [sys.executable, "-c", STARTS, "MORE"]
SHELL = ["sh", "-c", '"$0" "$@"; true']
RANK = [sys.executable, "-c", ANSWERS, "--local_rank=0", "--log_level=info"]
LAUNCH = [*PYTHON, "deepspeed.launcher.launch", "--world_info=x", "train.py", "--log_level=info"]
DEEPSPEED = [*PYTHON, "/usr/bin/deepspeed", "train.py"]
DEEPSPEEDS_LAUNCH = [*LAUNCH[:-2], "--save_pid", "7", "--log_level=info", "train.py"]

# The commands from the top, and which of the processes goes away.
LAUNCHED = {
    "launch.py": ([LAUNCH, RANK], 0),
    "launch.py in a script": ([[*SHELL, *LAUNCH], RANK], 1),
    "launch.py above the script of a rank": ([LAUNCH, [*SHELL, *RANK]], 0),
    "deepspeed": ([DEEPSPEED, DEEPSPEEDS_LAUNCH, RANK], 0),
    "launch.py under deepspeed": ([DEEPSPEED, DEEPSPEEDS_LAUNCH, RANK], 1),
    "a program that calls deepspeed": ([PYTHON, DEEPSPEEDS_LAUNCH, RANK], 0),
}
OTHERS = {
    "the shell that started launch.py, or pdsh's": ([[*SHELL, *LAUNCH], RANK], 0),
    "the shell that started deepspeed": ([[*SHELL, *DEEPSPEED], DEEPSPEEDS_LAUNCH, RANK], 0),
}


class Chain:
    """Processes that started each other, `processes` from the top; the last one is a rank."""

    def __init__(self, directory: Path, commands: list[list[str]], **variables: str):
        inherited = {name: os.environ[name] for name in os.environ if name != "CROSS_SIZE"}
        self.top = subprocess.Popen(
            [json.dumps(commands[1:]) if word == "MORE" else word for word in commands[0]],
            cwd=directory,
            env={**inherited, "PYTHONPATH": str(ROOT), **variables},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.processes: list[psutil.Process] = []
        poll(self._is_complete, "they have not all started", 30)

    def _is_complete(self) -> bool:
        top = psutil.Process(self.top.pid)
        self.processes = [top, *top.children(recursive=True)]
        return self.processes[-1].cmdline() == RANK

    def kill(self, place: int) -> None:
        self.processes[place].kill()
        psutil.wait_procs([self.processes[place]], 30)

    def is_gone(self) -> bool:
        """What the rank says."""
        self.top.stdin.write("?\n")
        self.top.stdin.flush()
        return {"True": True, "False": False}[self.top.stdout.readline().strip()]


@contextmanager
def chain(*args, **variables: str) -> Iterator[Chain]:
    started = Chain(*args, **variables)
    try:
        yield started
    finally:
        for process in started.processes:
            if process.is_running():
                process.kill()
        started.top.wait(30)
        started.top.stdin.close()
        started.top.stdout.close()


@pytest.mark.parametrize("name", LAUNCHED)
def test_a_launcher_that_ends_is_missed(tmp_path: Path, name: str) -> None:
    commands, place = LAUNCHED[name]
    with chain(tmp_path, commands, CROSS_SIZE="1") as processes:
        assert not processes.is_gone()
        processes.kill(place)
        assert processes.is_gone()


@pytest.mark.parametrize("name", LAUNCHED)
def test_a_launcher_that_ended_before_anybody_looked_is_missed(tmp_path: Path, name: str) -> None:
    commands, place = LAUNCHED[name]
    with chain(tmp_path, commands, CROSS_SIZE="1") as processes:
        processes.kill(place)
        assert processes.is_gone()


@pytest.mark.parametrize("name", OTHERS)
def test_who_only_started_the_launcher_may_leave(tmp_path: Path, name: str) -> None:
    commands, place = OTHERS[name]
    with chain(tmp_path, commands, CROSS_SIZE="1") as processes:
        assert not processes.is_gone()
        processes.kill(place)
        assert not processes.is_gone()


@pytest.mark.parametrize("above", [SHELL, PYTHON], ids=["nohup", "torchrun"])
def test_without_deepspeed_s_launcher_nobody_is_missed(tmp_path: Path, above: list[str]) -> None:
    commands = [[*SHELL, *RANK]] if above is SHELL else [PYTHON, RANK]
    with chain(tmp_path, commands) as processes:
        processes.kill(0)
        assert not processes.is_gone()


def test_where_the_launcher_cannot_be_seen_it_is_not_missed(tmp_path: Path) -> None:
    """In a container that shows its own processes only."""
    apart = ["unshare", "--pid", "--fork", "--mount-proc", *SHELL]
    if subprocess.run([*apart[:4], "true"], capture_output=True).returncode:
        pytest.skip("unshare needs root")
    commands = [LAUNCH, [*apart, *RANK]]
    with chain(tmp_path, commands, CROSS_SIZE="1") as processes:
        assert not processes.is_gone()


def test_in_a_container_that_has_no_session_of_its_own_the_launcher_is_missed(
    tmp_path: Path,
) -> None:
    """Its session's id reads 0 there, also for processes that the launcher's end has orphaned."""
    apart = ["unshare", "--pid", "--fork", "--mount-proc"]
    if subprocess.run([*apart, "true"], capture_output=True).returncode:
        pytest.skip("unshare needs root")
    # In the text of the command, not among the shell's own words.
    launch = " ".join('"$0"' if word == "MORE" else shlex.quote(word) for word in LAUNCH)
    shell = ["sh", "-c", f"CROSS_SIZE=1 {launch}; sleep 60", "MORE"]
    with chain(tmp_path, [[*apart, *shell], RANK]) as processes:
        assert not processes.is_gone()
        processes.kill(2)  # unshare, shell, launch.py
        assert processes.is_gone()

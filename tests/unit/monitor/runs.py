"""Short runs of a tracker: what it is told, what it leaves, and processes that it runs in."""

import json
import os
import pty
import select
import subprocess
import sys
import textwrap
import time
from pathlib import Path

from gkd_ds.config.config import GKDConfig
from tests import ROOT

CANARY = "canary-51c0ffee-secret"


def make_config(run_dir, **fields):
    return GKDConfig(output_dir=str(run_dir), **{"logging_steps": 2, **fields})


def update(step, **more):
    return {
        "step": step,
        "epoch": step / 4,
        "loss": 1 / step,
        "source": {"student": 3, "data": 1},
        "lr": 1e-4,
        "grad_norm": 0.5,
        "completion_tokens": 300,
        "mean_completion_length": 37.5,
        "perf/step_s": 0.5,
        **more,
    }


def strict_rows(path):
    """Rows as a strict JSON reader sees them: no NaN, no torn line."""

    def refuse(word):
        raise AssertionError(f"{word} is not JSON")

    text = Path(path).read_text()
    assert not text or text.endswith("\n")
    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


def steps(run_dir):
    return [row["step"] for row in strict_rows(Path(run_dir) / "metrics.jsonl")]


def environment(**more):
    kept = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    return {**kept, "PYTHONPATH": str(ROOT), "WANDB_MODE": "offline", **more}


def run_python(code, arguments=(), canary=False, env=None):
    secrets = (
        {"WANDB_API_KEY": CANARY + "-key", "HF_TOKEN": CANARY + "-hf", "SOME_PASSWORD": CANARY}
        if canary
        else {}
    )
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *arguments],
        capture_output=True,
        text=True,
        env=environment(**secrets, **(env or {})),
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done


def run_on_terminal(code, env=None):
    """The code's output when its three streams are a terminal; nobody answers what it asks
    there.
    """
    ours, theirs = pty.openpty()
    child = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env=environment(**(env or {})),
        start_new_session=True,
    )
    os.close(theirs)
    output, deadline = b"", time.monotonic() + 60
    while time.monotonic() < deadline:
        if select.select([ours], [], [], 0.2)[0]:
            try:
                output += os.read(ours, 65536)
            except OSError:  # how a terminal says that nobody holds its other end
                break
    os.close(ours)
    if time.monotonic() >= deadline:
        child.kill()
    assert child.wait(30) == 0, output.decode()
    return output.decode()

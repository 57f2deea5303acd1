"""DeepSpeed's launcher over a hostfile: pdsh, --no_ssh, and what travels (stopping:
test_two_hosts.py).
"""

from __future__ import annotations

import json
import stat
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.fixture
def hostfile(tmp_path: Path) -> Path:
    path = tmp_path / "hostfile"
    path.write_text("# two hosts\nworker-1 slots=1\n\nworker-2 slots=1\n")
    return path


@pytest.fixture
def recipe_file(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text("beta: 0.5\n")
    return path


def ranks(output: Path) -> list[dict]:
    return [json.loads((output / f"rank-{rank}.json").read_text()) for rank in (0, 1)]


def test_hostfile_script_runs_one_rank_per_host_and_the_environment_travels(
    hosts, hostfile, recipe_file, tmp_path
):
    output, place = tmp_path / "run", tmp_path / "tmp"
    place.mkdir()
    settings = {
        "TMPDIR": str(place),
        "GKD_MODULE": "tests.launch.ring",
        "WANDB_PROJECT": "distil & compare",
        "WANDB_API_KEY": "a-secret-of-some-length",
        "SITE_PATHS": "/data:/more",
        "TRAVEL": "SITE_PATHS",
    }
    arguments = [
        "bash",
        "launch/hostfile.sh",
        str(hostfile),
        str(recipe_file),
        "--output_dir",
        str(output),
    ]
    result = hosts[0].run(arguments, env=settings, timeout=400)
    assert result.returncode == 0, result.stdout
    assert "VERDICT: 2 nodes ready" in result.stdout
    assert (output / "FINISHED").exists()
    facts = ranks(output)
    assert [fact["host"] for fact in facts] == ["worker-1", "worker-2"]
    for fact in facts:
        assert fact["world"] == 2
        assert fact["environ"]["WANDB_PROJECT"] == "distil & compare"
        assert fact["environ"]["SITE_PATHS"] == "/data:/more"
        assert fact["environ"]["HF_HUB_OFFLINE"] == "1"
        assert "WANDB_API_KEY" not in fact["environ"]
    assert "a-secret-of-some-length" not in result.stdout
    assert not list(place.glob("deepspeed_env.*")), "the file of what travels was left behind"


def test_what_travels_is_private_and_holds_our_own_variables(tmp_path, monkeypatch):
    written = tmp_path / "env"
    written.write_text("readable by all")
    monkeypatch.setenv("DS_ENV_FILE", str(written))
    monkeypatch.setenv("GKD_SETTING", "ours")
    monkeypatch.setenv("WANDB_API_KEY", "a-secret-of-some-length")
    monkeypatch.setenv("HF_ENDPOINT", "https://mirror.example/hf?a=b@c")
    done = subprocess.run(
        [sys.executable, "tools/deepspeed_env.py"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert stat.S_IMODE(written.stat().st_mode) == 0o600
    assert {"GKD_SETTING=ours", "HF_ENDPOINT=https://mirror.example/hf?a=b@c"} <= set(
        written.read_text().splitlines()
    )
    assert "a-secret-of-some-length" not in written.read_text()


@pytest.mark.parametrize(
    "name, value, named, sentence",
    [
        ("MY_API_KEY", "a-secret-of-some-length", True, "MY_API_KEY is a secret"),
        (
            "AWS_SECRET_ACCESS_KEY",
            "a-secret-of-some-length",
            True,
            "AWS_SECRET_ACCESS_KEY is a secret",
        ),
        ("DB_PASSWD", "a-secret-of-some-length", True, "DB_PASSWD is a secret"),
        ("PROXY", "http://me:another-secret@proxy", True, "the value of PROXY has a secret"),
        ("HF_ENDPOINT", "https://me:pw@host", False, "the value of HF_ENDPOINT has a secret"),
        (
            "WANDB_BASE_URL",
            "https://host/a-key-that-is-secret",
            False,
            "the value of WANDB_BASE_URL has a secret",
        ),
        ("ODD", 'say "$HOME"', True, "cannot carry"),
    ],
)
def test_a_secret_is_refused_by_name_and_by_value(
    tmp_path, monkeypatch, name, value, named, sentence
):
    monkeypatch.setenv("DS_ENV_FILE", str(tmp_path / "env"))
    monkeypatch.setenv("OTHER_API_KEY", "a-key-that-is-secret")
    monkeypatch.setenv(name, value)
    names = [name] if named else []
    done = subprocess.run(
        [sys.executable, "tools/deepspeed_env.py", *names], capture_output=True, text=True
    )
    assert done.returncode == 2 and sentence in done.stderr, done.stderr
    assert value not in done.stderr and not (tmp_path / "env").exists()


def test_the_example_without_ssh_one_launcher_started_by_hand_on_each_host(hosts, tmp_path):
    output = tmp_path / "run"
    launchers = []
    for node_rank, host in enumerate(hosts):
        command = [
            "deepspeed",
            "--hostfile",
            "launch/hostfile.example",
            "--num_accelerators",
            "1",
            "--no_ssh",
        ]
        command += ["--node_rank", str(node_rank), "--master_addr", "worker-1"]
        command += ["--module", "tests.launch.ring", "--output_dir", str(output)]
        launchers.append(host.start(command))
    assert [launcher.wait(timeout=400) for launcher in launchers] == [0, 0]
    assert [fact["host"] for fact in ranks(output)] == ["worker-1", "worker-2"]

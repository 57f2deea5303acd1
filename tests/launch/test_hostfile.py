"""DeepSpeed's launcher over a hostfile: pdsh, --no_ssh, and what travels (stopping: test_two_hosts.py)."""

from __future__ import annotations

import json
import stat
from pathlib import Path

import pytest

from tests.launch.conftest import ROOT


@pytest.fixture
def hostfile(tmp_path: Path) -> Path:
    path = tmp_path / "hostfile"
    path.write_text("# two hosts\nworker-1 slots=1\n\nworker-2 slots=1\n")
    return path


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text("beta: 0.5\n")
    return path


def ranks(output: Path) -> list[dict]:
    return [json.loads((output / f"rank-{rank}.json").read_text()) for rank in (0, 1)]


def test_hostfile_script_runs_one_rank_per_host_and_the_environment_travels(hosts, hostfile, recipe, tmp_path):
    output = tmp_path / "run"
    settings = {
        "GKD_MODULE": "tests.launch.ring",
        "WANDB_PROJECT": "distil & compare",
        "WANDB_API_KEY": "a-secret-of-some-length",
        "SITE_PATHS": "/data:/more",
        "TRAVEL": "SITE_PATHS",
    }
    arguments = ["bash", "launch/hostfile.sh", str(hostfile), str(recipe), "--output_dir", str(output)]
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
    written = ROOT / "runs" / ".deepspeed_env"
    assert stat.S_IMODE(written.stat().st_mode) == 0o600
    assert "a-secret-of-some-length" not in written.read_text()


def test_a_secret_is_refused_by_name_and_by_value(hosts, hostfile, recipe):
    tool = ["python", "tools/deepspeed_env.py"]
    secret = {"DS_ENV_FILE": "/run/env", "MY_API_KEY": "a-secret-of-some-length"}
    refused = hosts[0].run([*tool, "MY_API_KEY"], env=secret)
    assert refused.returncode == 2 and "MY_API_KEY is a secret" in refused.stdout
    refused = hosts[0].run([*tool, "PROXY"], env={**secret, "PROXY": "http://me:a-secret-of-some-length@proxy"})
    assert refused.returncode == 2 and "PROXY is a secret" in refused.stdout
    refused = hosts[0].run([*tool, "ODD"], env={**secret, "ODD": 'say "$HOME"'})
    assert refused.returncode == 2 and "cannot carry" in refused.stdout


def test_the_example_without_ssh_one_launcher_started_by_hand_on_each_host(hosts, tmp_path):
    output = tmp_path / "run"
    launchers = []
    for node_rank, host in enumerate(hosts):
        command = ["deepspeed", "--hostfile", "launch/hostfile.example", "--num_accelerators", "1", "--no_ssh"]
        command += ["--node_rank", str(node_rank), "--master_addr", "worker-1"]
        command += ["--module", "tests.launch.ring", "--output_dir", str(output)]
        launchers.append(host.start(command))
    assert [launcher.wait(timeout=400) for launcher in launchers] == [0, 0]
    assert [fact["host"] for fact in ranks(output)] == ["worker-1", "worker-2"]

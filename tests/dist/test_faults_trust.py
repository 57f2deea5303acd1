"""What a run must not do with what it is given: run code from it, write its secrets down, lose what
was saved.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from gkd_ds.checkpoint import manifest
from tests.dist.rank_server import Server
from tests.dist.runs import assert_same, rows

CANARY = "canary5f0a7b21c9"


SETTINGS = {"max_steps": 4, "save_strategy": "steps", "save_steps": 1}


class _Bomb:
    """A pickle of this runs a command."""

    def __init__(self, command: str):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


def test_a_malicious_pickle_in_a_checkpoint_does_not_run(
    server: Server, settings, tmp_path: Path
) -> None:
    """Even with a manifest that fits. The checkpoint before is taken; asked for by name it is
    refused.
    """
    mine = {**settings, "output_dir": str(tmp_path / "run"), "max_steps": 2}
    server.run(2, mine)
    canary, last = tmp_path / "canary", tmp_path / "run" / "checkpoint-2"
    for path in last.glob("engine/*optim_states.pt"):
        torch.save({"optimizer_state_dict": _Bomb(f"touch {canary}")}, path)
    forged = json.loads((last / "manifest.json").read_text())
    for name, entry in forged["files"].items():
        content = (last / name).read_bytes()
        entry |= {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    del forged["digest"]
    (last / "manifest.json").write_text(manifest.render(forged))
    with pytest.raises(Exception, match="would call"):
        manifest.verify(last)
    mine |= {"max_steps": 3}
    by_name = server.start(2, {**mine, "resume_from_checkpoint": str(last)})
    assert (
        by_name.wait() == [2, 2]
        and "would call" in by_name.said()
        and "Traceback" not in by_name.said()
    )
    said = server.run(2, {**mine, "resume_from_checkpoint": "auto"}).said()
    assert "passed over" in said and "would call" in said and "at step 1" in said
    assert not canary.exists()


@pytest.mark.parametrize("role", ["model_name_or_path", "teacher_model_name_or_path"])
def test_weights_in_pickles_are_refused(
    server: Server, settings, tmp_path: Path, role: str
) -> None:
    directory, canary = tmp_path / "model", tmp_path / "canary"
    shutil.copytree(settings[role], directory)
    (directory / "model.safetensors").unlink()
    (directory / "pytorch_model.bin").write_bytes(pickle.dumps(_Bomb(f"touch {canary}")))
    job = server.start(1, {**settings, role: str(directory), "output_dir": str(tmp_path / "run")})
    assert job.wait() == [2]
    assert (
        "no weights in safetensors" in job.said()
        and "Traceback" not in job.said()
        and not canary.exists()
    )


def test_code_that_comes_with_a_model_does_not_run(
    server: Server, settings, tmp_path: Path
) -> None:
    directory, canary = tmp_path / "model", tmp_path / "canary"
    shutil.copytree(settings["model_name_or_path"], directory)
    config = json.loads((directory / "config.json").read_text())
    config |= {"model_type": "custom", "architectures": ["Custom"]}
    config["auto_map"] = {
        "AutoConfig": "custom.CustomConfig",
        "AutoModelForCausalLM": "custom.Custom",
    }
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "custom.py").write_text(f"open({str(canary)!r}, 'w')\n")
    job = server.start(
        1, {**settings, "model_name_or_path": str(directory), "output_dir": str(tmp_path / "run")}
    )
    assert job.wait() == [2], job.said()
    assert "Traceback" not in job.said() and not canary.exists()


def test_names_that_would_leave_the_run_directory(server: Server, settings, tmp_path: Path) -> None:
    """A tokenizer's named chat templates become files when the student is written."""
    directory = tmp_path / "model"
    shutil.copytree(settings["model_name_or_path"], directory)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    templates = {"default": tokenizer.chat_template, "../../../evil": "{{ messages }}"}
    config = json.loads((directory / "tokenizer_config.json").read_text())
    config["chat_template"] = [{"name": name, "template": text} for name, text in templates.items()]
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    (directory / "chat_template.jinja").unlink()
    job = server.start(
        1, {**settings, "model_name_or_path": str(directory), "output_dir": str(tmp_path / "run")}
    )
    assert job.wait() == [2], job.said()
    assert "'../../../evil'" in job.said() and "Traceback" not in job.said()
    assert not list(tmp_path.rglob("evil*")) and not (tmp_path / "run" / "metrics.jsonl").exists()


def test_secrets_are_written_nowhere(server: Server, settings, tmp_path: Path) -> None:
    """In the environment, in a URL, in a name: not in any file of the run, nor in what it says when
    it fails.
    """
    # All different: one that is hidden must not hide another.
    secrets = {
        "WANDB_API_KEY": f"{CANARY}-wandb",
        "HF_TOKEN": f"hf_{CANARY}-env",
        "DB_PASSWORD": f"{CANARY}-db",
    }
    secrets["AWS_SECRET_ACCESS_KEY"] = f"{CANARY}-aws"
    mine = {
        **settings,
        "report_to": "wandb",
        "project": f"{CANARY}-db",
        "run_name": f"{CANARY}-aws of https://somebody:{CANARY}-url@example.org/data?access_token={CANARY}-parameter",
        "hub_token": f"hf_{CANARY}-field",
        "eval_strategy": "steps",
        "eval_steps": 2,
        "max_steps": 2,
        "output_dir": str(tmp_path / "run"),
    }
    said = server.run(2, mine, env=secrets).said()  # before the next job writes to the same logs
    assert "update 2/2" in said and CANARY not in said
    failing = {**mine, "resume_from_checkpoint": True, "max_steps": 4}
    job = server.start(2, failing, env=secrets, fault="raise:score:2")
    assert job.wait() == [1, 1] and "Traceback" in job.said()
    produced = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert {"metrics.jsonl", "README.md", "manifest.json", "config.resolved.json"} <= {
        path.name for path in produced
    }
    assert any(path.suffix == ".wandb" for path in produced)
    for path in produced + job.logs:
        assert CANARY.encode() not in path.read_bytes(), path


@pytest.mark.parametrize("name", ["rollouts.jsonl", "config.resolved.json"])
def test_a_file_of_the_run_that_cannot_be_written(
    server: Server, settings, tmp_path: Path, name: str
) -> None:
    """Only rank 0 writes it; both ranks say so, before the first window."""
    (tmp_path / "run" / name).mkdir(parents=True)
    job = server.start(2, {**settings, "output_dir": str(tmp_path / "run")})
    assert job.wait() == [2, 2], job.said()
    assert (
        f"{name} cannot be written (Is a directory)" in job.said() and "Traceback" not in job.said()
    )


def test_disk_full_during_a_real_save(
    server: Server, settings, tmp_path: Path, small_disk: Path
) -> None:
    """There is room for one checkpoint and a half: the second is given up, training ends, the first
    one is whole.
    """
    whole = {**settings, "output_dir": str(tmp_path / "whole")}
    server.run(2, whole)
    size = sum(
        path.stat().st_size
        for path in (tmp_path / "whole" / "checkpoint-1").rglob("*")
        if path.is_file()
    )
    run_dir = small_disk / "run"
    run_dir.mkdir()
    (run_dir.with_name("ballast")).write_bytes(bytes(64 * 2**20 - int(1.6 * size)))
    mine = {**settings, "output_dir": str(run_dir)}
    job = server.start(2, mine)
    codes = job.wait()
    said = job.said()
    assert codes in ([0, 0], [74, 74]), f"{codes}\n{said}"
    assert "was not written because of rank" in said and "No space left on device" in said
    assert "Traceback" not in said, said
    assert manifest.verify(run_dir / "checkpoint-1").step == 1
    # With room again, the same command goes on from there and ends as if nothing had happened.
    run_dir.with_name("ballast").unlink()
    server.run(2, {**mine, "resume_from_checkpoint": "auto"})
    assert_same(run_dir, tmp_path / "whole")
    ours, theirs = (load_file(path / "model.safetensors") for path in (run_dir, tmp_path / "whole"))
    assert all(torch.equal(ours[name], weight) for name, weight in theirs.items())
    assert len(rows(run_dir)) == 4

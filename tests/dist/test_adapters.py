"""LoRA students under ZeRO: what is trained, saved and written; a teacher that is the base."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.dist import runs
from tests.dist.rank_server import Server

SETTINGS = {
    "use_peft": True,
    "lora_r": 4,
    "lora_target_modules": "all-linear",
    "max_steps": 5,
    "save_strategy": "steps",
    "save_steps": 3,
    "lmbda": 0.5,
    # Of these models DeepSpeed would keep every parameter whole.
    "deepspeed": {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}},
}


def weights_of(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(directory / "model.safetensors")


def logits_of(directory: str | Path) -> torch.Tensor:
    from transformers import AutoModelForCausalLM  # late: it takes seconds

    with torch.no_grad():
        model = AutoModelForCausalLM.from_pretrained(directory)
        return model(input_ids=torch.arange(3, 60)[None]).logits


def copy_to(run_dir: Path, to: Path) -> Path:
    return runs.copy_of(run_dir, to, checkpoint=3)


def test_only_the_adapter_is_written_and_the_base_is_as_it_was(whole, settings):
    """peft's files, which transformers loads with the base from where it was."""
    assert not (whole / "model.safetensors").exists()
    adapter = load_file(whole / "adapter_model.safetensors")
    assert {name.split(".")[-2] for name in adapter} == {"lora_A", "lora_B"}
    assert any(tensor.abs().max() > 0 for name, tensor in adapter.items() if "lora_B" in name)
    assert (logits_of(whole) - logits_of(settings["model_name_or_path"])).abs().max() > 1e-3


def test_a_checkpoint_holds_what_is_trained_and_no_more(whole, settings):
    base = Path(settings["model_name_or_path"], "model.safetensors").stat().st_size
    saved = [path.stat().st_size for path in (whole / "checkpoint-3" / "engine").iterdir()]
    elements = sum(t.numel() for t in load_file(whole / "adapter_model.safetensors").values())
    # fp32 weights and two moments on two ranks; names and shapes take the rest.
    assert 12 * elements < sum(saved) < 12 * elements + 120_000 < base + 120_000


def test_a_resumed_run_is_the_whole_run(server: Server, whole, settings, tmp_path):
    run_dir = copy_to(whole, tmp_path / "run")
    server.run(2, {**settings, "output_dir": str(run_dir), "resume_from_checkpoint": "auto"})
    runs.assert_same(run_dir, whole)
    ours, theirs = (load_file(d / "adapter_model.safetensors") for d in (run_dir, whole))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_another_number_of_ranks_goes_on(server: Server, whole, settings, tmp_path):
    run_dir = copy_to(whole, tmp_path / "run")
    wider = {**settings, "per_device_train_batch_size": 2, "resume_from_checkpoint": "auto"}
    server.run(1, {**wider, "output_dir": str(run_dir)})
    runs.assert_same(run_dir, whole, tolerance=2e-4)


@pytest.mark.parametrize("stage", [0, 2, 3])
@pytest.mark.parametrize("form", ["use_dora", "use_rslora"])
def test_a_merged_export_says_what_the_adapter_says(
    server: Server, settings: dict[str, Any], tmp_path, stage: int, form: str
):
    """On every stage, for the forms of LoRA that peft has; the base's own weights stand in it
    wherever no adapter is.
    """
    zero_block = {
        "stage": stage,
        **({"stage3_param_persistence_threshold": 0} if stage == 3 else {}),
    }
    changed = {**settings, form: True, "save_strategy": "no", "max_steps": 3}
    changed["deepspeed"] = {"zero_optimization": zero_block}
    for name, merge in (("adapter", False), ("merged", True)):
        run_dir = tmp_path / name
        server.run(2, {**changed, "merge_on_export": merge, "output_dir": str(run_dir)})
    from peft import AutoPeftModelForCausalLM

    with torch.no_grad():
        # transformers' own loading leaves DoRA's magnitudes out.
        model = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
        expected = model(input_ids=torch.arange(3, 60)[None]).logits
    assert (logits_of(tmp_path / "merged") - expected).abs().max() < 1e-5
    base = weights_of(Path(settings["model_name_or_path"]))
    merged = weights_of(tmp_path / "merged")
    assert merged.keys() == base.keys()
    same = {name for name in base if torch.equal(merged[name], base[name])}
    assert same == {name for name in base if "proj" not in name}


@pytest.mark.parametrize("stage", [0, 3])
def test_a_teacher_that_is_the_base_is_the_base(
    server: Server, settings: dict[str, Any], tmp_path, stage: int
):
    """One copy of the weights gives the updates that a second one gives."""
    student = Path(settings["model_name_or_path"])
    copied = shutil.copytree(student, tmp_path / "copy")
    zero_block = {
        "stage": stage,
        **({"stage3_param_persistence_threshold": 0} if stage == 3 else {}),
    }
    # The first adapter is trained a little by another teacher, so that there is something to learn.
    changed = {**settings, "save_strategy": "no", "max_steps": 3, "lmbda": 1.0}
    changed["deepspeed"] = {"zero_optimization": zero_block}
    first = tmp_path / "first"
    server.run(2, {**changed, "output_dir": str(first), "learning_rate": 0.1})
    again = {name: value for name, value in changed.items() if "lora" not in name}
    again |= {"use_peft": False, "model_name_or_path": str(first)}
    said = {}
    for name, teacher in (("shared", student), ("separate", copied)):
        job = server.run(
            2,
            {
                **again,
                "teacher_model_name_or_path": str(teacher),
                "output_dir": str(tmp_path / name),
            },
        )
        said[name] = job.said()
    runs.assert_same(tmp_path / "shared", tmp_path / "separate", tolerance=1e-5)
    assert max(row["loss"] for row in runs.rows(tmp_path / "shared").values()) > 1e-3
    assert all(row["perf/teacher_bytes"] == 0 for row in runs.rows(tmp_path / "shared").values())
    assert all(row["perf/teacher_bytes"] > 0 for row in runs.rows(tmp_path / "separate").values())


def test_an_adapter_is_a_teacher(server: Server, whole, settings: dict[str, Any], tmp_path):
    """Its directory as teacher gives the updates of the merged model."""
    merged = tmp_path / "merged-teacher"
    again = {**settings, "save_strategy": "no", "max_steps": 5, "merge_on_export": True}
    server.run(2, {**again, "output_dir": str(merged)})
    plain = {
        name: value for name, value in settings.items() if "lora" not in name and name != "use_peft"
    }
    plain |= {"save_strategy": "no", "max_steps": 2}
    for name, teacher in (("by-adapter", whole), ("by-merged", merged)):
        server.run(
            2,
            {
                **plain,
                "teacher_model_name_or_path": str(teacher),
                "output_dir": str(tmp_path / name),
            },
        )
    runs.assert_same(tmp_path / "by-adapter", tmp_path / "by-merged", tolerance=1e-4)


def test_what_an_adapter_costs_beside_the_whole_student(server: Server, settings, tmp_path):
    """Two moments of what is trained, a rank's half of it; the gather of a rollout moves the base,
    too; the teacher that is the base has no weights of its own.
    """
    student = settings["model_name_or_path"]
    common = {**settings, "lmbda": 1.0, "teacher_model_name_or_path": student}
    whole_student = {name: value for name, value in common.items() if "lora" not in name}
    whole_student |= {"use_peft": False}
    counted = {}
    for name, recipe in (("adapter", common), ("whole", whole_student)):
        job = server.run(
            2, {**recipe, "output_dir": str(tmp_path / name)}, module="tests.dist.adapter_counts"
        )
        counted[name] = json.loads(job.said(0).splitlines()[-1])
    adapter, whole = counted["adapter"], counted["whole"]
    weights = sum(t.nbytes for t in weights_of(Path(student)).values())
    added = adapter["gathered"] - weights
    assert whole["gathered"] == weights and 0 < added < weights / 4
    assert abs(whole["optimizer"] - weights) < 2000  # half of two moments
    assert abs(adapter["optimizer"] - added) < 2000
    assert adapter["base_is_the_same"] and adapter["frozen"] >= weights
    assert adapter["teacher"] == 0 and whole["teacher"] > 0


def test_another_adapter_is_refused_at_resume(server: Server, whole, settings, tmp_path):
    run_dir = copy_to(whole, tmp_path / "run")
    other = {**settings, "output_dir": str(run_dir), "resume_from_checkpoint": "auto"}
    job = server.start(2, {**other, "lora_alpha": 64})
    assert job.wait() == [2, 2]
    assert "lora_alpha" in job.said()
    assert json.loads((run_dir / "checkpoint-3" / "manifest.json").read_text())

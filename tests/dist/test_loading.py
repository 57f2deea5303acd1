"""On two real ranks and at every stage, a run works on the weights that files and objects hold."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.dist.rank_server import Server
from tests.dist.runs import assert_same, rows

WORKER = "tests.dist.loading_worker"
SETTINGS = {"max_steps": 2, "lmbda": 0.5}
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def stage(number: int) -> dict[str, Any]:
    """Stage 3 keeps parameters of less than 100,000 elements whole if nobody tells it not to."""
    return {"zero_optimization": {"stage": number, "stage3_param_persistence_threshold": 0}}


def copy_with_own_head(source: str, place: Path, tied: bool) -> str:
    """A copy whose file has a head of its own, and whose configuration says `tied`."""
    shutil.copytree(source, place)
    held = load_file(place / "model.safetensors")
    other = torch.randn(held[EMBEDDING].shape, generator=torch.Generator().manual_seed(5)) * 0.2
    save_file(held | {HEAD: other}, place / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((place / "config.json").read_text()) | {"tie_word_embeddings": tied}
    (place / "config.json").write_text(json.dumps(config))
    return str(place)


# ---- names


@pytest.mark.parametrize("field, number", [
    ("model_name_or_path", 3),
    ("model_name_or_path", 0),
    ("teacher_model_name_or_path", 3),
])  # fmt: skip
def test_a_head_of_its_own_is_used_although_the_configuration_ties_it(
    server: Server, settings: dict, tmp_path: Path, field: str, number: int
) -> None:
    jobs = {}
    for tied in (True, False):
        model = copy_with_own_head(settings[field], tmp_path / f"model-{tied}", tied)
        run = {"output_dir": str(tmp_path / f"run-{tied}"), "deepspeed": stage(number)}
        jobs[tied] = server.run(2, {**settings, **run, field: model})
    assert_same(jobs[True].run_dir, jobs[False].run_dir)
    trained = [load_file(job.run_dir / "model.safetensors") for job in jobs.values()]
    assert trained[0].keys() == trained[1].keys()
    assert all(weight.equal(trained[1][name]) for name, weight in trained[0].items())


@pytest.mark.parametrize("number", [0, 3])
def test_weights_that_are_not_those_of_the_files_are_refused_on_every_rank(
    server: Server, settings: dict, tmp_path: Path, number: int
) -> None:
    run = {**settings, "output_dir": str(tmp_path / "run"), "deepspeed": stage(number)}
    job = server.start(2, run, module=WORKER, env={"LOADING": "with_another_weight"})
    assert job.wait() == [2, 2], job.said()
    sentence = job.said(0).splitlines()[-1]
    assert "was loaded with other weights than its files hold" in sentence
    assert f"('{EMBEDDING}'" in sentence or f"('{HEAD}'" in sentence


# ---- objects


@pytest.mark.parametrize("number", [0, 2, 3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_an_object_in_16_bits_trains_as_its_name_does(
    server: Server, settings: dict, tmp_path: Path, number: int, dtype: torch.dtype
) -> None:
    model = tmp_path / "model"
    shutil.copytree(settings["model_name_or_path"], model)
    held = load_file(model / "model.safetensors")
    rounded = {name: weight.to(dtype) for name, weight in held.items()}
    save_file(rounded, model / "model.safetensors", metadata={"format": "pt"})
    run = {**settings, "model_name_or_path": str(model), "deepspeed": stage(number)}
    by_name, by_object = tmp_path / "by-name", tmp_path / "by-object"
    server.run(2, {**run, "output_dir": str(by_name)})
    run["output_dir"] = str(by_object)
    server.run(2, run, module=WORKER, env={"LOADING": "with_an_object"})
    assert len(rows(by_name)) == 2
    assert_same(by_object, by_name)
    trained, expected = (load_file(run / "model.safetensors") for run in (by_object, by_name))
    assert trained.keys() == expected.keys()
    for name, weight in trained.items():
        assert weight.dtype == torch.float32 and weight.equal(expected[name]), name

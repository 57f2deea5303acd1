"""Wrong input on two real ranks: exit code 2 on both, one sentence per node, and nothing has been
loaded by then.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from tests.dist.rank_server import Job, Server
from tests.taken_port import HTTP, taken_port
from tests.tiny import make_model, make_tokenizer


def change_json(file: Path, change) -> None:
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def other_vocabulary(recipe: dict[str, Any], place: Path) -> dict[str, Any]:
    """The teacher's tokenizer has two pieces the other way round."""

    def swap(tokenizer: dict) -> None:
        vocabulary = tokenizer["model"]["vocab"]
        vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]

    shutil.copytree(recipe["teacher_model_name_or_path"], place)
    change_json(place / "tokenizer.json", swap)
    return {"teacher_model_name_or_path": str(place)}


def no_eos(recipe: dict[str, Any], place: Path) -> dict[str, Any]:
    shutil.copytree(recipe["model_name_or_path"], place)
    change_json(place / "tokenizer_config.json", lambda config: config.pop("eos_token"))
    return {"model_name_or_path": str(place)}


def data(*rows: Any):
    def change(recipe: dict[str, Any], place: Path) -> dict[str, Any]:
        place.mkdir()
        (place / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return {"dataset_name": str(place / "train.jsonl")}

    return change


def changed_settings(field: str, **settings: Any):
    """The model that `field` names, with other fields in its config.json."""

    def change(recipe: dict[str, Any], place: Path) -> dict[str, Any]:
        shutil.copytree(recipe[field], place)
        change_json(place / "config.json", lambda config: config.update(settings))
        return {field: str(place)}

    return change


def no_head(recipe: dict[str, Any], place: Path) -> dict[str, Any]:
    """Its configuration ties nothing any more, and its file has no head."""
    return changed_settings("teacher_model_name_or_path", tie_word_embeddings=False)(recipe, place)


def adapter(recipe: dict[str, Any], place: Path) -> dict[str, Any]:
    shutil.copytree(recipe["model_name_or_path"], place)
    (place / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    return {"model_name_or_path": str(place)}


def occupied(recipe: dict[str, Any], place: Path) -> dict[str, Any]:
    place.mkdir()
    (place / "metrics.jsonl").write_text("")
    return {"output_dir": str(place)}


def few_positions(role: str):
    """A GPT-2 whose positions end before the rows do."""

    def change(recipe: dict[str, Any], place: Path) -> dict[str, Any]:
        make_model("gpt2", place, tokenizer=make_tokenizer(vocab_size=300))
        change_json(place / "config.json", lambda config: config.update(n_positions=20))
        weights = load_file(place / "model.safetensors")
        table = next(name for name in weights if name.endswith("wpe.weight"))
        weights[table] = weights[table][:20].clone()
        save_file(weights, place / "model.safetensors", metadata={"format": "pt"})
        return {f"{role}model_name_or_path": str(place)}

    return change


GOOD = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}
IMAGE = {
    "messages": [
        {"role": "user", "content": [{"type": "image"}]},
        {"role": "assistant", "content": "A cat"},
    ]
}
CASES = {
    "vocabulary": (other_vocabulary, "student and teacher do not share a vocabulary"),
    "no eos": (no_eos, "the tokenizer has no end-of-sequence token"),
    "no rows": (data(), "train.jsonl"),
    "malformed row": (data(GOOD, {"messages": "Hello"}), "line 2"),
    "an image": (data(GOOD, IMAGE), "line 2"),
    "long prompt": (
        lambda recipe, place: {"max_length": 8},
        "leaves no room for a completion within max_length=8",
    ),
    "occupied": (occupied, "already holds a run (metrics.jsonl)"),
    "student's positions": (few_positions(""), "tokens, but the student has 20 learned positions"),
    "teacher's positions": (
        few_positions("teacher_"),
        "tokens, but the teacher has 20 learned positions; set max_length to 20 or less",
    ),
    "no head": (no_head, "1 weight is missing ('lm_head.weight')"),
    "other shapes": (changed_settings("model_name_or_path", vocab_size=500), "of another shape"),
    "an encoder": (changed_settings("model_name_or_path", is_encoder_decoder=True), "-decoder"),
    "quantized": (
        changed_settings("teacher_model_name_or_path", quantization_config={"quant_method": "awq"}),
        "AWQ",
    ),
    "adapter": (adapter, "holds an adapter"),
    "attention": (lambda recipe, place: {"attn_implementation": "nonsense"}, "nonsense"),
    "no model": (
        lambda recipe, place: {"model_name_or_path": str(place)},
        "neither a model's directory that exists nor a hub name",
    ),
    "taken port": (lambda recipe, place: {}, "cannot open MASTER_PORT"),
}


@pytest.fixture(scope="module")
def jobs(
    server: Server, recipe: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Job]]:
    """All at once: most of the time they wait for each other."""
    started = {}
    with taken_port(HTTP) as port:
        for name, (change, _) in CASES.items():
            home = tmp_path_factory.mktemp("bad")
            mine = {
                **recipe,
                "max_steps": 1,
                "output_dir": str(home / "run"),
                **change(recipe, home / "place"),
            }
            env = {"MASTER_PORT": str(port)} if name == "taken port" else {}
            started[name] = server.start(2, mine, env=env)
        yield started


@pytest.mark.parametrize("name", CASES)
def test_bad_input_is_one_sentence_and_exit_code_2_on_every_rank(
    jobs: dict[str, Job], name: str
) -> None:
    job, (_, part) = jobs[name], CASES[name]
    assert job.wait() == [2, 2], job.said()
    (sentence,) = job.said(0).splitlines()
    assert sentence.startswith("gkd_ds: error: ") and part in sentence
    assert job.said(1) == "", "one sentence per node; no traceback, no progress of loading"
    assert not job.run_dir.exists() or [path.name for path in job.run_dir.iterdir()] == [
        "metrics.jsonl"
    ]

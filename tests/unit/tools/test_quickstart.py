"""What the quickstart is made of: the student's layers, the text, the recipes and the DeepSpeed
files.
"""

import json
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from gkd_ds.config.config import GKDConfig
from gkd_ds.config.recipe import read_recipe
from tests import ROOT
from tools import prepare_chatterbot, prepare_smollm2

RECIPES = sorted((ROOT / "launch/recipes").glob("*.yaml"))
DS_FILES = sorted((ROOT / "ds_configs").glob("*.json"))


@pytest.mark.parametrize("keep", [2, 3, 10, 20, 29, 30])
def test_kept_layers_are_as_many_as_asked_with_first_and_last(keep):
    kept = prepare_smollm2.kept_layers(30, keep)
    assert len(kept) == keep and kept == sorted(set(kept))
    assert kept[0] == 0 and kept[-1] == 29


@pytest.mark.parametrize("keep", [20, 24, 27])
def test_removed_layers_are_spread_evenly(keep):
    kept = prepare_smollm2.kept_layers(30, keep)
    assert max(b - a for a, b in zip(kept, kept[1:])) == 2  # never two neighbours gone


@pytest.mark.parametrize("keep", [0, 1, 31])
def test_impossible_numbers_of_layers_are_refused(keep):
    with pytest.raises(SystemExit, match="between 2 and 30"):
        prepare_smollm2.kept_layers(30, keep)


def test_student_computes_what_its_layers_of_the_teacher_compute():
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=6,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    teacher = LlamaForCausalLM(config).eval()
    ids = torch.randint(0, 50, (2, 7))
    whole, _ = prepare_smollm2.remove_layers(teacher, 6)
    torch.testing.assert_close(whole.eval()(ids).logits, teacher(ids).logits, rtol=0, atol=0)

    student, kept = prepare_smollm2.remove_layers(teacher, 4)
    teacher.model.layers = torch.nn.ModuleList(teacher.model.layers[layer] for layer in kept)
    torch.testing.assert_close(
        student.eval()(ids, use_cache=False).logits,
        teacher(ids, use_cache=False).logits,
        rtol=0,
        atol=0,
    )


def test_text_is_split_by_prompt_and_the_same_every_time(tmp_path):
    pytest.importorskip("chatterbot_corpus", reason="bash tools/setup_env.sh installs it")
    for name in ("first", "second"):
        command = [
            sys.executable,
            ROOT / "tools/prepare_chatterbot.py",
            "--output",
            tmp_path / name,
        ]
        subprocess.run(command, check=True, capture_output=True)
    prompts = {}
    for split, rows in (("train", 586), ("test", 64)):
        text = (tmp_path / "first" / f"{split}.jsonl").read_text(encoding="utf-8")
        assert text == (tmp_path / "second" / f"{split}.jsonl").read_text(encoding="utf-8")
        messages = [json.loads(line)["messages"] for line in text.splitlines()]
        assert len(messages) == rows
        assert all([m["role"] for m in row] == ["user", "assistant"] for row in messages)
        prompts[split] = {
            "".join(filter(str.isalnum, row[0]["content"].lower())) for row in messages
        }
        assert len(prompts[split]) == rows
    assert not prompts["train"] & prompts["test"]


def test_of_equal_prompts_the_first_stays():
    pairs = [
        ("Are you sad?", "No."),
        ("are you  SAD", "Not at all, why do you ask?"),
        ("Hi", "Hello"),
    ]
    assert prepare_chatterbot.first_of_each_prompt(pairs) == [pairs[0], pairs[2]]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipes_are_valid_and_name_files_that_exist(recipe, monkeypatch):
    monkeypatch.chdir(ROOT)
    config = GKDConfig(**read_recipe(str(recipe)))
    assert None not in config.read_deepspeed_files()


@pytest.mark.parametrize("path", DS_FILES, ids=lambda path: path.stem)
def test_deepspeed_files_agree_with_any_recipe(path, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)  # the NVMe directory is made where the run stands
    field = "teacher_deepspeed" if path.stem.startswith("teacher") else "deepspeed"
    saves = (
        "no" if path.stem == "student_zero3_nvme_optimizer" else "steps"
    )  # that state cannot be resumed with
    for precision in ({"bf16": False}, {"bf16": True}, {"fp16": True}):
        fields = {
            "gradient_accumulation_steps": 3,
            "learning_rate": 1e-3,
            "max_grad_norm": 0.5,
            **precision,
        }
        fields["save_strategy"] = saves
        files = GKDConfig(**{field: str(path)}, **fields).read_deepspeed_files()
        assert json.loads(path.read_text()) in files


@pytest.mark.parametrize("path", DS_FILES, ids=lambda path: path.stem)
def test_every_key_of_the_deepspeed_files_is_explained(path):
    readme = (ROOT / "ds_configs/README.md").read_text(encoding="utf-8")

    def keys(block):
        for key, value in block.items():
            yield key
            yield from keys(value) if isinstance(value, dict) else ()

    assert [key for key in keys(json.loads(path.read_text())) if key not in readme] == []


def test_saved_models_are_whole_or_absent(tmp_path):
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=50,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=3,
            num_attention_heads=2,
        )
    )

    class Interrupted:
        def save_pretrained(self, directory):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare_smollm2.save(model, Interrupted(), tmp_path / "model")
    assert prepare_smollm2.depth(tmp_path / "model") is None

    class Tokenizer:
        def save_pretrained(self, directory):
            (directory / "tokenizer.json").write_text("{}")

    prepare_smollm2.save(model, Tokenizer(), tmp_path / "model")
    assert prepare_smollm2.depth(tmp_path / "model") == 3
    AutoModelForCausalLM.from_pretrained(tmp_path / "model")

"""Tiny models and trainers for the checks, made offline in a second.

Words are tokens (tools/bench/workload.py). Initial weights are ten times the usual size, so that
distributions differ visibly from uniform ones and greedy tokens have a clear winner.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoConfig, AutoModelForCausalLM

from gkd_ds import GKDConfig, GKDTrainer
from gkd_ds.records import Rollout, Sample, Source
from tools.bench.workload import END, make_prompts, make_tokenizer

CPU = torch.device("cpu")
VOCABULARY = 256
ROWS, WINDOW, NEW_TOKENS = 32, 8, 24
# DeepSpeed would keep parameters as small as these whole: then ZeRO-3 has nothing to gather.
PARTITIONED = {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}
FIELDS = {
    "deepspeed": PARTITIONED,
    "teacher_deepspeed": PARTITIONED,
    "per_device_train_batch_size": WINDOW // 2,
    "gradient_accumulation_steps": 2,
    "max_new_tokens": NEW_TOKENS,
    "lmbda": 0.0,
    "learning_rate": 1e-3,
    "lr_scheduler_type": "constant",
    "max_steps": 3,
    "bf16": False,
    "report_to": "none",
    "save_strategy": "no",
    "logging_steps": 1,
    "disable_tqdm": True,
    "overwrite_output_dir": True,
    "watchdog_timeout": 600.0,
}


def make_model(
    directory: Path,
    seed: int,
    family: str = "llama",
    dtype: torch.dtype = torch.float32,
    drawn_on: torch.device = CPU,
    **shape: Any,
) -> Path:
    """A random model of `family` with its tokenizer in `directory`, unless it is there.

    Its numbers depend on where they are drawn: on the CPU they are the same for every accelerator.
    """
    if (directory / "config.json").exists():
        return directory
    settings = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 1024,
        "initializer_range": 0.2,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": END,
        "pad_token_id": END,
        **shape,
    }
    torch.manual_seed(seed)
    with drawn_on:
        config = AutoConfig.for_model(family, **settings)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.generation_config.eos_token_id = model.generation_config.pad_token_id = END
    model.save_pretrained(directory)
    make_tokenizer(VOCABULARY).save_pretrained(directory)
    return directory


def make_rows(count: int = ROWS) -> list[dict[str, Any]]:
    """Conversations of 50 prompt tokens, and answers of 4 to 24 words."""
    draw = random.Random(5)
    rows = []
    for prompt in make_prompts(VOCABULARY, count):
        words = [f"w{draw.randrange(3, VOCABULARY)}" for _ in range(draw.randint(4, NEW_TOKENS))]
        rows.append(
            {
                "messages": [
                    {"role": "user", "content": prompt},
                    {"role": "assistant", "content": " ".join(words)},
                ]
            }
        )
    return rows


def make_trainer(
    directory: Path,
    name: str = "run",
    student: Path | None = None,
    teacher: Path | None = None,
    **fields: Any,
) -> GKDTrainer:
    """A trainer whose run is in `directory`/`name`, on its own tiny models unless others are
    given. FIELDS hold where `fields` say nothing else.
    """
    return GKDTrainer(
        model=str(student or make_model(directory / "student", seed=1)),
        teacher_model=str(
            teacher or make_model(directory / "teacher", seed=2, num_hidden_layers=3)
        ),
        args=GKDConfig(output_dir=str(directory / name), **{**FIELDS, **fields}),
        train_dataset=Dataset.from_list(make_rows()),
    )


def metrics(directory: Path, name: str = "run") -> list[dict[str, Any]]:
    """The rows of a run's updates."""
    lines = (directory / name / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if "loss" in row]


def samples_of(trainer: GKDTrainer, count: int = WINDOW) -> list[Sample]:
    """The first prompts of the data, for the student to complete."""
    prompts = trainer.inputs.train.prompt_ids[:count]
    return [Sample(row, prompt, [], Source.STUDENT) for row, prompt in enumerate(prompts)]


def given_rollouts(prompts: list[list[int]], completion_tokens: int) -> list[Rollout]:
    """`prompts` with completions that nobody sampled, of that many tokens."""
    draw = random.Random(7)
    return [
        Rollout(
            number,
            Source.DATA,
            prompt,
            [draw.randrange(3, VOCABULARY) for _ in range(completion_tokens)],
            False,
        )
        for number, prompt in enumerate(prompts)
    ]

"""One tiny architecture through a rollout and a window, and what a dense float64 model says of both;
run by rank_server.py.

A recipe names the architecture, a folder and a form:

    plain       models as objects, ZeRO stage 0, one process. Before that it computes what is right,
                row by row, without padding or cache, and saves the models to the folder
    zero3       the saved models by name, both partitioned at ZeRO-3, on all ranks

Every rank writes <folder>/<form>.<rank>.json: what it found, or the sentence of a refusal and the
seconds until then.
"""

from __future__ import annotations

import dataclasses
import json
import os
import time
from pathlib import Path
from typing import Any

import torch
import yaml
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedModel

from gkd_ds.config.config import GKDConfig
from gkd_ds.pipeline import count_tokens
from gkd_ds.records import Sample, Source
from gkd_ds.runtime import ranks
from gkd_ds.runtime.errors import InputError
from gkd_ds.runtime.exit_codes import WRONG_INPUT
from gkd_ds.trainer import GKDTrainer
from tests.architectures import END, VOCABULARY, make_model, make_word_tokenizer
from tests.dist import plain

# (length of the prompt, length of the data's completion): a prompt of one token, rows beyond the
# window of sliding attention and the chunks of recurrent layers.
ROWS = [(1, 7), (5, 2), (24, 12), (9, 5), (3, 9), (17, 1)]
NEW_TOKENS = 12
SEEDS = 8
MARGIN = 1e-4  # between the two best logits: what fp32 can tell apart
PARTITIONED = {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}
FORMS: dict[str, dict[str, Any]] = {
    "plain": {"deepspeed": {"zero_optimization": {"stage": 0}}},
    "zero3": {"deepspeed": PARTITIONED, "teacher_deepspeed": PARTITIONED},
}


def main(argv: list[str]) -> int:
    recipe = yaml.safe_load(Path(argv[1]).read_text())
    directory, name = Path(recipe["output_dir"]), recipe["architecture"]
    if recipe["form"] == "zero3":
        return run(directory, "zero3", str(directory / "student"), str(directory / "teacher"))
    right = reference(name)
    (directory / "reference.json").write_text(json.dumps(right))
    student, teacher = make_pair(name, right["seed"])
    for role, model in (("student", student), ("teacher", teacher)):
        model.save_pretrained(directory / role)
    return run(directory, "plain", student, teacher)


def make_pair(name: str, seed: int) -> tuple[PreTrainedModel, PreTrainedModel]:
    """The student, and a teacher with other weights and, where that can be, one layer more."""
    return make_model(name, seed), make_model(name, seed + 1000, more_layers=1)


def rows() -> list[dict[str, Any]]:
    """The window's rows: words all over the vocabulary, no stop token among them."""
    draw = torch.Generator().manual_seed(7)
    words = lambda count: torch.randint(6, VOCABULARY, (count,), generator=draw).tolist()  # noqa: E731
    return [{"prompt_ids": words(p), "completion_ids": words(c)} for p, c in ROWS]


# ---------------------------------------------------------------------------------------- the reference


def reference(name: str) -> dict[str, Any]:
    """What float64 says, of the first seed whose tokens fp32 can tell from the second best."""
    for seed in range(SEEDS):
        try:
            right = dense(*make_pair(name, seed), torch.float64)
        except RuntimeError:  # of models that compute some part in fp32, whatever they are given
            right = dense(*make_pair(name, seed), torch.float32)
        if right["margin"] > MARGIN:
            return {"seed": seed, **right}
    raise AssertionError(f"{name}: no seed of {SEEDS} has clear margins")


def dense(student: PreTrainedModel, teacher: PreTrainedModel, dtype: torch.dtype) -> dict[str, Any]:
    """Loss, gradient norm and greedy tokens, and the margin of those tokens."""
    for model in (student.to(dtype), teacher.to(dtype)):
        model.config.get_text_config(decoder=True).use_cache = False
        model.set_experts_implementation("eager")  # torch has no grouped product of doubles
    loss = plain.window_loss(student, teacher, rows())
    loss.backward()
    gradients = [p.grad.norm() for p in student.parameters() if p.grad is not None]
    written, margins = zip(*(greedy(student, row["prompt_ids"]) for row in rows()))
    # Rows must end at different times: the tokens that stop are some that were written.
    stops = [END, written[0][3], written[2][7]]
    return {
        "dtype": str(dtype),
        "loss": loss.item(),
        "grad_norm": torch.stack(gradients).norm().item(),
        "stop_ids": stops,
        "tokens": [until(tokens, stops) for tokens in written],
        "margin": min(margins),
    }


@torch.no_grad()
def greedy(model: PreTrainedModel, prompt_ids: list[int]) -> tuple[list[int], float]:
    """The best token again and again, each by a whole forward; and the smallest margin."""
    ids, margins = list(prompt_ids), []
    for _ in range(NEW_TOKENS):
        logits_V: Tensor = model(input_ids=torch.tensor([ids])).logits[0, -1, :VOCABULARY]
        (best, second), places = logits_V.topk(2)
        margins.append((best - second).item())
        ids.append(int(places[0]))
    return ids[len(prompt_ids) :], min(margins)


def until(tokens: list[int], stops: list[int]) -> list[int]:
    ends = [place for place, token in enumerate(tokens) if token in stops]
    return tokens[: ends[0] + 1] if ends else tokens


# ---------------------------------------------------------------------------------------- gkd_ds


def run(directory: Path, form: str, student: Any, teacher: Any) -> int:
    """Write what gkd_ds does with the pair; the exit code."""
    result = directory / f"{form}.{os.environ['RANK']}.json"
    started = time.monotonic()
    try:
        trainer = build(directory, form, student, teacher)
        assert trainer.pipeline is not None  # engines are built, and tried out, when asked for
    except InputError as error:
        seconds = time.monotonic() - started
        result.write_text(json.dumps({"refused": str(error), "seconds": seconds}))
        return WRONG_INPUT
    built = time.monotonic() - started
    expected = json.loads((directory / "reference.json").read_text())
    found = {"tokens": rollout(trainer, expected["stop_ids"]), **window(trainer)}
    seconds = {"start": built, "all": time.monotonic() - started}
    result.write_text(json.dumps({**found, "seconds": seconds}))
    ranks.barrier()
    return 0


def build(directory: Path, form: str, student: Any, teacher: Any) -> GKDTrainer:
    config = GKDConfig(
        output_dir=str(directory / form),
        per_device_train_batch_size=2,
        max_new_tokens=NEW_TOKENS,
        max_length=64,
        temperature=0.0,
        max_steps=1,
        report_to="none",
        save_strategy="no",
        ddp_timeout=60,
        deepspeed_log_level="error",
        **FORMS[form],
    )
    return GKDTrainer(
        model=student,
        teacher_model=teacher,
        args=config,
        train_dataset=Dataset.from_list([{"messages": as_chat(row)} for row in rows()]),
        processing_class=make_word_tokenizer(),
    )


def as_chat(row: dict[str, list[int]]) -> list[dict[str, str]]:
    """The row's words as messages: the start-up checks see lengths such as the window's."""
    question, answer = (
        " ".join(f"w{token}" for token in row[key]) for key in ("prompt_ids", "completion_ids")
    )
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def samples(source: Source) -> list[Sample]:
    """This rank's share of the rows: rank 0 of two has four of six."""
    all_samples = [
        Sample(index, row["prompt_ids"], row["completion_ids"], source)
        for index, row in enumerate(rows())
    ]
    if ranks.world_size() == 1:
        return all_samples
    return all_samples[:4] if ranks.rank() == 0 else all_samples[4:]


def rollout(trainer: GKDTrainer, stop_ids: list[int]) -> dict[int, list[int]]:
    """Greedy completions of this rank's rows."""
    pipeline = trainer.pipeline
    pipeline.sampling = dataclasses.replace(pipeline.sampling, stop_ids=tuple(stop_ids))
    written = pipeline.rollout(samples(Source.STUDENT), {Source.STUDENT})
    return {rollout.sample_id: rollout.completion_ids for rollout in written}


def window(trainer: GKDTrainer) -> dict[str, float]:
    """Loss and gradient norm of the data's completions."""
    pipeline = trainer.pipeline
    rollouts = pipeline.rollout(samples(Source.DATA), {Source.DATA})
    total = count_tokens(rollouts)
    learned = pipeline.learn(rollouts, pipeline.score(rollouts), total)
    trainer.student.update()
    (divergence,) = ranks.all_reduce_sum([sum(learned.divergence)])
    return {"loss": divergence / total, "grad_norm": trainer.student.grad_norm}

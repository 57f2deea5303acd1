"""Rollouts through DeepSpeed's hybrid engine: its injected inference kernels where it has a policy
for the model.

Injection replaces whole layers by DeepSpeed's own, which lag behind transformers: on the CPU they
are missing, its source knows neither grouped-query attention nor scaled rotations, and users report
gibberish under ZeRO-3 (DeepSpeed issues 4788 and 3594; read, not tried here). So the engine is used
only when asked for, after `obstacle` found none, and after `check` saw it write the plain model's
tokens. Sampling is ours all the same (sampling.py), so tokens do not depend on the rollout engine.
NOT TESTED with kernels: this project has had no GPU. Without a policy (Qwen, Mistral, OPT) the
engine runs natively.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from deepspeed.module_inject.replace_policy import replace_policies
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedModel

from gkd_ds.engine import accelerator, zero
from gkd_ds.learn.student import Student
from gkd_ds.records import Completions, Sample, Source
from gkd_ds.rollout.decoder import of_student
from gkd_ds.rollout.engine import RolloutEngine
from gkd_ds.rollout.sampling import Sampling, draw, uniforms
from gkd_ds.runtime.errors import InputError

DS_BLOCK = {
    "enabled": True,
    "max_out_tokens": 512,
    "inference_tp_size": 1,
    "release_inference_cache": False,
}


class Hybrid(RolloutEngine):
    """`rollout_engine: hybrid`. Raises InputError where it writes greedily what the plain model
    does not.
    """

    def __init__(self, student: Student):
        super().__init__(student)
        probe = [Sample(0, [1, 2, 3, 4, 5, 6], [], Source.STUDENT)]
        greedy = Sampling(8, 0.0, 0, (), 0, student.vocabulary)
        with zero.gathered_parameters(student.engine, student.counters):
            ours = self.generate(probe, greedy, lambda: None)
            student.model.eval()  # the engine has left it in training mode
            plain = of_student(student).complete(probe, greedy, lambda: None)
        student.to_learn()
        check(ours, plain)

    @staticmethod
    def prepare(ds_config: dict[str, Any], root: zero.EngineRoot, model: PreTrainedModel) -> None:
        """Ask for DeepSpeed's hybrid engine, which wants a model's configuration and `generate`."""
        ds_config["hybrid_engine"] = DS_BLOCK
        root.config, root.generate = model.config, model.generate

    @contextmanager
    def window(self) -> Iterator[None]:
        """The whole student on every rank."""
        student = self.student
        with student.sampling(), zero.gathered_parameters(student.engine, student.counters):
            yield

    def generate(
        self, samples: list[Sample], sampling: Sampling, heartbeat: Callable[[], None]
    ) -> Completions:
        """One call of DeepSpeed's `generate`, which tells nobody how far it is."""
        engine, device = self.student.engine, self.student.device
        prompts = [sample.prompt_ids for sample in samples]
        if not prompts:
            return Completions([], [], 0, 0)
        width = max(len(prompt) for prompt in prompts)
        pads = [width - len(prompt) for prompt in prompts]
        padded = [[sampling.pad_id] * pad + ids for pad, ids in zip(pads, prompts)]
        ids_BL = torch.tensor(padded, device=device)
        mask_BL = torch.tensor(
            [[0] * pad + [1] * len(ids) for pad, ids in zip(pads, prompts)], device=device
        )
        limits = [sampling.limit(prompt) for prompt in prompts]
        sample_ids = [sample.sample_id for sample in samples]
        uniform_BP = uniforms(sampling.seed, sample_ids, max(limits), device)
        with _inference_mode(engine):
            tokens_BP = engine.module.generate(
                input_ids=ids_BL,
                attention_mask=mask_BL,
                max_new_tokens=max(limits),
                do_sample=False,
                eos_token_id=list(sampling.stop_ids),
                pad_token_id=sampling.pad_id,
                logits_processor=LogitsProcessorList([_InverseCdf(uniform_BP, width, sampling)]),
            )[:, width:].tolist()
        completions = [
            _cut(ids[:limit], sampling.stop_ids) for ids, limit in zip(tokens_BP, limits)
        ]
        stopped = [ids[-1] in sampling.stop_ids for ids in completions]
        steps = len(prompts) * (len(tokens_BP[0]) - 1)
        return Completions(completions, stopped, steps, ids_BL.numel())


def obstacle(model: PreTrainedModel) -> str | None:
    """Why the hybrid engine cannot serve this model on this machine, as far as one can tell before
    trying.
    """
    if not _has_policy(model):
        return None  # nothing is injected, so nothing can be wrong
    text = model.config.get_text_config()
    if accelerator.on_cpu():
        name = type(model).__name__
        return (
            f"DeepSpeed would inject kernels into {name}, and they are not implemented on the CPU"
        )
    heads = text.num_attention_heads
    if (getattr(text, "num_key_value_heads", None) or heads) != heads:
        return "DeepSpeed's injected attention does not know grouped queries"
    rope = getattr(text, "rope_parameters", None) or {}
    if rope.get("rope_type", "default") != "default":
        return (
            f"DeepSpeed's injected attention does not know rotations of type {rope['rope_type']!r}"
        )
    return None


def _has_policy(model: PreTrainedModel) -> bool:
    known: list[type] = []
    for policy in replace_policies:
        policy(None)  # policies find their layer class when they are made
        classes = policy._orig_layer_class
        known += classes if isinstance(classes, list) else [classes]
    return any(type(module) in known for module in model.modules())


@contextlib.contextmanager
def _inference_mode(engine):
    """`engine.eval()` puts the injected layers in place and prints latencies; `engine.train()`
    takes them out.
    """
    with contextlib.redirect_stdout(io.StringIO()):
        engine.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        engine.train()


def _cut(tokens: list[int], stop_ids: tuple[int, ...]) -> list[int]:
    end = next((place for place, token in enumerate(tokens) if token in stop_ids), len(tokens) - 1)
    return tokens[: end + 1]


class _InverseCdf(LogitsProcessor):
    """Leaves one possible token: the one that the run's uniform for this sample and position
    draws.
    """

    def __init__(self, uniform_BP: Tensor, prompt_width: int, sampling: Sampling):
        self.uniform_BP, self.prompt_width, self.sampling = uniform_BP, prompt_width, sampling

    def __call__(self, input_ids: Tensor, scores_BV: Tensor) -> Tensor:
        position = input_ids.shape[1] - self.prompt_width
        shared_BV = scores_BV[:, : self.sampling.vocabulary]
        token_B = draw(shared_BV, self.uniform_BP[:, position], self.sampling.temperature)
        return torch.full_like(scores_BV, -torch.inf).scatter_(1, token_B[:, None], 0.0)


def check(ours: Completions, plain: Completions) -> None:
    """Raise InputError unless the hybrid engine wrote greedily what the plain model writes."""
    if ours.token_ids != plain.token_ids:
        raise InputError(
            "rollout_engine 'hybrid' is not possible here: with DeepSpeed's kernels the student "
            "writes other tokens "
            f"than without ({ours.token_ids[0][:8]} instead of {plain.token_ids[0][:8]}); use "
            "'gather' or 'auto'."
        )

"""Other ways to write the same tokens."""

from __future__ import annotations

from pathlib import Path

from transformers import AutoModelForCausalLM

from gkd_ds.records import Source
from gkd_ds.rollout.hybrid import obstacle
from gkd_ds.runtime.errors import InputError
from tools.gpu_check.materials import make_model, make_trainer, samples_of
from tools.gpu_check.outcome import PASSED, Outcome, Skip, judge


def hybrid_native(directory: Path) -> Outcome:
    """Qwen3, for which DeepSpeed has no kernels: its hybrid engine runs the model as it is."""
    student = make_model(directory / "qwen3", seed=1, family="qwen3")
    return _beside_gather(directory, student)


def hybrid_kernels(directory: Path) -> Outcome:
    """A Llama with as many heads for keys as for queries, the only kind that DeepSpeed's kernels
    know. Being refused for writing other tokens is what the engine's own check is for.
    """
    student = make_model(directory / "llama", seed=1, num_key_value_heads=4)
    if reason := obstacle(AutoModelForCausalLM.from_pretrained(student)):
        raise Skip(reason)
    try:
        return _beside_gather(directory, student)
    except InputError as refused:
        return Outcome(PASSED, f"refused, as it must be: {refused}", {"refused": True})


def _beside_gather(directory: Path, student: Path) -> Outcome:
    written = {}
    for engine in ("gather", "hybrid"):
        trainer = make_trainer(
            directory, engine, student=student, rollout_engine=engine, lmbda=1.0, temperature=1.0
        )
        rollouts = trainer.pipeline.rollout(samples_of(trainer), {Source.STUDENT})
        written[engine] = [rollout.completion_ids for rollout in rollouts]
    rows = len(written["gather"])
    same = sum(a == b for a, b in zip(written["hybrid"], written["gather"]))
    return judge(
        same == rows,
        f"{same} of {rows} sampled completions equal those of `gather`.",
        rows=rows,
        same=same,
    )


def cuda_graph(directory: Path) -> Outcome:
    raise Skip("gkd_ds does not run its decode step as a CUDA graph yet (issue H)")

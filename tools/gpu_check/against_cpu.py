"""The accelerator beside the CPU: the same recipe (recipe.py) in two processes, with the same seeds.

Differences are relative, of a gradient in L2 norm over all parameters. A greedy token may be another
one only where the CPU's own model finds the two tokens nearly equal: the gap is the difference of
their logits there, in fp32, in units of the logits' standard deviation; after the first other token
of a row, the rest of it is another text and says nothing.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from tools.gpu_check.outcome import PASSED, Outcome, judge

# What is put into the environment of each side.
SIDES = {"this accelerator": {}, "the CPU": {"DS_ACCELERATOR": "cpu"}}


@dataclass(frozen=True)
class Allowed:
    """The largest differences that pass."""

    loss: float
    gradient: float
    gap: float


# fp32: sums in another order. bf16: about twice what bf16 on the CPU differs from fp32 on the CPU.
ALLOWED = {
    "fp32": Allowed(loss=1e-4, gradient=1e-3, gap=1e-3),
    "bf16": Allowed(loss=1e-2, gradient=1.5e-1, gap=1e-1),
}
SECONDS = 100  # for a side to have run the recipe in both precisions


def both_precisions(directory: Path) -> Outcome:
    """A side that fails or hangs in one precision has left what it did in the other."""
    problems = _run_both(directory)
    sentences, numbers, holds = list(problems), {}, not problems
    for precision, allowed in ALLOWED.items():
        here, cpu = (directory / side / precision for side in SIDES)
        if all((place / "results.pt").exists() for place in (here, cpu)):
            found = _compare(here, cpu, allowed)
            numbers[precision], holds = found.numbers, holds and found.outcome == PASSED
            sentences.append(f"{precision}: {found.sentence}")
    return judge(holds, "; ".join(sentences) + ".", **numbers)


def _run_both(directory: Path) -> list[str]:
    """Run the recipe on this accelerator and on the CPU, at the same time; what went wrong."""
    deadline, running, problems = time.monotonic() + SECONDS, {}, []
    for side, choice in SIDES.items():
        place = directory / side
        place.mkdir()
        running[side] = subprocess.Popen(
            [sys.executable, "-m", "tools.gpu_check.recipe", str(place)],
            env={**os.environ, **choice},
        )
    for side, process in running.items():
        try:
            if code := process.wait(deadline - time.monotonic()):
                problems.append(f"the recipe failed on {side} (exit code {code})")
        except subprocess.TimeoutExpired:
            process.kill()
            problems.append(f"the recipe had not ended on {side} after {SECONDS} s")
    return problems


def _compare(here_at: Path, cpu_at: Path, allowed: Allowed) -> Outcome:
    here, cpu = (torch.load(place / "results.pt") for place in (here_at, cpu_at))
    losses, norms = (
        max(abs(a - b) / abs(b) for a, b in zip(here[name], cpu[name]))
        for name in ("losses", "gradient_norms")
    )
    gradient = _gradient_difference(here_at, cpu_at)
    gaps = _gaps(here, cpu, cpu_at.parent / "student")
    compared, equal = _tokens(here, cpu)
    holds = max(losses / allowed.loss, max(norms, gradient) / allowed.gradient) <= 1
    holds = holds and max(gaps, default=0.0) <= allowed.gap
    text = (
        f"losses on {here['device']} within {losses:.1e} of the CPU's ({allowed.loss:.0e} allowed), "
        f"gradients {gradient:.1e} and their norms {norms:.1e} ({allowed.gradient:.0e}), "
        f"{equal} of {compared} greedy tokens equal"
    )
    if gaps:
        text += f", the others within {max(gaps):.1e} of a tie ({allowed.gap:.0e})"
    return judge(
        holds,
        text,
        loss_difference=losses,
        gradient_difference=gradient,
        gradient_norm_difference=norms,
        tokens_compared=compared,
        tokens_equal=equal,
        gaps=gaps,
        allowed=vars(allowed),
        losses=here["losses"],
        losses_on_cpu=cpu["losses"],
    )


def _gradient_difference(here: Path, cpu: Path) -> float:
    ours, theirs = (torch.load(place / "gradients.pt") for place in (here, cpu))
    assert ours.keys() == theirs.keys()
    both = [(ours[name].double(), theirs[name].double()) for name in ours]
    difference = sum(float((a - b).square().sum()) for a, b in both)
    return (difference / sum(float(b.square().sum()) for _, b in both)) ** 0.5


def _tokens(here: dict[str, Any], cpu: dict[str, Any]) -> tuple[int, int]:
    """How many tokens can be compared, each row up to its first other one, and how many are equal."""
    compared = equal = 0
    for ours, theirs in zip(here["tokens"], cpu["tokens"]):
        same = _same(ours, theirs)
        equal += same
        compared += min(same + 1, len(theirs))
    return compared, equal


def _gaps(here: dict[str, Any], cpu: dict[str, Any], student: Path) -> list[float]:
    """For every row with another token: how far the CPU's model is from a tie of the two."""
    others = [
        (prompt + theirs[:place], ours[place], theirs[place])
        for prompt, ours, theirs in zip(cpu["prompts"], here["tokens"], cpu["tokens"])
        if (place := _same(ours, theirs)) < min(len(ours), len(theirs))
    ]
    if not others:
        return []
    model = AutoModelForCausalLM.from_pretrained(student).eval()
    gaps = []
    for ids, ours, theirs in others:
        with torch.no_grad():
            logits_V = model(torch.tensor([ids])).logits[0, -1].float()
        gaps.append(float((logits_V[theirs] - logits_V[ours]).abs() / logits_V.std()))
    return gaps


def _same(ours: list[int], theirs: list[int]) -> int:
    """The number of tokens before the first that differs."""
    return len(os.path.commonprefix([ours, theirs]))

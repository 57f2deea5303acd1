"""How many floating-point operations and bytes an update needs, phase by phase: the same numbers
for every side.

Counted is what the mathematics needs for the real tokens (a multiply-add is two operations): no
padding, no recomputation, the heads at completion positions only. What a side computes beyond that
lowers its share of the peak. Bytes are those of fp32 weights, their gradients and Adam's moments,
and of the key-value cache, which do not fit a processor's caches; what lives between two operations
(activations, logits) could and is left out.
"""

from __future__ import annotations

from tools.bench.workload import PROMPT_TOKENS, SHAPES


def phase_flops(vocabulary: int, lengths: list[int]) -> dict[str, float]:
    """Operations of one update whose samples have PROMPT_TOKENS prompt tokens and `lengths`
    completion tokens.
    """
    tokens, sequence_tokens = sum(lengths), sum(PROMPT_TOKENS + length for length in lengths)
    head = {role: 2 * vocabulary * SHAPES[role]["hidden_size"] * tokens for role in SHAPES}
    body = {
        role: 2 * _weights(role) * sequence_tokens + _attention(role, lengths) for role in SHAPES
    }
    return {
        "rollout": body["student"] + head["student"],
        "score": body["teacher"],
        # Both heads forward; the student's body and head backward cost twice their forward.
        "learn": 3 * body["student"] + 3 * head["student"] + head["teacher"],
    }


def phase_bytes(vocabulary: int, lengths: list[int]) -> dict[str, float]:
    """Bytes that one rank with these completions moves per update, at least: each weight once per
    pass over it.
    """
    student = _weights("student") + vocabulary * SHAPES["student"]["hidden_size"]
    teacher_head = vocabulary * SHAPES["teacher"]["hidden_size"]
    everything = student + vocabulary * SHAPES["student"]["hidden_size"]  # and the input embedding
    cached = sum(length * PROMPT_TOKENS + length * (length + 1) / 2 for length in lengths)
    numbers = {
        # All rows in one batch: a pass over the weights per step. Each token reads the keys and
        # values before it, which are half as wide as the hidden states.
        "rollout": max(lengths) * student + cached * _key_value_width("student"),
        "score": _weights("teacher"),
        # Forward, backward, and the gradient written.
        "learn": 3 * student + teacher_head,
        # Adam reads weight, gradient and two moments, and writes all but the gradient.
        "update": 7 * everything,
    }
    return {phase: 4 * count for phase, count in numbers.items()}


def _key_value_width(role: str) -> int:
    """Numbers that the cache keeps per token: keys and values, half the heads, in all layers."""
    return SHAPES[role]["num_hidden_layers"] * SHAPES[role]["hidden_size"]


def _weights(role: str) -> int:
    """Elements of the matrices in the layers: query and output, key and value (half the heads),
    gate, up and down.
    """
    shape = SHAPES[role]
    width = shape["hidden_size"]
    return shape["num_hidden_layers"] * (3 * width * width + 3 * width * shape["intermediate_size"])


def _attention(role: str, lengths: list[int]) -> float:
    """Scores and weighted values: each token looks at itself and those before it."""
    shape = SHAPES[role]
    pairs = sum((PROMPT_TOKENS + length) * (PROMPT_TOKENS + length + 1) / 2 for length in lengths)
    return 4 * pairs * shape["hidden_size"] * shape["num_hidden_layers"]

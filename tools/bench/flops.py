"""How many floating-point operations an update needs, phase by phase: the same numbers for every side.

Counted is what the mathematics needs for the real tokens (a multiply-add is two operations): no padding, no
recomputation, the heads at completion positions only. What a side computes beyond that lowers its share of the peak.
"""

from __future__ import annotations

from tools.bench.workload import PROMPT_TOKENS, SHAPES


def phase_flops(vocabulary: int, lengths: list[int]) -> dict[str, float]:
    """Operations of one update whose samples have PROMPT_TOKENS prompt tokens and `lengths` completion tokens."""
    tokens, sequence_tokens = sum(lengths), sum(PROMPT_TOKENS + length for length in lengths)
    head = {role: 2 * vocabulary * SHAPES[role]["hidden_size"] * tokens for role in SHAPES}
    body = {role: 2 * _weights(role) * sequence_tokens + _attention(role, lengths) for role in SHAPES}
    return {
        "rollout": body["student"] + head["student"],
        "score": body["teacher"],
        # Both heads forward; the student's body and head backward cost twice their forward.
        "learn": 3 * body["student"] + 3 * head["student"] + head["teacher"],
    }


def _weights(role: str) -> int:
    """Elements of the matrices in the layers: query and output, key and value (half the heads), gate, up and down."""
    shape = SHAPES[role]
    width = shape["hidden_size"]
    return shape["num_hidden_layers"] * (3 * width * width + 3 * width * shape["intermediate_size"])


def _attention(role: str, lengths: list[int]) -> float:
    """Scores and weighted values: each token looks at itself and those before it."""
    shape = SHAPES[role]
    pairs = sum((PROMPT_TOKENS + length) * (PROMPT_TOKENS + length + 1) / 2 for length in lengths)
    return 4 * pairs * shape["hidden_size"] * shape["num_hidden_layers"]

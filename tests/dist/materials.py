"""The models that the scenarios use.

PYTHONPATH=. python -m tests.dist.materials DIRECTORY
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

from tests.tiny import FAMILIES, MIXTURES, UNUSUAL, make_model, make_tokenizer

# Student family -> teacher family: every family takes each part once.
FAMILY_PAIRS = dict(zip(FAMILIES, FAMILIES[1:] + FAMILIES[:1]))
UNUSUAL_PAIRS = dict(zip(UNUSUAL, UNUSUAL[1:] + UNUSUAL[:1]))
PADDED = 416  # rows of an embedding for 384 tokens
LONGROPE = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 40}
LONGROPE |= {"factor": 4.0}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}


def make_materials(directory: Path) -> Path:
    """Every model is a directory of its own; all share one tokenizer. Takes ten seconds."""
    tokenizer = make_tokenizer()

    def make(family: str, name: str, **how) -> None:
        make_model(family, directory / name, tokenizer=tokenizer, **how)

    make("llama", "student", seed=1, vocab_size=PADDED)
    make("llama", "untied", seed=1, tie_word_embeddings=False)
    make("llama", "wide", seed=1, hidden=256, vocab_size=512, init_range=0.1)
    make("gpt2", "dropout", seed=1)
    make("llama", "teacher", seed=2, layers=3, hidden=96)
    make("llama", "teacher-large", seed=2, hidden=640, init_range=0.05)
    make("qwen2", "qwen2-student", seed=1)
    make("qwen2", "qwen2-teacher", seed=2, layers=3, hidden=96, vocab_size=PADDED)
    for family in MIXTURES:
        make(family, family, seed=1)
    for number, family in enumerate(FAMILIES + UNUSUAL):
        # Both heads are tied or not in turn, and the vocabulary is padded on one side in turn.
        tied, padded = number % 2 == 0, number % 3 == 0
        make(
            family,
            f"{family}-s",
            seed=3,
            tie_word_embeddings=tied,
            vocab_size=PADDED if padded else None,
        )
        make(
            family,
            f"{family}-t",
            seed=4,
            layers=3,
            hidden=96,
            tie_word_embeddings=not tied,
            vocab_size=PADDED,
        )
        # transformers would add a token to some families' tokenizers when it loads them (Qwen's
        # <|endoftext|>), and then the pairs would not share a vocabulary. Without one a teacher is
        # taken to use the student's.
        for file in (directory / f"{family}-t").glob("tokenizer*"):
            file.unlink()

    def variant(of: str, name: str, **settings) -> None:
        shutil.copytree(directory / of, directory / name)
        file = directory / name / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | settings))

    lengths = {"max_position_embeddings": 160, "original_max_position_embeddings": 40}
    for role, pairs in (("s", 8), ("t", 12)):  # of the numbers of a head
        factors = {"short_factor": [1.0] * pairs, "long_factor": [4.0] * pairs}
        variant(f"phi3-{role}", f"longrope-{role}", rope_parameters=LONGROPE | factors, **lengths)
    variant("student", "dynamic", rope_parameters=DYNAMIC, max_position_embeddings=40)
    variant("mixtral", "jitter", router_jitter_noise=0.1)
    return directory


if __name__ == "__main__":
    print(make_materials(Path(sys.argv[1])))

"""Fixtures of the tests in one process. Nobody changes what they give."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="session")
def tokenizer():
    """The tiny tokenizer (tests/tiny.py)."""
    from tests.tiny import make_tokenizer  # late: importing transformers takes seconds

    return make_tokenizer()


@pytest.fixture(scope="session")
def model(tokenizer):
    """A tiny Llama."""
    from tests.tiny import make_model

    return make_model("llama", tokenizer=tokenizer, seed=4)

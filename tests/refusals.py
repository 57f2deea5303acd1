"""What a refusal must be: one sentence for a user."""

from __future__ import annotations

import re

import pytest

from gkd_ds.config.config import GKDConfig
from gkd_ds.runtime.errors import InputError


def assert_one_sentence(message: str, *parts: str) -> None:
    assert "\n" not in message and message.endswith((".", "?")), message
    assert len(re.findall(r"[a-z)'\"][.] [A-Z]", message)) == 0, (
        f"more than one sentence: {message}"
    )
    for part in parts:
        assert part in message, f"{part!r} is not in: {message}"


def refusal(**settings) -> str:
    """The sentence with which `validate_files` refuses these fields."""
    with pytest.raises(InputError) as caught:
        GKDConfig(**settings).validate_files()
    assert_one_sentence(str(caught.value))
    return str(caught.value)

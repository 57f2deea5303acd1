"""Fixtures of the tests with real ranks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.dist import runs
from tests.dist.rank_server import Server


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    """Starts ranks of gkd_ds.train in a second (rank_server.py)."""
    with Server() as server:
        yield server


@pytest.fixture(scope="session")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A recipe with tiny models and ten conversations, without output_dir. Copy it, do not change it."""
    return runs.make_models(tmp_path_factory.mktemp("models"))

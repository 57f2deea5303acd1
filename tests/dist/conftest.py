"""Fixtures of the tests with real ranks."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.dist import outcomes, runs
from tests.dist.rank_server import Server


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    """Starts ranks of gkd_ds.train in a second (rank_server.py)."""
    with Server() as server:
        yield server


@pytest.fixture(scope="session")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A recipe with tiny models and ten conversations, without output_dir. Copy it, do not change
    it.
    """
    return runs.make_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def settings(request: pytest.FixtureRequest, recipe: dict[str, Any]) -> dict[str, Any]:
    """The recipe with what the test's module says in SETTINGS."""
    return {**recipe, **request.module.SETTINGS}


@pytest.fixture(scope="module")
def whole(
    server: Server, settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The directory of a run with these settings on two ranks that nothing interrupted."""
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    server.run(2, {**settings, "output_dir": str(run_dir)})
    return run_dir


@pytest.fixture(scope="session")
def materials(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The models of tests/dist/materials.py, read by the scenarios and by the tests."""
    from tests.dist.materials import make_materials  # late: importing transformers takes seconds

    return make_materials(tmp_path_factory.mktemp("materials"))


@pytest.fixture(scope="session")
def two_ranks(materials: Path, tmp_path_factory: pytest.TempPathFactory) -> outcomes.Results:
    """What the scenarios (tests/dist/scenarios) returned on two ranks."""
    return outcomes.on_two_ranks(materials, tmp_path_factory.mktemp("two"))


@pytest.fixture(scope="session")
def one_rank(materials: Path, tmp_path_factory: pytest.TempPathFactory) -> outcomes.Results:
    """What some of them returned on one rank."""
    return outcomes.on_one_rank(materials, tmp_path_factory.mktemp("one"))

"""Scripts written for TRL and transformers run unchanged but for their imports (tests/scripts)."""

from __future__ import annotations

import ast
import json
import subprocess
import sys

import pytest

from tests import ROOT
from tests.dist.rank_server import environment

MODULES = ("training", "models", "evaluation", "callbacks", "subclasses", "data")


def names() -> list[str]:
    """Those of the scripts, without importing what they import."""
    found = []
    for module in MODULES:
        tree = ast.parse((ROOT / "tests" / "scripts" / f"{module}.py").read_text())
        functions = [node.name for node in tree.body if isinstance(node, ast.FunctionDef)]
        found += sorted(name for name in functions if not name.startswith("_"))
    return found


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    """All of them, one after the other in one process, as the cells of a notebook."""
    pytest.importorskip("accelerate")
    directory = tmp_path_factory.mktemp("scripts")
    log = directory / "log.txt"
    with log.open("w") as file:
        subprocess.run(
            [sys.executable, "-m", "tests.scripts.run", str(directory)],
            cwd=ROOT,
            env=environment(),
            stdout=file,
            stderr=subprocess.STDOUT,
            timeout=1200,
        )
    path = directory / "outcomes.json"
    assert path.exists(), log.read_text()[-3000:]
    return json.loads(path.read_text())


def test_there_are_many(outcomes: dict[str, dict]) -> None:
    assert list(outcomes) == names() and len(outcomes) > 60


@pytest.mark.parametrize("name", names())
def test_script(outcomes: dict[str, dict], name: str) -> None:
    assert not outcomes[name]["error"], outcomes[name]["error"]

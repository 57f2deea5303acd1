"""tests/FAULTS.md names tests that exist, in few words."""

from __future__ import annotations

import ast
import re

from tests import ROOT

MOST_WORDS = 17  # of what happens
TABLE = (ROOT / "tests" / "FAULTS.md").read_text()
ROWS = [line.strip("| ").split(" | ") for line in TABLE.splitlines() if "test_" in line]
ROWS = [row for row in ROWS if len(row) == 2]


def test_every_test_in_the_table_exists() -> None:
    named = re.findall(r"`((?:unit|dist|launch)/[\w/]+\.py)(?:::(\w+))?`", TABLE)
    assert len(named) >= len(ROWS) > 50
    missing = []
    for file, name in named:
        path = ROOT / "tests" / file
        body = ast.parse(path.read_text()).body if path.exists() else []
        tests = {node.name for node in body if isinstance(node, ast.FunctionDef)}
        if not path.exists() or (name and name not in tests):
            missing.append(f"{file}::{name}")
    assert not missing


def test_every_line_is_short_and_names_its_test() -> None:
    for what, tests in ROWS:
        assert len(what.split()) <= MOST_WORDS, what
        assert re.search(r"`[\w/]+\.py", tests), what

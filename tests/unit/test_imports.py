"""The house stays as it was drawn: imports run one way, modules are short, DeepSpeed's internals have
few readers.

All imports count, those inside functions and under TYPE_CHECKING too.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

from tests import ROOT

# From the top: a module imports from its own folder and from lines below it. Folders on one line may
# use each other one way, but not in a circle.
LAYERS = [
    ["gkd_ds"],  # the public API, `__init__.py`
    ["train", "evaluate"],
    ["trainer"],
    ["surface"],
    ["loop"],
    ["logs"],
    ["saving"],
    ["checkpoint"],
    ["monitor"],
    ["engines"],
    ["pipeline"],
    ["models"],
    ["plan"],
    ["teacher"],
    ["rollout"],
    ["learn"],
    ["engine"],
    ["config", "data"],
    ["records"],
    ["overrides"],
    ["runtime"],
]
HEIGHT = {name: -line for line, names in enumerate(LAYERS) for name in names}
MOST_LINES = 400
# DeepSpeed changes these without notice. Everybody may use `deepspeed`, its accelerator and its
# collectives.
INTERNALS = ("deepspeed.runtime", "deepspeed.module_inject", "deepspeed.ops")
READERS_OF_INTERNALS = (
    "gkd_ds.engine.",
    "gkd_ds.runtime.process_group",
    "gkd_ds.rollout.hybrid",
    "gkd_ds.teacher.nvme",
    "gkd_ds.checkpoint.engine_files",
    "gkd_ds.checkpoint.resharding",
)


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {name_of(path): path for path in sorted((ROOT / "gkd_ds").rglob("*.py"))}
TREES = {module: ast.parse(path.read_text()) for module, path in FILES.items()}


def imported(module: str) -> Iterator[str]:
    """Full names of what a module imports: of `from a import b`, `a.b`."""
    for node in ast.walk(TREES[module]):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}, line {node.lineno}: a relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def modules_imported(module: str) -> set[str]:
    """Those of this package: of a name in a module, the module."""
    found = set()
    for name in imported(module):
        if name.split(".")[0] == "gkd_ds":
            found.add(name if name in FILES else name.rpartition(".")[0])
    assert found <= FILES.keys(), f"{module} imports what is not there: {found - FILES.keys()}"
    return found


ARROWS = {module: modules_imported(module) for module in FILES}


def folder(module: str) -> str:
    """The part of a module's name that has a line in LAYERS."""
    return module.split(".")[1] if "." in module else module


def circle(arrows: dict[str, set[str]]) -> list[str]:
    try:
        TopologicalSorter(arrows).prepare()
    except CycleError as error:
        return error.args[1]
    return []


def test_every_folder_has_its_layer() -> None:
    assert {folder(module) for module in FILES} == HEIGHT.keys()


def test_modules_import_each_other_in_no_circle() -> None:
    assert not (found := circle(ARROWS)), " imports ".join(reversed(found))


def test_folders_import_each_other_in_no_circle() -> None:
    arrows: dict[str, set[str]] = {}
    for module, others in ARROWS.items():
        mine = arrows.setdefault(folder(module), set())
        mine |= {folder(other) for other in others} - {folder(module)}
    assert not (found := circle(arrows)), " imports ".join(reversed(found))


def test_no_arrow_points_up() -> None:
    up = [
        f"{module} imports {other}"
        for module, others in ARROWS.items()
        for other in sorted(others)
        if HEIGHT[folder(other)] > HEIGHT[folder(module)]
    ]
    assert not up, "\n".join(up)


def test_no_module_is_long() -> None:
    lengths = {module: len(path.read_text().splitlines()) for module, path in FILES.items()}
    long = {module: lines for module, lines in lengths.items() if lines > MOST_LINES}
    assert not long, long


def test_few_read_deepspeed_s_internals() -> None:
    readers = []
    for module, tree in TREES.items():
        attributes = (ast.unparse(n) for n in ast.walk(tree) if isinstance(n, ast.Attribute))
        named = [name for name in [*imported(module), *attributes] if name.startswith(INTERNALS)]
        if named and not module.startswith(READERS_OF_INTERNALS):
            readers.append(f"{module} uses {named[0]}")
    assert not readers, "\n".join(readers)

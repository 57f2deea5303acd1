"""Where DeepSpeed's builds are kept; and what was not tested is said last, where nobody overlooks
it.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

# DeepSpeed builds its NVMe reader when it is first used, and both ranks of a test wait for that: six
# minutes on two cores. It is kept with the environment, where tests/run.sh keeps it, and not built
# once more for whoever calls pytest alone.
BUILDS = Path(
    os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(Path(sys.prefix, "torch_extensions")))
)


def pytest_report_header() -> str | None:
    if not (BUILDS / "async_io" / "async_io.so").exists():
        return (
            "DeepSpeed's NVMe reader is not built yet: the first test that needs it takes minutes."
        )
    return None


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 MiB."""
    directory = tmp_path / "disk"
    directory.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(directory)]
    mounted = subprocess.run(mount, capture_output=True, text=True)
    if mounted.returncode != 0:
        pytest.skip(f"a full disk: mounting a tmpfs needs root ({mounted.stderr.strip()})")
    yield directory
    subprocess.run(["umount", "-l", str(directory)], check=True)


def pytest_terminal_summary(terminalreporter) -> None:
    reasons: dict[str, int] = {}
    for report in terminalreporter.stats.get("skipped", []):
        reason = report.longrepr[2].removeprefix("Skipped: ")
        reasons[reason] = reasons.get(reason, 0) + 1
    if reasons:
        terminalreporter.section("NOT EVERYTHING WAS TESTED", sep="!", red=True, bold=True)
        for reason, count in sorted(reasons.items()):
            terminalreporter.line(f"!!! {reason} ({count} test{'s' if count > 1 else ''})")

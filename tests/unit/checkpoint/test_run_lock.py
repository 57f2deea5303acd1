"""One run per directory."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from gkd_ds.checkpoint import run_lock
from gkd_ds.runtime.errors import InputError


def test_only_one_run_in_a_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second one waits a little, in case that the first is ending; what is left of a dead run is
    in nobody's way.
    """
    monkeypatch.setattr(run_lock, "PATIENCE", 0.5)
    run_dir = tmp_path / "new" / "run"
    with run_lock.only_run(run_dir):
        with (
            pytest.raises(InputError, match="another run is training in"),
            run_lock.only_run(run_dir),
        ):
            pass
    program = """
import sys, time
from gkd_ds.checkpoint import run_lock
with run_lock.only_run(sys.argv[1]):
    print("held", flush=True)
    time.sleep(3600)
"""
    command = [sys.executable, "-c", program, str(run_dir)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        with (
            pytest.raises(InputError, match="another run is training in"),
            run_lock.only_run(run_dir),
        ):
            pass
        monkeypatch.setattr(run_lock, "PATIENCE", 30.0)
        other.kill()
        with run_lock.only_run(run_dir):
            assert [path.name for path in run_dir.iterdir()] == [".lock"]

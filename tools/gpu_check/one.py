"""One check in a process of its own: `python -m tools.gpu_check.one NAME DIRECTORY`, which leaves
DIRECTORY/outcome.json. Started by run.py only.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import sys
import traceback
from pathlib import Path

from tools.gpu_check.checks import CHECKS
from tools.gpu_check.outcome import FAILED, SKIPPED, Outcome, Skip


def main(name: str, directory: Path) -> None:
    check = next(check for check in CHECKS if check.name == name)
    module, function = check.function.split(".")
    try:
        run = getattr(importlib.import_module(f"tools.gpu_check.{module}"), function)
        outcome = run(directory)
    except Skip as reason:
        outcome = Outcome(SKIPPED, str(reason))
    except (Exception, SystemExit) as error:  # whatever it is, it is this check's answer
        traceback.print_exc()
        lines = str(error).strip().splitlines() or ["no message"]
        outcome = Outcome(FAILED, f"{type(error).__name__}: {lines[0]}")
    (directory / "outcome.json").write_text(json.dumps(dataclasses.asdict(outcome)))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # the answer is written: a backend's threads have nothing more to say

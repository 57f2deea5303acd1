"""Runs scripts one after the other in this process; outcomes go to DIRECTORY/outcomes.json."""

from __future__ import annotations

import gc
import inspect
import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from tests.scripts import callbacks, data, evaluation, library, models, subclasses, training

SCRIPTS: dict[str, Callable[[Path], None]] = {
    name: script
    for module in (training, models, evaluation, callbacks, subclasses, data)
    for name, script in inspect.getmembers(module, inspect.isfunction)
    if script.__module__ == module.__name__ and not name.startswith("_")
}


def main(directory: Path, wanted: list[str]) -> dict[str, dict]:
    home = directory / "models"
    library.make(home)
    outcomes = {}
    for name in wanted or SCRIPTS:
        place = directory / name
        place.mkdir()
        os.chdir(place)
        gc.freeze()  # the trainer and DeepSpeed collect garbage, and would look at all imports
        started, error = time.monotonic(), ""
        try:
            SCRIPTS[name](home)
        except Exception:
            error = traceback.format_exc()
        seconds = time.monotonic() - started
        outcomes[name] = {"error": error, "seconds": seconds}
        told = error.strip().splitlines()[-1] if error else "ok"
        print(f"=== {name} {seconds:.1f} s: {told}", flush=True)
    (directory / "outcomes.json").write_text(json.dumps(outcomes))
    return outcomes


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve(), sys.argv[2:])

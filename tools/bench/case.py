"""What one benchmarked process is told to do. The driver writes it as JSON; worker.py reads it."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tools.bench.workload import Workload, make_prompts


@dataclass(frozen=True)
class Case:
    """One side on one workload. Paths are directories that the driver made."""

    side: str  # which function of worker.SIDES runs it
    workload: Workload
    models: Path
    output_dir: Path
    parity_file: Path | None = None
    world_size: int = 1
    rank: int = 0
    windows: int = 12  # the longest run: warm-up and timed updates
    checkpointing: bool = False
    deepspeed: dict | None = None
    teacher_deepspeed: dict | None = None
    options: dict[str, Any] = field(default_factory=dict)  # further fields of our GKDConfig

    def prompts_and_lengths(self) -> tuple[list[str], list[int]]:
        """Every sample of the data set, in order: enough for `windows` updates of all ranks."""
        per_window = self.workload.samples * self.world_size
        prompts = make_prompts(self.workload.vocabulary, per_window * self.windows)
        return prompts, self.workload.lengths(per_window, self.windows)

    def to_json(self) -> str:
        return json.dumps(asdict(self), default=str)

    @classmethod
    def from_json(cls, text: str) -> Case:
        values = json.loads(text)
        values["workload"] = Workload(**values["workload"])
        for name in ("models", "output_dir", "parity_file"):
            values[name] = Path(values[name]) if values[name] else None
        return cls(**values)

"""A run in TensorBoard's event files."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gkd_ds.monitor.sinks import Record, flat
from gkd_ds.runtime.redaction import redact


class TensorBoardSink:
    """Writes what is due to `logging_dir` (default: `runs` in the run's directory).

    `config` is a GKDConfig; read are logging_dir and to_json_string(). A run that goes on from an
    earlier step hides what came after it. When files cannot be written, `say` prints one sentence,
    and training goes on without them.
    """

    def __init__(self, config: Any, run_dir: Path, say: Callable[[str], None]):
        default = os.environ.get("TENSORBOARD_LOGGING_DIR") or run_dir / "runs"
        self.directory = Path(config.logging_dir or default)
        self._config, self._say = config, say
        self._writer = None
        self._failed = False

    def log(self, record: Record, shown: Record, due: bool) -> None:
        """Write the numbers of what is shown, when it is due."""
        if due:
            numbers = {name: v for name, v in flat(shown).items() if isinstance(v, (int, float))}
            step = numbers.pop("step")
            self._guard(lambda: self._write(step, numbers))

    def log_rollouts(self, step: int, rollouts: list[Record]) -> None:
        """Write the rollouts as text."""
        texts = [f"**{one['source']}**\n\n{one['prompt']}{one['completion']}" for one in rollouts]

        def write() -> None:
            self._opened(step).add_text("rollouts", "\n\n---\n\n".join(texts), step)

        self._guard(write)

    def close(self, exit_code: int) -> None:
        """Close the file; what is logged later opens another."""
        if self._writer is not None:
            self._guard(self._writer.close)
            self._writer = None

    def _write(self, step: int, numbers: dict[str, float]) -> None:
        writer = self._opened(step)
        for name, value in numbers.items():
            writer.add_scalar(name, value, step)
        writer.flush()

    def _opened(self, step: int) -> Any:
        """The writer; from its first step on, it hides what an older file holds."""
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(self.directory), purge_step=step)
            self._writer.add_text("config", redact(self._config.to_json_string()), step)
        return self._writer

    def _guard(self, action: Callable[[], None]) -> None:
        if self._failed:
            return
        try:
            action()
        except OSError as error:
            self._failed = True
            reason = error.strerror or error
            self._say(f"TensorBoard stopped recording in {self.directory} ({reason}).")

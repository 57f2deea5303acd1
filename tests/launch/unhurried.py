"""`gkd_ds.train`, with four seconds between updates until Slurm has requeued the job.

On a machine of any speed, a signal that Slurm sends by the clock finds this run at work, and the
rest is soon done.

    deepspeed --module tests.launch.unhurried --config recipe.yaml
"""

import os
import sys
import time

from transformers import TrainerCallback

from gkd_ds.config.config import GKDConfig
from gkd_ds.train import build, check_training, command, leave

SECONDS = 4.0


class Pause(TrainerCallback):
    """After every update of a job's first start."""

    def on_step_end(self, args, state, control, **kwargs):
        if os.environ.get("SLURM_RESTART_COUNT", "0") == "0":
            time.sleep(SECONDS)


def train(config: GKDConfig) -> int:
    trainer = build(config)
    trainer.add_callback(Pause())
    trainer.train(resume_from_checkpoint=config.resume_from_checkpoint)
    return trainer.exit_code


if __name__ == "__main__":
    leave(command(sys.argv[1:], train, check_training))

"""What callbacks ask for, under two real ranks: agreed by all of them, also when it is asked for
late or by one.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

from tests import ROOT
from tests.tiny import make_everything

SCRIPT = """
import sys
from datasets import load_dataset
from transformers import TrainerCallback
from gkd_ds import GKDConfig, GKDTrainer

class StopOnRankZero(TrainerCallback):
    "Asks one rank only, and only after evaluation and saving have been decided on."
    def on_save(self, args, state, control, **kwargs):
        control.should_training_stop |= state.is_world_process_zero

home = sys.argv[-1]
rows = load_dataset("json", data_files=f"{home}/train.jsonl", split="train")
config = GKDConfig(
    output_dir=f"{home}/run", max_steps=6, per_device_train_batch_size=1, max_new_tokens=6, eval_max_samples=2,
    eval_strategy="steps", eval_steps=1, save_strategy="best", metric_for_best_model="loss", ddp_timeout=60,
)
trainer = GKDTrainer(model=f"{home}/student", teacher_model=f"{home}/teacher", args=config, train_dataset=rows,
                     eval_dataset=rows, callbacks=[StopOnRankZero()])
trainer.train()
"""


def test_the_best_is_saved_and_one_rank_s_late_stop_stops_all(tmp_path):
    make_everything(tmp_path, rows=12)
    (tmp_path / "script.py").write_text(SCRIPT)
    launcher = Path(sys.executable).with_name("deepspeed")
    command = [
        launcher,
        "--num_accelerators",
        "2",
        "--master_port",
        "29617",
        tmp_path / "script.py",
        tmp_path,
    ]
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    # The first evaluation is the best so far: it is saved, and the save makes rank 0 ask for the
    # end.
    rows = [
        json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    assert (tmp_path / "run" / "checkpoint-1" / "manifest.json").is_file()
    assert [row["step"] for row in rows if "loss" in row] == [1]
    assert (tmp_path / "run" / "FINISHED").read_text() == "1\n"

"""The deepspeed launcher itself: what it would let pass."""

import subprocess
import sys
from pathlib import Path

from tests.dist.rank_server import environment
from tests.tiny import make_everything

LAUNCHER = Path(sys.executable).with_name("deepspeed")


def test_a_hostfile_that_does_not_exist_is_refused(tmp_path):
    make_everything(tmp_path, rows=8)
    command = [
        LAUNCHER,
        "--hostfile",
        tmp_path / "nohosts",
        "--num_accelerators",
        "2",
        "--module",
        "gkd_ds.train",
    ]
    flags = [f"--{name}={tmp_path / value}" for name, value in {
        "model_name_or_path": "student", "teacher_model_name_or_path": "teacher", "dataset_name": "train.jsonl",
        "output_dir": "run",
    }.items()]  # fmt: skip
    done = subprocess.run([*command, *flags], capture_output=True, text=True, timeout=300)
    errors = [line for line in done.stderr.splitlines() if line.startswith("gkd_ds: error:")]
    assert done.returncode == 2, done.stderr
    assert errors == [
        f"gkd_ds: error: --hostfile {tmp_path / 'nohosts'} does not exist; correct its path, or leave it out."
    ]
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


def test_a_hostfile_that_does_not_exist_is_refused_by_the_trainer_of_a_script(tmp_path):
    (tmp_path / "script.py").write_text(
        "from gkd_ds import GKDConfig, GKDTrainer\n"
        f"GKDTrainer('some/student', 'some/teacher', GKDConfig(output_dir='{tmp_path / 'run'}'))\n"
    )
    command = [
        LAUNCHER,
        "--hostfile",
        tmp_path / "nohosts",
        "--num_accelerators",
        "1",
        tmp_path / "script.py",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment())
    assert done.returncode == 1, done.stderr
    assert (
        f"InputError: --hostfile {tmp_path / 'nohosts'} does not exist; correct its path"
        in done.stderr
    )

"""A job whose teacher's weights are damaged on the drive while it trains: it ends, on all ranks,
and says which file.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from tests.dist.rank_server import Server, poll
from tests.dist.runs import NVME, rows
from tests.tiny import make_model, make_tokenizer

MANY = 400  # updates, minutes of them


@NVME
def test_a_swap_file_that_is_damaged_in_mid_run_ends_the_job(
    server: Server, recipe: dict[str, Any], tmp_path: Path
):
    make_model(
        "llama",
        tmp_path / "teacher",
        hidden=640,
        layers=1,
        tokenizer=make_tokenizer(vocab_size=300),
    )
    offload = {
        "device": "nvme",
        "nvme_path": str(tmp_path / "nvme"),
        "buffer_count": "auto",
        "buffer_size": "auto",
    }
    run = tmp_path / "run"
    mine = {
        **recipe,
        "output_dir": str(run),
        "teacher_model_name_or_path": str(tmp_path / "teacher"),
        "teacher_deepspeed": {"zero_optimization": {"stage": 3, "offload_param": offload}},
        "max_steps": MANY,
        # After the row of an update comes a rollout that takes long: the damage falls into it.
        # DeepSpeed's reader (C++) aborts where a file shrinks in the moment between our look at it
        # and the read.
        "lmbda": 1.0,
        "max_new_tokens": 200,
    }
    job = server.start(2, mine)
    metrics = run / "metrics.jsonl"
    poll(lambda: metrics.exists() and metrics.read_text().count("\n") > 1, "nothing was trained")
    damaged = sorted((tmp_path / "nvme").rglob("rank0/**/*.swp"))[0]
    os.truncate(damaged, damaged.stat().st_size // 2)
    done = len(rows(run))  # the window that was under way may have had its targets already
    codes = job.wait()
    assert all(codes) and None not in codes, codes
    for rank in (0, 1):
        assert f"the swap file {damaged} of the teacher on rank 0 has" in job.said(rank)
    assert len(rows(run)) <= done + 1 < MANY

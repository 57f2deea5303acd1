"""`gkd_ds.train` with an optimizer and a schedule of the caller's, for tests/dist/rank_server.py.

The recipe's learning_rate and adam_beta1 are the optimizer's, its max_steps the schedule's length; with
lr_scheduler_type "constant" the schedule is one that is no function of the number of updates.
"""

from __future__ import annotations

import torch
from transformers import AutoModelForCausalLM, get_linear_schedule_with_warmup

from gkd_ds.config.config import GKDConfig
from gkd_ds.config.recipe import read_recipe
from gkd_ds.data.files import read_dataset
from gkd_ds.runtime.errors import InputError
from gkd_ds.trainer import GKDTrainer


def main(argv: list[str]) -> int:
    config = GKDConfig(**read_recipe(argv[1]))
    model = AutoModelForCausalLM.from_pretrained(config.model_name_or_path)
    betas = (config.adam_beta1, config.adam_beta2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.learning_rate, betas=betas)
    schedule = None
    if config.lr_scheduler_type == "linear":
        schedule = get_linear_schedule_with_warmup(optimizer, 0, config.max_steps)
    elif config.lr_scheduler_type == "constant":
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    try:
        trainer = GKDTrainer(
            model=model,
            teacher_model=config.teacher_model_name_or_path,
            args=config,
            train_dataset=read_dataset(config.dataset_name, "train"),
            optimizers=(optimizer, schedule),
        )
        trainer.train()
    except InputError as error:
        print("gkd_ds: error:", error)
        return 2
    return trainer.exit_code

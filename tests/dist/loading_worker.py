"""Runs of gkd_ds.train whose models are objects, or are loaded wrongly; LOADING says which. For
rank_server.
"""

from __future__ import annotations

import os

import torch
from transformers import AutoModelForCausalLM

from gkd_ds import GKDConfig, GKDTrainer
from gkd_ds.engine import zero
from gkd_ds.runtime import ranks
from gkd_ds.train import check_training, command, read_datasets, run


def with_an_object(config: GKDConfig) -> int:
    """The student is an object, in the precision of its files."""
    student = AutoModelForCausalLM.from_pretrained(config.model_name_or_path, dtype="auto")
    trainer = GKDTrainer(
        model=student,
        teacher_model=config.teacher_model_name_or_path,
        args=config,
        train_dataset=read_datasets(config)[0],
    )
    trainer.train()
    return trainer.exit_code


def with_another_weight(config: GKDConfig) -> int:
    """On rank 1 one number is another one as soon as the student is loaded."""
    load = zero.load

    def load_wrongly(source: str, *args, **kwargs):
        model, report = load(source, *args, **kwargs)
        if source == config.model_name_or_path and ranks.rank() == 1:
            weight = model.get_output_embeddings().weight
            with torch.no_grad(), zero.own_part(weight) as (part, _):
                part.view(-1)[-1].neg_()
        return model, report

    zero.load = load_wrongly
    return run(config)


CASES = {function.__name__: function for function in (with_an_object, with_another_weight)}


def main(argv: list[str]) -> int:
    return command(argv, CASES[os.environ["LOADING"]], check_training)

"""What scripts and callbacks use of TrainingArguments, beside the fields."""

import datetime
import logging

import pytest
import transformers
from transformers import TrainingArguments
from transformers.training_args import ParallelMode

from gkd_ds.config.config import GKDConfig
from gkd_ds.config.fields import OPTIONS
from gkd_ds.runtime.errors import InputError

SET_METHODS = [name for name in vars(TrainingArguments) if name.startswith("set_")]


@pytest.mark.parametrize("name", SET_METHODS)
def test_a_set_method_sets_what_transformers_sets(name, tmp_path):
    arguments = {"model_id": "me/model"} if name == "set_push_to_hub" else {}
    ours = getattr(GKDConfig(str(tmp_path)), name)(**arguments)
    theirs = getattr(TrainingArguments(str(tmp_path), use_cpu=True), name)(**arguments)
    before = TrainingArguments(str(tmp_path), use_cpu=True)
    for key, value in vars(theirs).items():
        if key in OPTIONS and getattr(before, key) != value:
            assert getattr(ours, key) == value, key
    ours.validate()


def test_set_methods_chain_and_their_values_are_checked():
    config = GKDConfig().set_training(learning_rate=1e-4, batch_size=2).set_evaluate("steps", 5)
    assert (config.learning_rate, config.per_device_train_batch_size, config.eval_steps) == (
        1e-4,
        2,
        5,
    )
    config.validate()
    assert config.eval_delay == 0  # transformers leaves None, and stumbles over it
    with pytest.raises(InputError, match="'dataloader_num_workers'"):
        config.set_dataloader(num_workers="many").validate()
    with pytest.raises(InputError, match="'beta'"):
        config.beta = 7
        config.validate()


@pytest.mark.parametrize(
    ("settings", "of_100"),
    [
        ({}, 0),
        ({"warmup_steps": 7}, 7),
        ({"warmup_steps": 0.0625}, 7),
        ({"warmup_steps": "0.065"}, 7),
        ({"warmup_ratio": 0.065}, 7),
        ({"warmup_steps": 3, "warmup_ratio": 0.5}, 3),
        ({"warmup_steps": 1}, 1),
    ],
)
def test_warmup_steps_may_be_a_share(settings, of_100):
    assert GKDConfig(**settings).get_warmup_steps(100) == of_100


def test_processes(monkeypatch):
    config = GKDConfig(use_cpu=True, ddp_timeout=90)
    assert config.device.type == "cpu" and config.n_gpu == 0
    assert config.parallel_mode == ParallelMode.NOT_PARALLEL
    assert config.ddp_timeout_delta == datetime.timedelta(seconds=90)
    assert config.place_model_on_device is None
    with config.main_process_first(desc="something"):
        pass
    for name, value in {"WORLD_SIZE": "4", "RANK": "2", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    assert config.parallel_mode == ParallelMode.DISTRIBUTED
    state = config.distributed_state
    assert state.is_local_main_process and not state.is_main_process


@pytest.mark.parametrize(
    ("settings", "local_rank", "level"),
    [
        ({"log_level": "info"}, 0, logging.INFO),
        ({"log_level": "info"}, 1, logging.WARNING),
        ({"log_level": "info", "log_on_each_node": False}, 0, logging.WARNING),
        ({"log_level": "info", "log_level_replica": "error"}, 1, logging.ERROR),
        ({}, 0, transformers.logging.get_verbosity()),
    ],
)
def test_log_levels_of_a_second_node(settings, local_rank, level, monkeypatch):
    monkeypatch.setenv("RANK", str(4 + local_rank))
    monkeypatch.setenv("LOCAL_RANK", str(local_rank))
    assert GKDConfig(**settings).get_process_log_level() == level


def test_sanitized_dict_holds_what_trackers_can_write():
    sanitized = GKDConfig(per_device_train_batch_size=3, hub_token="hf_x").to_sanitized_dict()
    assert {type(value) for value in sanitized.values()} <= {bool, int, float, str}
    assert (sanitized["train_batch_size"], sanitized["eval_batch_size"]) == (3, 8)
    assert "hub_token" not in sanitized


def test_evaluations_while_training_are_evaluations():
    """Scripts ask for do_eval after training, as transformers sets it."""
    assert GKDConfig(eval_strategy="epoch").do_eval and not GKDConfig().do_eval

"""Optimizers by transformers' names: which class and values they are, and what is refused."""

import pytest
import torch
from transformers.optimization import Adafactor
from transformers.training_args import OptimizerNames

from gkd_ds.config.config import GKDConfig
from gkd_ds.config.deepspeed import resolve_student
from gkd_ds.config.training_fields import NEED_WHOLE_PARAMETERS, OPTIMIZERS
from gkd_ds.learn.optim import optimizer_class, require_optimizer
from gkd_ds.runtime.errors import InputError
from tests.refusals import assert_one_sentence

PLAIN = {"zero_optimization": {"stage": 0}}


def test_the_names_are_transformers():
    assert sorted(OPTIMIZERS) == sorted(name.value for name in OptimizerNames)
    assert set(NEED_WHOLE_PARAMETERS) <= set(OPTIMIZERS)


@pytest.mark.parametrize(
    ("optim", "optim_args", "expected", "values"),
    [
        ("adamw_torch", None, torch.optim.AdamW, {"betas": (0.8, 0.999), "eps": 1e-8}),
        ("adamw_torch_fused", None, torch.optim.AdamW, {"fused": True}),
        (
            "sgd",
            "momentum=0.9, nesterov=true",
            torch.optim.SGD,
            {"momentum": 0.9, "nesterov": True},
        ),
        ("rmsprop", "alpha=0.5,centered=1", torch.optim.RMSprop, {"alpha": 0.5, "centered": True}),
        ("adagrad", "lr_decay=0.5", torch.optim.Adagrad, {"lr_decay": 0.5}),
        ("adafactor", None, Adafactor, {"scale_parameter": False}),
    ],
)
def test_the_class_and_its_values(optim, optim_args, expected, values):
    config = GKDConfig(optim=optim, optim_args=optim_args, learning_rate=0.25, adam_beta1=0.8)
    cls, settings = optimizer_class(config)
    assert cls is expected and {**settings, **values, "lr": 0.25} == settings


@pytest.mark.parametrize("optim_args", ["momentun=0.9", "weight_decay=0.1", "momentum=0.9,beta=1"])
def test_an_argument_that_would_change_nothing_is_refused(optim_args):
    with pytest.raises(InputError) as caught:
        require_optimizer(GKDConfig(optim="sgd", optim_args=optim_args))
    assert_one_sentence(str(caught.value), "'optim_args'", "sgd does not take")


def test_adamw_takes_its_values_from_its_fields():
    with pytest.raises(InputError, match="use the field of that name"):
        require_optimizer(GKDConfig(optim_args="beta1=0.5"))


@pytest.mark.parametrize("optim_args", ["momentum=much", "momentum=0.9e"])
def test_a_value_that_is_no_number_is_refused(optim_args):
    with pytest.raises(InputError, match="'optim'") as caught:
        require_optimizer(GKDConfig(optim="sgd", optim_args=optim_args))
    assert_one_sentence(str(caught.value), optim_args)


@pytest.mark.parametrize(
    ("optim", "package"),
    [
        ("adamw_8bit", "bitsandbytes"),
        ("paged_lion_32bit", "bitsandbytes"),
        ("adamw_torch_8bit", "torchao"),
        ("adamw_anyprecision", "torchdistx"),
    ],
)
def test_a_package_that_is_missing_is_named(optim, package):
    with pytest.raises(InputError) as caught:
        require_optimizer(GKDConfig(optim=optim))
    assert_one_sentence(str(caught.value), f"'optim' is {optim}", package)


@pytest.mark.parametrize(
    "optim", [name for name in OPTIMIZERS if "lomo" in name or "layer" in name]
)
def test_those_that_update_during_backward_are_refused(optim):
    with pytest.raises(InputError, match="while gradients are computed"):
        GKDConfig(optim=optim)


@pytest.mark.parametrize("optim", [name for name in OPTIMIZERS if name.startswith("schedule_free")])
def test_those_with_other_weights_for_evaluation_are_refused(optim):
    with pytest.raises(InputError, match="evaluates with other weights"):
        GKDConfig(optim=optim)


@pytest.mark.parametrize("optim", NEED_WHOLE_PARAMETERS)
@pytest.mark.parametrize(
    "settings",
    [
        {"deepspeed": {"zero_optimization": {"stage": 3}}},
        {"deepspeed": {"zero_optimization": {"stage": 2}}},
        {"bf16": True},
        {"deepspeed": PLAIN, "bf16": True},
    ],
)
def test_those_that_need_whole_parameters_are_refused_where_these_are_flat(optim, settings):
    with pytest.raises(InputError) as caught:
        GKDConfig(optim=optim, **settings).validate_files()
    assert_one_sentence(str(caught.value), f"'optim' is {optim}", "whole parameters", "stage 0")
    GKDConfig(optim=optim, deepspeed=PLAIN).validate_files()


@pytest.mark.parametrize("optim", NEED_WHOLE_PARAMETERS)
def test_those_that_need_whole_parameters_have_them_in_one_process(optim, monkeypatch):
    config = GKDConfig(optim=optim)
    config.validate_files()
    resolved = resolve_student(config, world_size=1, hidden_size=8, precision="float32")
    assert resolved["zero_optimization"]["stage"] == 0
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="needs whole parameters"):
        config.validate_files()


def test_target_modules_go_with_low_rank_optimizers():
    with pytest.raises(InputError, match="'optim_target_modules' is for galore"):
        GKDConfig(optim_target_modules="all-linear")


def test_a_low_rank_optimizer_gets_its_modules(model, tmp_path, monkeypatch):
    """With a package of GaLore's name that only keeps what it is given."""
    (tmp_path / "galore_torch.py").write_text(
        "import torch\nclass GaLoreAdamW(torch.optim.AdamW): pass\n"
        "GaLoreAdamW8bit = GaLoreAdafactor = GaLoreAdamW\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr("transformers.trainer_optimizer.is_galore_torch_available", lambda: True)
    config = GKDConfig(
        optim="galore_adamw", optim_target_modules=["q_proj"], optim_args="rank=4", deepspeed=PLAIN
    )
    cls, settings = optimizer_class(config, model)
    others, targets = settings["params"]
    assert cls.__name__ == "GaLoreAdamW" and targets["rank"] == 4
    assert len(targets["params"]) == model.config.num_hidden_layers
    with pytest.raises(InputError, match="rang"):
        optimizer_class(GKDConfig(**{**config.to_dict(), "optim_args": "rang=4"}), model)


def test_an_optimizer_block_of_the_file_is_the_only_one():
    file = {"zero_optimization": {"stage": 3}, "optimizer": {"type": "AdamW", "params": {}}}
    with pytest.raises(InputError, match="optimizer block"):
        GKDConfig(deepspeed=file, optim="sgd").validate_files()

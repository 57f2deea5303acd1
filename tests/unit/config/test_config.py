"""GKDConfig: the seed's fields and defaults, what each kind of value is read as, and how it is
written down.
"""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gkd_ds.config.config import GKDConfig
from gkd_ds.config.fields import GROUPS, INACTIVE, OPTIONS
from gkd_ds.runtime.errors import InputError

SEED = json.loads(Path(__file__).with_name("seed_api.json").read_text())["GKDConfig"]


# ---- The seed's interface ----


@pytest.mark.parametrize("seed_field", SEED, ids=lambda seed_field: seed_field["name"])
def test_seed_field_exists_with_its_default(seed_field):
    default = OPTIONS[seed_field["name"]].default
    assert default in ({}, []) if seed_field["default"] == "<factory>" else True
    assert seed_field["default"] in (repr(default), "<factory>")


@pytest.mark.parametrize("option", OPTIONS.values(), ids=lambda option: option.name)
def test_every_field_has_a_meaning_that_a_parser_can_print(option):
    assert option.help.endswith((".", "...")) and "\n" not in option.help and "%" not in option.help
    assert len(option.help) >= 8


def test_output_dir_is_the_first_argument_and_has_a_default():
    assert GKDConfig("runs/a").output_dir == "runs/a"
    assert GKDConfig().output_dir == "trainer_output"


def test_unknown_keyword_is_a_type_error_as_in_any_dataclass():
    with pytest.raises(TypeError, match="learning_rte"):
        GKDConfig(learning_rte=1e-5)


def test_every_field_acts_or_is_in_the_table_of_those_that_do_not():
    active = [option.name for group in GROUPS.values() for option in group]
    assert len(active) == len(set(active)) and set(OPTIONS) == set(active) ^ set(INACTIVE)


# ---- Values ----


@pytest.mark.parametrize(
    ("name", "given", "expected"),
    [
        ("learning_rate", "2e-5", 2e-5),
        ("learning_rate", 1, 1.0),
        ("max_steps", "10", 10),
        ("max_steps", 10.0, 10),
        ("max_steps", "1e3", 1000),
        ("bf16", "no", False),
        ("bf16", "True", True),
        ("bf16", "null", None),
        ("fp16", 0, False),
        ("data_seed", "none", None),
        ("eval_strategy", False, "no"),  # a bare `no` in YAML
        ("save_strategy", "epoch", "epoch"),
        ("model_init_kwargs", '{"revision": "main"}', {"revision": "main"}),
        ("deepspeed", "ds.json", "ds.json"),
        ("deepspeed", '{"zero_optimization": {"stage": 3}}', {"zero_optimization": {"stage": 3}}),
        ("resume_from_checkpoint", "true", True),
        ("resume_from_checkpoint", "auto", "auto"),
        ("resume_from_checkpoint", "runs/a/checkpoint-3", "runs/a/checkpoint-3"),
        ("max_runtime", "3h30m", 12600.0),
        ("max_runtime", "1d", 86400.0),
        ("max_runtime", 90, 90.0),
        ("report_to", None, []),
        ("report_to", "none", []),
        ("report_to", "wandb", ["wandb"]),
        ("report_to", ["wandb"], ["wandb"]),
        ("report_to", "all", ["all"]),
        ("report_to", "wandb, tensorboard", ["wandb", "tensorboard"]),
        ("lr_scheduler_kwargs", None, {}),
        ("logging_steps", 5.0, 5),
        ("logging_steps", 0.1, 0.1),
        ("temperature", 0, 0.0),
        ("output_dir", Path("runs/a"), "runs/a"),
    ],
)
def test_value_is_read_as_the_type_of_its_field(name, given, expected):
    value = getattr(GKDConfig(**{name: given}), name)
    assert value == expected and type(value) in (
        type(expected),
        type(GKDConfig().eval_strategy),
        type(GKDConfig().save_strategy),
    )


def test_home_is_expanded():
    assert GKDConfig(output_dir="~/runs").output_dir == str(Path.home() / "runs")


def test_transformers_enums_and_callbacks_understand_it():
    from transformers.trainer_callback import DefaultFlowCallback, TrainerControl, TrainerState
    from transformers.trainer_utils import IntervalStrategy, SaveStrategy

    config = GKDConfig(
        eval_strategy=IntervalStrategy.STEPS,
        eval_steps=2,
        save_strategy=SaveStrategy.NO,
        logging_steps=3,
    )
    assert (
        config.eval_strategy == IntervalStrategy.STEPS and config.save_strategy == SaveStrategy.NO
    )
    assert config.eval_strategy.value == "steps"
    state = TrainerState(global_step=2, max_steps=10)
    state.compute_steps(config, 10)
    control = DefaultFlowCallback().on_step_end(config, state, TrainerControl())
    assert (control.should_evaluate, control.should_log, control.should_save) == (
        True,
        False,
        False,
    )


@pytest.mark.parametrize(
    ("settings", "bf16", "fp16"),
    [
        ({"dtype": "bfloat16"}, True, False),
        ({"torch_dtype": "float16"}, None, True),
        ({"model_init_kwargs": {"torch_dtype": "bfloat16"}}, True, False),
        ({"model_init_kwargs": {"dtype": "torch.float16"}}, None, True),
        ({"model_init_kwargs": {"dtype": "auto"}}, None, False),
        ({"dtype": "float32"}, None, False),
        ({"dtype": "float32", "bf16": True}, True, False),
        ({"teacher_model_init_kwargs": {"dtype": "bfloat16"}}, None, False),
        ({"bf16_full_eval": True}, True, False),
        ({}, None, False),
    ],
)
def test_a_student_of_16_bits_is_trained_in_them(settings, bf16, fp16):
    config = GKDConfig(**settings)
    assert (config.bf16, config.fp16) == (bf16, fp16)
    config.validate()
    assert (config.bf16, config.fp16) == (bf16, fp16)


def test_torch_s_own_dtypes_are_dtypes():
    import torch

    config = GKDConfig(model_init_kwargs={"torch_dtype": torch.bfloat16})
    assert config.bf16 and json.dumps(config.to_dict())


@pytest.mark.parametrize("revision", ["main", None, "v2"])
def test_a_revision_is_that_of_the_student_s_files(revision):
    expected = {"revision": "v2"} if revision == "v2" else None
    assert GKDConfig(model_revision=revision).model_init_kwargs == expected


def test_validate_may_be_called_again():
    config = GKDConfig(
        max_runtime="1h",
        eval_strategy="steps",
        report_to="wandb",
        load_best_model_at_end=True,
        save_steps=20,
    )
    before = config.to_dict()
    config.validate()
    assert config.to_dict() == before


def test_changed_value_is_checked_by_validate():
    config = GKDConfig()
    config.beta = 2.0
    with pytest.raises(InputError, match="beta"):
        config.validate()


ANY_VALUE = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text()
    | st.just("nan")
    | st.just("1e5"),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=5,
)


@settings(max_examples=300, deadline=None)
@given(name=st.sampled_from(list(OPTIONS)), value=ANY_VALUE)
def test_any_value_of_any_field_makes_a_config_or_an_input_error(name, value):
    try:
        config = GKDConfig(**{name: value})
    except InputError as error:
        assert name in str(error) and "\n" not in str(error)
    else:
        json.dumps(config.to_dict())


# ---- Writing it down ----


def test_to_dict_is_json_without_secrets(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_environment_secret")
    config = GKDConfig(
        hub_token="hf_field_secret",
        model_init_kwargs={"token": "hf_nested_secret", "revision": "main", "config": object},
        run_name="run hf_environment_secret",
        eos_token="<|im_end|>",
        eval_strategy="epoch",
    )
    text = config.to_json_string()
    assert "secret" not in text and "secret" not in repr(config).replace(
        "hf_nested_secret", ""
    ).replace("hf_environment_secret", "")
    written = json.loads(text)
    assert written["eos_token"] == "<|im_end|>" and written["eval_strategy"] == "epoch"
    assert written["model_init_kwargs"]["revision"] == "main" and "hub_token" not in written
    assert all(
        isinstance(value, (bool, int, float, str)) for value in config.to_sanitized_dict().values()
    )


def test_to_dict_makes_the_same_config_again():
    config = GKDConfig(
        beta=0.25, max_runtime="1h", eval_strategy="steps", eval_steps=3, report_to="wandb"
    )
    assert GKDConfig(**config.to_dict()) == config


def test_ranks_come_from_the_launcher(monkeypatch):
    for name, value in {"WORLD_SIZE": "4", "RANK": "3", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    config = GKDConfig(per_device_train_batch_size=2)
    assert (config.world_size, config.process_index, config.local_process_index) == (4, 3, 1)
    assert not config.should_log and config.train_batch_size == 2

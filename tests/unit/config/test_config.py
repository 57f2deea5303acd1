"""GKDConfig: the seed's fields and defaults, what each kind of value is read as, and every refusal
in one sentence.
"""

import dataclasses
import json
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gkd_ds.config.config import GKDConfig
from gkd_ds.config.unsupported import REASONS
from gkd_ds.runtime.errors import InputError

SEED = json.loads(Path(__file__).with_name("seed_api.json").read_text())["GKDConfig"]


def assert_one_sentence(message: str, *parts: str) -> None:
    assert "\n" not in message and message.endswith((".", "?")), message
    assert len(re.findall(r"[a-z)'\"][.] [A-Z]", message)) == 0, (
        f"more than one sentence: {message}"
    )
    for part in parts:
        assert part in message, f"{part!r} is not in: {message}"


# ---- The seed's interface ----


@pytest.mark.parametrize("seed_field", SEED, ids=lambda seed_field: seed_field["name"])
def test_seed_field_exists_with_its_default_and_a_meaning(seed_field):
    (field,) = [
        field for field in dataclasses.fields(GKDConfig) if field.name == seed_field["name"]
    ]
    if seed_field["default"] == "<factory>":
        assert field.default_factory() in ({}, [])
    else:
        assert repr(field.default) == seed_field["default"]
    assert field.metadata["help"].endswith(".") and "\n" not in field.metadata["help"]


def test_all_fields_have_a_meaning():
    for field in dataclasses.fields(GKDConfig):
        assert len(field.metadata["help"]) >= 8, field.name


@pytest.mark.parametrize("name", sorted(REASONS))
def test_unsupported_field_is_refused_by_name_and_accepted_with_its_default(name, tmp_path):
    default = getattr(GKDConfig(output_dir=str(tmp_path)), name)
    GKDConfig(**{name: default})
    other = {bool: not default, str: "other", int: 7}.get(type(default))
    if other is None:  # default None or a container: something of the declared type
        text = str(next(f.type for f in dataclasses.fields(GKDConfig) if f.name == name))
        choices = {
            "int": 7,
            "bool": True,
            "float": 0.5,
            "dict": {"a": 1},
            "list": ["a"],
            "str": "other",
        }
        other = next(value for kind, value in choices.items() if kind in text)
    with pytest.raises(InputError) as caught:
        GKDConfig(**{name: other})
    assert_one_sentence(
        str(caught.value), f"GKDConfig field '{name}' is not supported by gkd_ds", "remove it"
    )


def test_output_dir_is_the_first_argument_and_has_a_default():
    assert GKDConfig("runs/a").output_dir == "runs/a"
    assert GKDConfig().output_dir == "trainer_output"


def test_unknown_keyword_is_a_type_error_as_in_any_dataclass():
    with pytest.raises(TypeError, match="learning_rte"):
        GKDConfig(learning_rte=1e-5)


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
        ("report_to", "all", ["wandb"]),
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


# ---- Refusals without files ----

NAN, INFINITY = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        ({"beta": 1.5}, ["'beta'", "at most 1"]),
        ({"beta": -0.1}, ["'beta'", "at least 0"]),
        ({"beta": NAN}, ["'beta'", "finite"]),
        ({"beta": "half"}, ["'beta'", "'half'"]),
        ({"beta": None}, ["'beta'", "is empty"]),
        ({"beta": True}, ["'beta'", "True"]),
        ({"lmbda": 1.01}, ["'lmbda'"]),
        ({"lmbda": "nan"}, ["'lmbda'", "finite"]),
        ({"lmbda": [0.5]}, ["'lmbda'"]),
        ({"temperature": -1}, ["'temperature'"]),
        ({"temperature": INFINITY}, ["'temperature'", "finite"]),
        ({"divergence_temperature": 0}, ["'divergence_temperature'", "above 0"]),
        ({"max_new_tokens": 0}, ["'max_new_tokens'"]),
        ({"max_new_tokens": 1.5}, ["'max_new_tokens'", "whole number"]),
        ({"max_new_tokens": "many"}, ["'max_new_tokens'", "whole number"]),
        ({"max_new_tokens": 10**30}, ["'max_new_tokens'"]),
        ({"max_length": 1}, ["'max_length'"]),
        ({"per_device_train_batch_size": 0}, ["'per_device_train_batch_size'"]),
        ({"per_device_train_batch_size": -8}, ["'per_device_train_batch_size'"]),
        ({"gradient_accumulation_steps": 0}, ["'gradient_accumulation_steps'"]),
        ({"learning_rate": "fast"}, ["'learning_rate'", "'fast'"]),
        ({"learning_rate": -1e-5}, ["'learning_rate'"]),
        ({"learning_rate": "1e400"}, ["'learning_rate'"]),
        ({"adam_beta1": 1.0}, ["'adam_beta1'", "below 1"]),
        ({"adam_epsilon": 0}, ["'adam_epsilon'"]),
        ({"max_grad_norm": -1}, ["'max_grad_norm'"]),
        ({"num_train_epochs": 0}, ["'num_train_epochs'"]),
        ({"max_steps": 0}, ["'max_steps'"]),
        ({"max_steps": -2}, ["'max_steps'"]),
        ({"warmup_ratio": 2}, ["'warmup_ratio'"]),
        ({"seed": -1}, ["'seed'"]),
        ({"seed": 2**32}, ["'seed'"]),
        ({"bf16": "maybe"}, ["'bf16'", "true or false"]),
        ({"bf16": 2}, ["'bf16'"]),
        ({"bf16": True, "fp16": True}, ["'bf16' and 'fp16'"]),
        ({"fp16": True, "use_cpu": True}, ["'fp16'", "'use_cpu'"]),
        ({"dtype": "int8"}, ["'dtype'", "bfloat16"]),
        ({"rollout_engine": "vllm"}, ["'rollout_engine'", "gather"]),
        ({"eval_strategy": "often"}, ["'eval_strategy'", "epoch"]),
        ({"eval_strategy": True}, ["'eval_strategy'"]),
        ({"save_strategy": "steps", "save_steps": 0}, ["'save_steps'"]),
        ({"logging_steps": 1.5}, ["'logging_steps'", "whole number"]),
        (
            {"eval_strategy": "steps", "logging_strategy": "no", "logging_steps": 0},
            ["'eval_steps'"],
        ),
        ({"load_best_model_at_end": True}, ["load_best_model_at_end", "eval_strategy"]),
        ({"load_best_model_at_end": True, "eval_strategy": "epoch"}, ["save_strategy"]),
        (
            {
                "load_best_model_at_end": True,
                "eval_strategy": "steps",
                "eval_steps": 3,
                "save_steps": 5,
            },
            ["multiple of eval_steps"],
        ),
        ({"save_strategy": "best"}, ["save_strategy: best", "eval_strategy"]),
        ({"lr_scheduler_type": "wavy"}, ["'lr_scheduler_type'", "cosine"]),
        ({"lr_scheduler_kwargs": {"num_cycles": 2}}, ["'lr_scheduler_kwargs'", "num_cycles"]),
        ({"lr_scheduler_kwargs": '{"num_cycles": '}, ["'lr_scheduler_kwargs'", "mapping"]),
        ({"optim": "sgd"}, ["'optim'", "adamw_torch"]),
        ({"report_to": "tensorboard"}, ["'report_to'", "'tensorboard'"]),
        ({"report_to": [1]}, ["'report_to'"]),
        ({"max_runtime": "soon"}, ["'max_runtime'", "3h30m"]),
        ({"max_runtime": 0}, ["'max_runtime'"]),
        ({"max_runtime": ""}, ["'max_runtime'"]),
        ({"output_dir": ""}, ["'output_dir'", "empty"]),
        ({"output_dir": "a\0b"}, ["'output_dir'", "text"]),
        ({"run_name": "\ud800"}, ["'run_name'", "text"]),
        ({"run_name": 7}, ["'run_name'", "text"]),
        ({"model_init_kwargs": [1]}, ["'model_init_kwargs'", "mapping"]),
        ({"model_init_kwargs": {1: 2}}, ["'model_init_kwargs'", "mapping"]),
        ({"hub_strategy": "never"}, ["'hub_strategy'"]),
        ({"ddp_backend": "carrier pigeon"}, ["'ddp_backend'"]),
        ({"row_errors": "ignore"}, ["'row_errors'", "skip"]),
        ({"watchdog_timeout": 0}, ["'watchdog_timeout'"]),
        ({"save_total_limit": 0}, ["'save_total_limit'"]),
        ({"save_safetensors": False}, ["'save_safetensors'"]),
        ({"packing": "yes"}, ["'packing'"]),
        ({"fsdp": "full_shard"}, ["'fsdp'", "ZeRO-3 shards the student"]),
    ],
    ids=lambda value: str(value)[:60] if isinstance(value, dict) else "",
)
def test_wrong_value_is_refused_with_one_sentence(settings, parts):
    with pytest.raises(InputError) as caught:
        GKDConfig(**settings)
    assert_one_sentence(str(caught.value), *parts)


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
@given(
    name=st.sampled_from([field.name for field in dataclasses.fields(GKDConfig)]), value=ANY_VALUE
)
def test_any_value_of_any_field_makes_a_config_or_an_input_error(name, value):
    try:
        config = GKDConfig(**{name: value})
    except InputError as error:
        assert name in str(error) and "\n" not in str(error)
    else:
        json.dumps(config.to_dict())


# ---- Refusals with files ----


@pytest.fixture
def model_dir(tmp_path):
    directory = tmp_path / "model"
    directory.mkdir()
    (directory / "config.json").write_text("{}")
    return directory


def refusal(**settings) -> str:
    with pytest.raises(InputError) as caught:
        GKDConfig(**settings).validate_files()
    assert_one_sentence(str(caught.value))
    return str(caught.value)


def occupied(resume, **settings) -> str:
    with pytest.raises(InputError) as caught:
        GKDConfig(**settings).check_output_dir_is_free(resume)
    assert_one_sentence(str(caught.value))
    return str(caught.value)


@pytest.mark.parametrize("name", ["model_name_or_path", "teacher_model_name_or_path"])
@pytest.mark.parametrize("path", ["./nowhere", "/no/such/model", "a/b/c", "has space/model", "-x"])
def test_missing_model_directory(name, path, tmp_path):
    message = refusal(output_dir=str(tmp_path / "out"), **{name: path})
    assert name in message and path in message


def test_directory_without_a_model(tmp_path):
    assert "has no config.json" in refusal(
        output_dir=str(tmp_path / "out"), model_name_or_path=str(tmp_path)
    )


def test_model_is_a_file(model_dir, tmp_path):
    refusal(output_dir=str(tmp_path / "out"), model_name_or_path=str(model_dir / "config.json"))


def test_gguf_file_takes_the_place_of_config_json(tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    names = {"output_dir": str(tmp_path / "out"), "teacher_model_name_or_path": str(tmp_path)}
    GKDConfig(**names, teacher_model_init_kwargs={"gguf_file": "model.gguf"}).validate_files()
    assert "other.gguf" in refusal(**names, teacher_model_init_kwargs={"gguf_file": "other.gguf"})


def test_hub_names_are_left_to_the_hub(tmp_path):
    GKDConfig(
        output_dir=str(tmp_path / "out"), model_name_or_path="org/name", dataset_name="gpt2"
    ).validate_files()


@pytest.mark.parametrize(
    "path",
    ["./rows", "train.jsonl", "data/train.parquet", "x.json", "/no/rows.jsonl", "~no/such/home"],
)
def test_missing_dataset(path, tmp_path):
    assert path in refusal(output_dir=str(tmp_path / "out"), dataset_name=path)


def test_empty_dataset_directory(tmp_path):
    (tmp_path / "rows").mkdir()
    assert "is empty" in refusal(
        output_dir=str(tmp_path / "out"), dataset_name=str(tmp_path / "rows")
    )


def test_missing_checkpoint_and_chat_template(tmp_path):
    assert "resume_from_checkpoint" in refusal(
        output_dir=str(tmp_path), resume_from_checkpoint="no/such"
    )
    assert "chat_template_path" in refusal(
        output_dir=str(tmp_path), chat_template_path="./no.jinja"
    )


def test_output_dir_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    assert "nothing can be written" in refusal(output_dir=str(tmp_path / "file"))
    assert "nothing can be written" in refusal(output_dir=str(tmp_path / "file" / "below"))
    assert "nothing can be written" in refusal(output_dir="/proc/run")


@pytest.mark.parametrize("trace", ["metrics.jsonl", "checkpoint-5/state", "model.safetensors"])
def test_output_dir_with_another_run(trace, tmp_path):
    (tmp_path / trace).parent.mkdir(exist_ok=True)
    (tmp_path / trace).write_text("")
    assert "already holds a run" in occupied(None, output_dir=str(tmp_path))
    assert "already holds a run" in occupied(
        False, output_dir=str(tmp_path), resume_from_checkpoint="auto"
    )
    GKDConfig(output_dir=str(tmp_path), overwrite_output_dir=True).check_output_dir_is_free(None)
    GKDConfig(output_dir=str(tmp_path)).check_output_dir_is_free("auto")
    GKDConfig(output_dir=str(tmp_path)).validate_files()  # whoever only evaluates may stand there


def test_output_dir_is_not_created_by_checking_it(tmp_path):
    config = GKDConfig(output_dir=str(tmp_path / "a" / "b"))
    config.validate_files()
    config.check_output_dir_is_free(None)
    assert not (tmp_path / "a").exists()


def test_output_dir_may_not_be_a_model(model_dir):
    assert "model_name_or_path" in occupied(
        None,
        output_dir=str(model_dir),
        model_name_or_path=str(model_dir),
        overwrite_output_dir=True,
    )


# ---- DeepSpeed files ----

ZERO3 = {"zero_optimization": {"stage": 3}}


@pytest.mark.parametrize(
    ("file", "settings", "parts"),
    [
        (
            {"train_micro_batch_size_per_gpu": 4},
            {},
            ["train_micro_batch_size_per_gpu 4", "per_device_train_batch_size is 8"],
        ),
        ({"train_micro_batch_size_per_gpu": "four"}, {}, ["'four'", "auto"]),
        ({"gradient_accumulation_steps": 2}, {}, ["gradient_accumulation_steps 2"]),
        ({"train_batch_size": 12}, {}, ["train_batch_size 12"]),
        ({"train_batch_size": 0}, {}, ["train_batch_size 0"]),
        ({"gradient_clipping": 0.5}, {}, ["gradient_clipping 0.5", "max_grad_norm is 1.0"]),
        ({"bf16": {"enabled": True}}, {}, ["bf16.enabled true", "not set"]),
        ({"bf16": {"enabled": False}}, {"bf16": True}, ["bf16.enabled false"]),
        ({"bf16": {"enabled": "yes"}}, {}, ["'yes'"]),
        ({"bf16": True}, {}, ["must be an object"]),
        ({"fp16": {"enabled": True}}, {}, ["fp16.enabled true"]),
        ({"torch_autocast": {"enabled": True}}, {}, ["torch_autocast"]),
        ({"wandb": {"enabled": True}}, {}, ["'wandb'", "report_to"]),
        ({"tensorboard": {}}, {}, ["'tensorboard'"]),
        ({"sequence_parallel_size": 2}, {}, ["'sequence_parallel_size'", "samples of its own"]),
        ({"tensor_parallel": {"autotp_size": 2}}, {}, ["'tensor_parallel'"]),
        (
            {"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 0}},
            {},
            ["zero_hpz_partition_size 0"],
        ),
        ({"csv_monitor": {}}, {}, ["'csv_monitor'"]),
        ({"scheduler": {"type": "WarmupLR"}}, {}, ["'scheduler'", "lr_scheduler_type"]),
        ({"hybrid_engine": {"enabled": True}}, {}, ["hybrid_engine", "rollout_engine"]),
        ({"optimizer": {"type": "SGD"}}, {}, ["'SGD'", "AdamW"]),
        ({"optimizer": "AdamW"}, {}, ["must be an object"]),
        (
            {"optimizer": {"type": "AdamW", "params": {"lr": 1e-3}}},
            {},
            ["optimizer.params.lr 0.001", "learning_rate"],
        ),
        (
            {"optimizer": {"type": "AdamW", "params": {"betas": [0.8, 0.9]}}},
            {},
            ["betas", "adam_beta1"],
        ),
        ({"optimizer": {"type": "AdamW", "params": {"momentum": 0.9}}}, {}, ["momentum"]),
        ({"optimizer": {"type": "Adam", "params": {"adam_w_mode": False}}}, {}, ["adam_w_mode"]),
        ({"zero_optimization": {"stage": 4}}, {}, ["stage 4"]),
        ({"zero_optimization": {"stage": "3"}}, {}, ["stage '3'"]),
        ({"zero_optimization": {"stage": True}}, {}, ["stage True"]),
        ({"zero_optimization": 3}, {}, ["must be an object"]),
        (
            {"zero_optimization": {"stage": 2}},
            {"rollout_engine": "sharded"},
            ["stage 2", "sharded"],
        ),
        (
            {"zero_optimization": {"stage": 2}},
            {"offload_optimizer_states": True},
            ["stage 2", "use stage 3"],
        ),
        (
            {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}}},
            {"offload_optimizer_states": True},
            ["never on the device", "offload_optimizer_states"],
        ),
        (
            {"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}},
            {},
            ["offload_param", "stage 2"],
        ),
        ({"zero_optimization": {"stage": 3, "offload_param": {"device": "disk"}}}, {}, ["'disk'"]),
        (
            {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme"}}},
            {},
            ["nvme_path"],
        ),
        (
            {
                "zero_optimization": {
                    "stage": 3,
                    "offload_optimizer": {"device": "nvme", "nvme_path": "/dev/shm"},
                }
            },
            {"save_strategy": "steps"},
            ["optimizer on NVMe", "no checkpoint can be resumed with", "save_strategy: no"],
        ),
        (
            {
                "zero_optimization": {
                    "stage": 3,
                    "offload_param": {"device": "nvme", "nvme_path": "/proc/swap"},
                }
            },
            {},
            ["'/proc/swap'", "nothing can be written"],
        ),
        (
            {"zero_optimisation": {"stage": 3}},
            {},
            ["'zero_optimisation'", "did you mean 'zero_optimization'?"],
        ),
        ({"train_micro_batch_size_per_gpus": 8}, {}, ["did you mean"]),
    ],
    ids=lambda value: str(value)[:60] if isinstance(value, dict) and value else "",
)
def test_student_file_that_contradicts(file, settings, parts, tmp_path, monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    message = refusal(output_dir=str(tmp_path / "out"), deepspeed={**ZERO3, **file}, **settings)
    for part in ["deepspeed", *parts]:
        assert part in message, message


def test_student_file_without_zero(tmp_path):
    assert "zero_optimization" in refusal(
        output_dir=str(tmp_path / "out"), deepspeed={"bf16": {"enabled": "auto"}}
    )


def test_train_batch_size_is_checked_against_the_ranks(tmp_path, monkeypatch):
    file = {**ZERO3, "train_batch_size": 16}
    monkeypatch.setenv("WORLD_SIZE", "2")
    GKDConfig(output_dir=str(tmp_path), deepspeed=file).validate_files()
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert "4 ranks" in refusal(output_dir=str(tmp_path), deepspeed=file)


def test_hpz_groups_are_checked_against_the_ranks(tmp_path, monkeypatch):
    file = {"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 8}}
    monkeypatch.setenv("WORLD_SIZE", "16")
    GKDConfig(output_dir=str(tmp_path), deepspeed=file).validate_files()
    monkeypatch.setenv("WORLD_SIZE", "12")
    assert "does not divide the 12 ranks" in refusal(output_dir=str(tmp_path), deepspeed=file)


@pytest.mark.parametrize("name", ["zero_quantized_weights", "zero_quantized_gradients"])
def test_zeropp_s_quantization_is_refused_on_the_cpu(name, tmp_path):
    from gkd_ds.engine import accelerator

    with pytest.raises(InputError, match=f"{name} needs kernels that DeepSpeed has for GPUs only"):
        accelerator.refuse_missing_kernels({"zero_optimization": {"stage": 3, name: True}})


@pytest.mark.parametrize(
    ("file", "parts"),
    [
        ({"zero_optimization": {"stage": 2}}, ["stage 2", "needs stage 3"]),
        ({"zero_optimization": {}}, ["stage 0"]),
        ({"optimizer": {"type": "AdamW"}}, ["'optimizer'"]),
        ({"scheduler": {}}, ["'scheduler'"]),
        ({"hybrid_engine": {}}, ["'hybrid_engine'"]),
        (
            {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}}},
            ["offload_optimizer"],
        ),
        ({"bf16": {"enabled": True}}, ["bf16.enabled true"]),
        ({"wandb": {}}, ["'wandb'"]),
    ],
    ids=lambda value: str(value)[:60] if isinstance(value, dict) else "",
)
def test_teacher_file_that_contradicts(file, parts, tmp_path):
    message = refusal(output_dir=str(tmp_path / "out"), teacher_deepspeed={**ZERO3, **file})
    for part in ["teacher_deepspeed", *parts]:
        assert part in message, message


AGREEING = [
    ZERO3,
    {
        **ZERO3,
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "train_batch_size": "auto",
    },
    {
        **ZERO3,
        "train_micro_batch_size_per_gpu": 8,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 1.0,
    },
    {**ZERO3, "bf16": {"enabled": "auto"}, "fp16": {"enabled": False}},
    {
        **ZERO3,
        "optimizer": {
            "type": "AdamW",
            "params": {"lr": "auto", "betas": "auto", "torch_adam": True},
        },
    },
    {
        **ZERO3,
        "optimizer": {"type": "Adam", "params": {"lr": 2e-5, "betas": [0.9, 0.999], "eps": 1e-8}},
    },
    {"zero_optimization": {"stage": 0}},
    {"zero_optimization": {"stage": 1, "offload_optimizer": {"device": "cpu"}}},
    {
        "zero_optimization": {"stage": 3, "reduce_bucket_size": "auto"},
        "comms_logger": {"enabled": True},
    },
]


@pytest.mark.parametrize("file", AGREEING, ids=lambda file: str(file)[:60])
def test_student_file_that_agrees(file, tmp_path):
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(file))
    assert GKDConfig(output_dir=str(tmp_path), deepspeed=str(path)).read_deepspeed_files() == (
        file,
        None,
    )


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (b"", "line 1"),
        (b"{", "not valid JSON"),
        (b"[1, 2]", "must be a JSON object"),
        (b"3", "must be a JSON object"),
        (b'{"bf16": NaN}', "NaN is not a number"),
        (b'{"bf16": {}, "bf16": {}}', "'bf16' appears twice"),
        (b'{"a": 1, // comment\n}', "line 1"),
        (b"\xff\xfe{", "UTF-8"),
        (b"[" * 100_000, "not valid JSON"),
        (b'{"a": ' + b"1" * 5000 + b"}", "not valid JSON"),
    ],
    ids=lambda value: repr(value)[:30],
)
@pytest.mark.parametrize("name", ["deepspeed", "teacher_deepspeed"])
def test_unreadable_deepspeed_file(name, content, part, tmp_path):
    path = tmp_path / "ds.json"
    path.write_bytes(content)
    message = refusal(output_dir=str(tmp_path / "out"), **{name: str(path)})
    assert part in message and name in message


@pytest.mark.parametrize("name", ["deepspeed", "teacher_deepspeed"])
def test_missing_deepspeed_file(name, tmp_path):
    assert "No such file" in refusal(
        output_dir=str(tmp_path), **{name: str(tmp_path / "none.json")}
    )
    assert "directory" in refusal(output_dir=str(tmp_path), **{name: str(tmp_path)})


# ---- Writing it down ----


def test_to_dict_is_json_without_secrets(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_environment_secret")
    config = GKDConfig(
        hub_token="hf_field_secret",
        model_init_kwargs={"token": "hf_nested_secret", "revision": "main", "dtype": object},
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

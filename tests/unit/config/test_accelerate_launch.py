"""What `accelerate launch` says in variables."""

import json

import pytest

from gkd_ds.config.config import GKDConfig
from gkd_ds.config.deepspeed import resolve_student
from gkd_ds.runtime.errors import InputError
from tests.refusals import assert_one_sentence


@pytest.fixture
def launched(monkeypatch):
    """A configuration, made under variables without their prefix ACCELERATE_."""

    def make(settings: dict | None = None, **variables: str) -> GKDConfig:
        for name, value in variables.items():
            monkeypatch.setenv(f"ACCELERATE_{name}", value)
        config = GKDConfig(**(settings or {}))
        config.validate_files()
        config.validate()
        return config

    return make


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_the_zero_stage_is_taken(stage, launched):
    config = launched(USE_DEEPSPEED="true", DEEPSPEED_ZERO_STAGE=str(stage))
    file = resolve_student(config, world_size=2, hidden_size=8, precision="float32")
    assert file["zero_optimization"]["stage"] == stage


def test_offload_is_taken(launched, tmp_path):
    config = launched(
        {"save_strategy": "no"},
        USE_DEEPSPEED="true",
        DEEPSPEED_ZERO_STAGE="3",
        DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE="cpu",
        DEEPSPEED_OFFLOAD_PARAM_DEVICE="nvme",
        DEEPSPEED_OFFLOAD_PARAM_NVME_PATH=str(tmp_path),
    )
    zero = config.deepspeed["zero_optimization"]
    assert zero["offload_optimizer"] == {"device": "cpu"}
    assert zero["offload_param"] == {"device": "nvme", "nvme_path": str(tmp_path)}


def test_its_file_is_the_student_s_file(launched, tmp_path):
    file = tmp_path / "ds.json"
    file.write_text(json.dumps({"zero_optimization": {"stage": 1}}))
    config = launched(USE_DEEPSPEED="true", DEEPSPEED_CONFIG_FILE=str(file))
    assert config.read_deepspeed_files()[0]["zero_optimization"]["stage"] == 1


def test_what_the_script_says_wins_as_in_transformers(launched):
    own = {"zero_optimization": {"stage": 3}}
    config = launched({"deepspeed": own}, USE_DEEPSPEED="true", DEEPSPEED_ZERO_STAGE="2")
    assert config.deepspeed == own


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_the_precision_is_taken(precision, launched):
    config = launched(MIXED_PRECISION=precision)
    assert getattr(config, precision) is True
    assert launched({precision: True}, MIXED_PRECISION=precision) == config


@pytest.mark.parametrize("word", ["no", "", "NO"])
def test_saying_nothing_changes_nothing(word, launched):
    assert launched(MIXED_PRECISION=word, USE_DEEPSPEED="false", DYNAMO_BACKEND=word) == GKDConfig()


def test_use_cpu_is_taken(launched):
    assert launched(USE_CPU="True").use_cpu


@pytest.mark.parametrize(
    ("settings", "variables", "parts"),
    [
        ({"bf16": True}, {"MIXED_PRECISION": "fp16"}, ["asks for fp16", "bf16 True"]),
        ({"fp16": True}, {"MIXED_PRECISION": "bf16"}, ["asks for bf16", "fp16 True"]),
        ({"bf16": False}, {"MIXED_PRECISION": "bf16"}, ["asks for bf16", "bf16 False"]),
        ({}, {"MIXED_PRECISION": "fp8"}, ["asks for fp8"]),
        ({}, {"USE_FSDP": "true"}, ["FSDP", "--use_deepspeed"]),
        ({}, {"USE_MEGATRON_LM": "true"}, ["Megatron"]),
        ({}, {"USE_PARALLELISM_CONFIG": "true"}, ["parallelism"]),
        ({}, {"DYNAMO_BACKEND": "INDUCTOR"}, ["INDUCTOR", "--dynamo_backend no"]),
        ({}, {"USE_DEEPSPEED": "true", "DEEPSPEED_ZERO_STAGE": "4"}, ["stage 4"]),
        ({}, {"USE_DEEPSPEED": "true", "DEEPSPEED_ZERO_STAGE": "three"}, ["stage 'three'"]),
        (
            {},
            {"USE_DEEPSPEED": "true", "GRADIENT_ACCUMULATION_STEPS": "4"},
            ["gradient_accumulation_steps"],
        ),
        ({}, {"USE_DEEPSPEED": "true", "GRADIENT_CLIPPING": "0.5"}, ["gradient_clipping"]),
        ({}, {"USE_DEEPSPEED": "true", "GRADIENT_CLIPPING": "soft"}, ["gradient_clipping"]),
        ({}, {"USE_DEEPSPEED": "true", "DEEPSPEED_CONFIG_FILE": "no.json"}, ["no.json"]),
    ],
)
def test_what_is_not_done_here_is_refused(settings, variables, parts, launched):
    with pytest.raises(InputError) as caught:
        launched(settings, **variables)
    assert_one_sentence(str(caught.value), *parts)

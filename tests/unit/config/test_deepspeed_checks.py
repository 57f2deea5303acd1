"""DeepSpeed files that contradict GKDConfig, and files that agree with it."""

import json

import pytest

from gkd_ds.config.config import GKDConfig
from tests.refusals import refusal

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

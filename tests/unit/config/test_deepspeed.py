"""Reading a DeepSpeed file, and filling in what it leaves to us."""

import copy

import pytest

from gkd_ds.config.config import GKDConfig
from gkd_ds.config.deepspeed import resolve_auto, resolve_student, resolve_teacher
from tests.refusals import refusal


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


def test_the_built_in_engines_are_zero_3():
    config = GKDConfig(gradient_accumulation_steps=2)
    student = resolve_student(config, world_size=3, hidden_size=16, precision="bfloat16")
    assert student["zero_optimization"] == {"stage": 3, "reduce_bucket_size": 256}
    assert student["train_batch_size"] == 8 * 2 * 3
    assert (student["bf16"], student["fp16"]) == ({"enabled": True}, {"enabled": False})
    teacher = resolve_teacher(config, hidden_size=16, precision="float32")
    assert teacher["zero_optimization"] == {"stage": 3, "memory_efficient_linear": False}
    assert "train_batch_size" not in teacher


def test_auto_follows_from_the_width_or_is_left_to_deepspeed():
    zero = {
        "stage": 3,
        "reduce_bucket_size": "auto",
        "stage3_prefetch_bucket_size": "auto",
        "stage3_param_persistence_threshold": "auto",
        "sub_group_size": "auto",
        "overlap_comm": True,
    }
    assert resolve_auto({"zero_optimization": zero, "aio": {"block_size": "auto"}}, 10) == {
        "zero_optimization": {
            "stage": 3,
            "reduce_bucket_size": 100,
            "stage3_prefetch_bucket_size": 90,
            "stage3_param_persistence_threshold": 100,
            "overlap_comm": True,
        },
        "aio": {},
    }


def test_resolving_changes_neither_the_field_nor_the_disk(tmp_path):
    place = tmp_path / "nvme"
    file = {
        "zero_optimization": {
            "stage": 3,
            "offload_param": {"device": "nvme", "nvme_path": str(place), "buffer_count": "auto"},
        },
        "optimizer": {"type": "AdamW", "params": {"lr": "auto"}},
    }
    config = GKDConfig(deepspeed=file, learning_rate=0.5)
    before = copy.deepcopy(file)
    resolved = resolve_student(config, world_size=1, hidden_size=16, precision="float32")
    assert resolved["optimizer"]["params"]["lr"] == 0.5
    assert resolved["zero_optimization"]["offload_param"] == {
        "device": "nvme",
        "nvme_path": str(place),
    }
    assert config.deepspeed == before and not place.exists()


def test_gradients_that_are_whole_in_fp32_are_clipped_by_the_student():
    config = GKDConfig(deepspeed={"zero_optimization": {"stage": 0}})
    shape = {"world_size": 1, "hidden_size": 16}
    clipping = [
        resolve_student(config, **shape, precision=precision)["gradient_clipping"]
        for precision in ("float32", "bfloat16")
    ]
    assert clipping == [0.0, 1.0]

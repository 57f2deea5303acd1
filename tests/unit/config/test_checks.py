"""Every refusal in one sentence: values out of bounds, contradictions, and paths that name nothing."""

import pytest

from gkd_ds.config.config import GKDConfig
from gkd_ds.runtime.errors import InputError
from tests.refusals import assert_one_sentence, refusal

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
        (
            {"rollout_speculation": "previous_epoch", "rollout_engine": "sharded"},
            ["'rollout_speculation'", "rollout_engine is sharded", "gather"],
        ),
        (
            {"rollout_speculation": "previous_epoch", "rollout_engine": "hybrid"},
            ["'rollout_speculation'", "rollout_engine is hybrid", "gather"],
        ),
        ({"rollout_speculation": "next_epoch"}, ["'rollout_speculation'", "previous_epoch"]),
        ({"speculation_share": 0.5}, ["'speculation_share'", "rollout_speculation is none"]),
        ({"speculation_disk_mb": 5}, ["'speculation_disk_mb'", "rollout_speculation is none"]),
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
        (
            {
                "load_best_model_at_end": True,
                "save_only_model": True,
                "eval_strategy": "steps",
                "eval_steps": 500,
            },
            ["'load_best_model_at_end'", "'save_only_model'"],
        ),
        (
            {
                "load_best_model_at_end": True,
                "save_only_model": True,
                "eval_strategy": "epoch",
                "save_strategy": "best",
            },
            ["'load_best_model_at_end'", "'save_only_model'"],
        ),
        ({"push_to_hub": True, "hub_model_id": "a/b/c"}, ["'hub_model_id'", "'a/b/c'"]),
        ({"push_to_hub": True, "output_dir": "runs/my run"}, ["'hub_model_id'", "'my run'"]),
        ({"push_to_hub": True, "output_dir": "runs/a--b"}, ["'hub_model_id'", "'a--b'"]),
        ({"lr_scheduler_type": "wavy"}, ["'lr_scheduler_type'", "cosine"]),
        ({"lr_scheduler_kwargs": {"num_cycles": 2}}, ["'lr_scheduler_kwargs'", "num_cycles"]),
        ({"lr_scheduler_kwargs": '{"num_cycles": '}, ["'lr_scheduler_kwargs'", "mapping"]),
        ({"optim": "adamw_tourch"}, ["'optim'", "did you mean adamw_torch?"]),
        ({"optim": "newton"}, ["'optim'", "adamw_torch"]),
        ({"optim_args": "momentum"}, ["'optim_args'", "name=value"]),
        ({"optim_args": "momentum=0.9;nesterov=true=yes"}, ["'optim_args'"]),
        ({"report_to": "tensorbord"}, ["'report_to'", "'tensorbord'", "tensorboard"]),
        ({"report_to": ["wandb", "sacred"]}, ["'report_to'", "'sacred'"]),
        ({"warmup_steps": 2.5}, ["'warmup_steps'", "whole number"]),
        ({"bf16_full_eval": True, "bf16": False}, ["'bf16_full_eval'", "set bf16: true"]),
        ({"fp16_full_eval": True, "bf16": True}, ["'fp16_full_eval'", "set fp16: true"]),
        ({"lora_r": 4}, ["'lora_r'", "use_peft"]),
        ({"use_dora": True}, ["'use_dora'", "use_peft"]),
        ({"model_init_kwargs": {"dtype": "int8"}}, ["'model_init_kwargs'", "'int8'", "bfloat16"]),
        ({"teacher_model_init_kwargs": {"torch_dtype": 4}}, ["'teacher_model_init_kwargs'"]),
        (
            {"teacher_model_init_kwargs": {"torch_dtype": "float16", "dtype": "float32"}},
            ["'teacher_model_init_kwargs'", "float16 and float32"],
        ),
        ({"bf16": False, "dtype": "bfloat16"}, ["16 bits", "'bf16'", "remove dtype"]),
        (
            {"bf16": False, "model_init_kwargs": {"torch_dtype": "float16"}},
            ["16 bits", "'fp16'"],
        ),
        (
            {"model_revision": "v1", "model_init_kwargs": {"revision": "v2"}},
            ["'model_revision'", "'v1'", "'v2'"],
        ),
        (
            {"dtype": "float32", "model_init_kwargs": {"torch_dtype": "auto"}},
            ["'model_init_kwargs'", "auto and float32"],
        ),
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
        ({"packing_strategy": "wrapped"}, ["'packing_strategy'", "bfd"]),
        ({"fsdp": "full_shard"}, ["'fsdp'", "DeepSpeed shards the student"]),
    ],
    ids=lambda value: str(value)[:60] if isinstance(value, dict) else "",
)
def test_wrong_value_is_refused_with_one_sentence(settings, parts):
    with pytest.raises(InputError) as caught:
        GKDConfig(**settings)
    assert_one_sentence(str(caught.value), *parts)


# ---- With files ----


@pytest.fixture
def model_dir(tmp_path):
    directory = tmp_path / "model"
    directory.mkdir()
    (directory / "config.json").write_text("{}")
    return directory


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


@pytest.mark.parametrize(
    "metric, greater", [("accuracy", True), ("eval_loss", False), (None, None)]
)
def test_which_of_two_metrics_is_better(metric, greater):
    """Callbacks such as EarlyStoppingCallback ask, also where no best model is kept."""
    assert GKDConfig(metric_for_best_model=metric).greater_is_better is greater

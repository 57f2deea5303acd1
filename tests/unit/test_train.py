"""The command line of gkd_ds.train: recipe and flags, and one sentence with exit code 2 for
whatever is wrong.
"""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gkd_ds import train
from gkd_ds.config.config import GKDConfig
from gkd_ds.config.recipe import read_flags, read_recipe
from gkd_ds.runtime.errors import InputError
from tests import ROOT
from tests.tiny import make_jsonl, make_model, make_tokenizer


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    """student/, teacher/, train.jsonl and a recipe that is right."""
    directory = tmp_path_factory.mktemp("material")
    tokenizer = make_tokenizer()
    make_model("llama", directory / "student", layers=1, tokenizer=tokenizer)
    make_model("llama", directory / "teacher", layers=2, tokenizer=tokenizer)
    make_jsonl(directory / "train.jsonl", 20)
    recipe = {
        "model_name_or_path": str(directory / "student"),
        "teacher_model_name_or_path": str(directory / "teacher"),
        "dataset_name": str(directory / "train.jsonl"),
        "output_dir": str(directory / "out"),
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 3,
        "max_length": 128,
        "max_new_tokens": 16,
    }
    (directory / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return directory


def run_main(capsys, *arguments: str) -> tuple[int, str]:
    """Exit code and the error line, which is all that stderr may hold."""
    code = train.main(list(arguments))
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) <= 1, lines
    return code, lines[0] if lines else ""


# ---- Flags ----


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--lmbda", "0.3"], {"lmbda": "0.3"}),
        (["--lmbda=0.3"], {"lmbda": "0.3"}),
        (["--lmbda=0.3", "--lmbda", "0.4"], {"lmbda": "0.4"}),
        (["--bf16"], {"bf16": True}),
        (["--bf16", "false"], {"bf16": "false"}),
        (["--bf16", "--seq_kd"], {"bf16": True, "seq_kd": True}),
        (["--max-steps", "-1"], {"max_steps": "-1"}),
        (["--learning_rate=-1e-5"], {"learning_rate": "-1e-5"}),
        (["--local_rank=1"], {"local_rank": "1"}),
        (["--local-rank", "1"], {"local_rank": "1"}),
        (["--run_name=a=b"], {"run_name": "a=b"}),
        (["--run_name="], {"run_name": ""}),
        (["--chat_template_path", "null"], {"chat_template_path": None}),
        (["--output_dir", "null"], {"output_dir": None}),
        (["--resume_from_checkpoint"], {"resume_from_checkpoint": True}),
        (["--dry_run"], {"dry_run": True}),
        (["--dry_run", "no"], {"dry_run": False}),
        (["--config", "r.yaml"], {"config": "r.yaml"}),
        (["-h"], {"help": True}),
        (["--no_disable_dropout", "--bf16"], {"disable_dropout": False, "bf16": True}),
        (["--no-gradient-checkpointing"], {"gradient_checkpointing": False}),
        (["--label_names", "a", "b", "--beta", "1"], {"label_names": ["a", "b"], "beta": "1"}),
        (["--label_names", "a"], {"label_names": ["a"]}),
        (["--label_names", '["a"]'], {"label_names": '["a"]'}),
        (["--report_to", "wandb"], {"report_to": "wandb"}),
        (["--report_to", "wandb", "mlflow"], {"report_to": ["wandb", "mlflow"]}),
        (["--lora_target_modules", "q", "v"], {"lora_target_modules": ["q", "v"]}),
        (["--torch_dtype", "bfloat16"], {"torch_dtype": "bfloat16"}),
    ],
)
def test_flags_are_read(arguments, expected):
    assert read_flags(arguments) == expected


def test_a_command_line_written_for_trl_is_a_configuration():
    """The one in the head of its example script, with what people add."""
    line = """--model_name_or_path org/student --teacher_model_name_or_path org/teacher
        --dataset_name org/chats --dataset_train_split train --learning_rate 2e-5
        --per_device_train_batch_size 4 --gradient_accumulation_steps 8 --output_dir gkd-model
        --num_train_epochs 1 --push_to_hub --gradient_checkpointing --logging_steps 25
        --eval_strategy steps --eval_steps 100 --bf16 --torch_dtype bfloat16 --model_revision main
        --attn_implementation sdpa --trust_remote_code --warmup_steps 0.1 --optim adamw_torch
        --report_to wandb tensorboard --save_strategy epoch --dataset_num_proc 4
        --dataloader_num_workers 8 --ddp_find_unused_parameters false --max_length 2048
        --lmbda 0.5 --beta 0.5 --temperature 0.9 --seq_kd false --no_disable_dropout"""
    config = GKDConfig(**read_flags(line.split()))
    assert (config.dtype, config.bf16, config.warmup_steps) == ("bfloat16", True, 0.1)
    assert config.report_to == ["wandb", "tensorboard"] and not config.disable_dropout


@pytest.mark.parametrize(
    ("flags", "part"),
    [
        ("--load_in_4bit", "'load_in_4bit'"),
        ("--dataset_streaming", "'dataset_streaming'"),
        ("--lora_r 64", "use_peft"),
        ("--no_disable_dropout true", "--no_disable_dropout takes no value"),
        ("--no_push_to_hub", "--no_push_to_hub"),
    ],
)
def test_what_trl_s_flags_ask_for_and_is_not_done_is_refused(flags, part, capsys):
    code, error = run_main(capsys, *flags.split())
    assert code == 2 and part in error


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--learning_rte", "1e-5"], ["'--learning_rte'", "did you mean --learning_rate?"]),
        (["--lambda", "1"], ["did you mean --lmbda?"]),
        (["--per_device_batch_size", "1"], ["did you mean --per_device_"]),
        (["--confg", "r.yaml"], ["did you mean --config?"]),
        (["--qqqq", "1"], ["see --help"]),
        (["--lmbda"], ["--lmbda needs a value"]),
        (["--config"], ["--config needs a value"]),
        (["--lmbda", "--beta", "1"], ["--lmbda needs a value"]),
        (["recipe.yaml"], ["'recipe.yaml'", "--name value"]),
        (["--lora_r", "8"], ["'lora_r'", "use_peft"]),
        (["--load_in_4bit"], ["'load_in_4bit'", "use_peft"]),
        (["--bnb_4bit_quant_type", "fp4"], ["'bnb_4bit_quant_type'"]),
        (["--dataset_streaming"], ["read whole"]),
        (["--evaluation_strategy", "no"], ["use eval_strategy"]),
        (["--max_seq_length", "5"], ["use max_length"]),
        (["-lr", "1"], ["'-lr'"]),
        (["--"], ["'--'"]),
        (["--=3"], ["Unknown name '--'"]),
        (["--bf16", "true", "false"], ["'false'"]),
        (["--dry_run=perhaps"], ["dry_run", "true or false"]),
        (["--beta", "2"], ["'beta'", "at most 1"]),
        (["--beta", "nan"], ["'beta'", "finite"]),
        (["--beta", "one"], ["'beta'", "'one'"]),
        (["--max_steps", "1.5"], ["'max_steps'"]),
        (["--bf16", "perhaps"], ["'bf16'"]),
        (["--fsdp", "full_shard"], ["'fsdp'", "not supported"]),
        (["--model_init_kwargs", "{'a': 1}"], ["'model_init_kwargs'"]),
        (["--config", "no/such/recipe.yaml"], ["'no/such/recipe.yaml'", "cannot be read"]),
        (["--config", "."], ["cannot be read"]),
        ([], ["No model_name_or_path is given"]),
        (["--model_name_or_path", "a/b"], ["No teacher_model_name_or_path is given"]),
        (
            ["--model_name_or_path", "a/b", "--teacher_model_name_or_path", "a/c"],
            ["No dataset_name is given"],
        ),
    ],
    ids=lambda value: " ".join(value)[:50],
)
def test_wrong_command_line_ends_with_2_and_one_sentence(arguments, parts, capsys):
    code, error = run_main(capsys, *arguments)
    assert code == 2 and error.startswith("gkd_ds: error: "), error
    for part in parts:
        assert part in error


# ---- Recipes ----


def test_recipe_is_read_and_the_command_line_wins(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text(
        "# a comment\nlearning_rate: 2e-5\neval_strategy: no\nbf16: yes\nreport_to: "
        "[wandb]\nrun_name: 2024-01-01\n"
        "data_seed:\nmodel_init_kwargs:\n  revision: main\n  use_cache: false\nchat_template_path: "
        "'null'\n"
    )
    recipe = read_recipe(str(path))
    config = GKDConfig(**{**recipe, **read_flags(["--learning_rate", "1e-4"])})
    assert config.learning_rate == 1e-4 and config.eval_strategy == "no" and config.bf16 is True
    assert (
        config.report_to == ["wandb"]
        and config.run_name == "2024-01-01"
        and config.data_seed is None
    )
    assert (
        config.model_init_kwargs == {"revision": "main", "use_cache": False}
        and config.chat_template_path == "null"
    )


def test_resolved_configuration_is_a_recipe(tmp_path):
    config = GKDConfig(
        beta=0.25,
        eval_strategy="no",
        lr_scheduler_type="cosine",
        lr_scheduler_kwargs={"num_cycles": 2},
    )
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(config.to_dict()))
    assert GKDConfig(**read_recipe(str(tmp_path / "r.yaml"))) == config


BAD_RECIPES = {
    "misspelt": (
        b"learning_rte: 1e-5",
        ["'learning_rte'", "line 1", "did you mean learning_rate?"],
    ),
    "unknown": (b"beta: 0.5\nqqqq: 1", ["'qqqq'", "line 2"]),
    "TRL's": (b"beta: 0.5\nmax_seq_length: 7", ["'max_seq_length'", "line 2", "use max_length"]),
    "twice": (b"beta: 0.5\nbeta: 0.6", ["'beta'", "twice", "line 2"]),
    "empty": (b"", ["flat YAML mapping"]),
    "only a comment": (b"# nothing", ["flat YAML mapping"]),
    "a list": (b"- beta: 0.5", ["flat YAML mapping"]),
    "a word": (b"beta", ["flat YAML mapping"]),
    "two documents": (b"beta: 0.5\n---\nbeta: 0.6", ["not valid YAML"]),
    "sections": (b"training:\n  beta: 0.5", ["'training'"]),
    "nested value": (b"beta:\n  value: 0.5", ["'beta'"]),
    "not YAML": (b"beta: [0.5", ["not valid YAML"]),
    "tabs": (b"beta:\n\t0.5: 1", ["not valid YAML"]),
    "binary": (b"\xff\xfe\x00beta", ["UTF-8"]),
    "control characters": (b"beta: \x07", ["not valid YAML"]),
    "a tag": (b"beta: !!float 0.5", ["tag or anchor", "line 1"]),
    "python": (b"run_name: !!python/object/apply:os.system ['true']", ["tag or anchor"]),
    "an anchor": (b"beta: &a 0.5\nlmbda: *a", ["tag or anchor"]),
    "endless": (b"report_to: &a [*a]", ["tag or anchor"]),
    "deep": (b"report_to: " + b"[" * 1200 + b"]" * 1200, []),
    "a list as a name": (b"? [beta]\n: 0.5", ["Unknown name"]),
    "a bad date inside": (b"model_init_kwargs: {a: 2024-99-99}", ["cannot be read"]),
    "empty value": (b"beta:", ["'beta'", "is empty"]),
    "text for a number": (b"max_new_tokens: lots", ["'max_new_tokens'", "'lots'"]),
    "NaN": (b"lmbda: .nan", ["'lmbda'"]),
    "nan": (b"lmbda: nan", ["'lmbda'", "finite"]),
    "a number's list": (b"beta: [0.5]", ["'beta'"]),
    "a command": (b"dry_run: true", ["'dry_run'"]),
    "a reference": (b"config: other.yaml", ["'config'"]),
    "carriage return": (b'run_name: "a\\0b"', ["'run_name'"]),
    "lone surrogate": (b'run_name: "\\ud800"', []),
}


@pytest.mark.parametrize("name", BAD_RECIPES)
def test_wrong_recipe_ends_with_2_and_one_sentence(name, tmp_path, capsys):
    content, parts = BAD_RECIPES[name]
    (tmp_path / "r.yaml").write_bytes(content)
    code, error = run_main(capsys, "--config", str(tmp_path / "r.yaml"))
    assert code == 2 and error.startswith("gkd_ds: error: "), error
    for part in parts:
        assert part in error


FIELDS = st.sampled_from(
    [
        "beta",
        "bf16",
        "deepspeed",
        "report_to",
        "output_dir",
        "eval_strategy",
        "model_init_kwargs",
        "x",
    ]
)
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.dates()
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(SCALARS, inner, max_size=2),
    max_leaves=4,
)


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(recipe=st.dictionaries(FIELDS, VALUES, max_size=3))
def test_any_yaml_mapping_makes_a_config_or_an_input_error(recipe, tmp_path):
    (tmp_path / "r.yaml").write_text(
        yaml.safe_dump(recipe), encoding="utf-8", errors="surrogatepass"
    )
    make_config_or_refuse(tmp_path / "r.yaml")


@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    text=st.binary(max_size=40)
    | st.text(alphabet="beta:0.5lmd \n-[]{}'\"!&*?|>#%@`\t,", max_size=40).map(str.encode)
)
def test_any_file_makes_a_config_or_an_input_error(text, tmp_path):
    (tmp_path / "r.yaml").write_bytes(text)
    make_config_or_refuse(tmp_path / "r.yaml")


WORDS = st.text(max_size=6) | st.sampled_from(
    ["--beta", "--bf16", "--beta=0.5", "--run_name", "--", "-1", "true", "null"]
)


@settings(max_examples=300, deadline=None)
@given(arguments=st.lists(WORDS, max_size=5))
def test_any_command_line_makes_a_config_or_an_input_error(arguments):
    try:
        given = read_flags(arguments)
        GKDConfig(
            **{
                name: value
                for name, value in given.items()
                if name not in ("config", "dry_run", "help")
            }
        )
    except InputError as error:
        assert "\n" not in str(error)


def make_config_or_refuse(path: Path) -> None:
    try:
        GKDConfig(**read_recipe(str(path)))
    except InputError as error:
        assert "\n" not in str(error)


# ---- Files that a right recipe names wrongly ----


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--model_name_or_path", "./missing"], ["'model_name_or_path'", "./missing"]),
        (["--teacher_model_name_or_path", "/no/teacher"], ["'teacher_model_name_or_path'"]),
        (
            ["--teacher_model_name_or_path", "no-such-org/no-such-model"],
            ["neither a local directory nor a model"],
        ),
        (["--dataset_name", "missing.jsonl"], ["'missing.jsonl'", "does not exist"]),
        (["--dataset_name", "no-such-org/no-such-data"], ["no-such-org/no-such-data"]),
        (["--deepspeed", "missing.json"], ["'missing.json'", "No such file"]),
        (["--teacher_deepspeed", '{"zero_optimization": {"stage": 1}}'], ["needs stage 3"]),
        (["--deepspeed", '{"zero_optimization": {"stage": 3}, "wandb": {}}'], ["'wandb'"]),
        (["--output_dir", "/proc/run"], ["nothing can be written"]),
        (["--resume_from_checkpoint", "missing"], ["'resume_from_checkpoint'"]),
        (["--eval_strategy", "epoch"], ["no split 'test'", "it has: train"]),
        (["--do_eval", "--dataset_test_split", "held_out"], ["no split 'held_out'"]),
    ],
    ids=lambda value: " ".join(value)[:50],
)
def test_wrong_path_ends_with_2_and_one_sentence(arguments, parts, material, capsys):
    code, error = run_main(capsys, "--config", str(material / "recipe.yaml"), *arguments)
    assert code == 2, error
    for part in parts:
        assert part in error


def test_dataset_without_rows(material, tmp_path, capsys):
    (tmp_path / "empty.jsonl").write_text("")
    arguments = [
        "--config",
        str(material / "recipe.yaml"),
        "--dataset_name",
        str(tmp_path / "empty.jsonl"),
        "--dry_run",
    ]
    code, error = run_main(capsys, *arguments)
    assert code == 2 and "empty.jsonl" in error


def test_only_the_first_rank_of_a_node_speaks(capsys, monkeypatch):
    monkeypatch.setattr(train, "SECONDS_BEFORE_EXIT", 0.01)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert run_main(capsys, "--beta", "2") == (2, "")
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert run_main(capsys, "--beta", "2")[0] == 2


def test_secrets_do_not_appear_in_errors(capsys, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_very_secret_token")
    code, error = run_main(capsys, "--model_name_or_path", "./hf_very_secret_token")
    assert code == 2 and "very_secret" not in error


# ---- Help and dry run ----


def test_secrets_do_not_appear_in_tracebacks(capsys, material):
    def fail(config):
        raise RuntimeError("cannot read https://me:hunter2hunter2@example.org/data")

    names = ("model_name_or_path", "teacher_model_name_or_path", "dataset_name")
    places = (material / "student", material / "teacher", material / "train.jsonl")
    flags = [f"--{name}={place}" for name, place in zip(names, places)]
    assert (
        train.command([*flags, f"--output_dir={material / 'out'}"], fail, train.check_training) == 1
    )
    text = capsys.readouterr().err
    assert "Traceback" in text and "https://***@example.org/data" in text and "hunter2" not in text


def test_help_shows_every_field_in_groups(capsys):
    assert train.main(["--help"]) == 0
    text = capsys.readouterr().out
    for name in GKDConfig().to_dict():
        assert name in text
    assert (
        text.index("\nModels\n")
        < text.index("--model_name_or_path")
        < text.index("\nData\n")
        < text.index("--dataset_name")
    )


def test_dry_run_prints_the_plan_and_writes_nothing(material, capsys):
    assert (
        train.main(["--config", str(material / "recipe.yaml"), "--beta", "0.125", "--dry_run"]) == 0
    )
    text = capsys.readouterr().out
    assert "beta: 0.125" in text and "samples per window 6 (2 x 3 x 1 ranks)" in text
    assert "windows per epoch  4" in text and "updates            12" in text and "KV cache" in text
    assert not (material / "out").exists()


def test_dry_run_says_how_much_of_a_completion_is_kept(material, capsys):
    flags = ["--config", str(material / "recipe.yaml"), "--rollout_speculation", "previous_epoch"]
    flags += ["--speculation_share", "0.8", "--speculation_disk_mb", "1", "--dry_run"]
    assert train.main(flags) == 0
    text = capsys.readouterr().out
    (samples,) = re.findall(r"samples +(\d+)\n", text)
    tokens = 2**20 // 4 // int(samples)
    assert f"0.8 of the rows of an epoch, up to {tokens} tokens" in text


def test_dry_run_needs_no_free_output_dir(material, tmp_path, capsys):
    """Somebody asks what a run would take while another one is there; but not in one of the inputs."""
    (tmp_path / "metrics.jsonl").write_text("")
    flags = ["--config", str(material / "recipe.yaml"), "--output_dir", str(tmp_path)]
    assert train.main([*flags, "--dry_run"]) == 0
    assert run_main(capsys, *flags)[0] == 2
    flags[-1] = str(material / "student")
    code, error = run_main(capsys, *flags, "--dry_run")
    assert code == 2 and "the same directory as model_name_or_path" in error


def run_module(*arguments: str, **environment: str) -> tuple[subprocess.CompletedProcess, float]:
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "gkd_ds.train", *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )
    return done, time.monotonic() - started


def test_as_a_process_wrong_input_answers_before_torch_is_imported():
    done, _ = run_module("--beta", "2", PYTHONVERBOSE="", PYTHONPROFILEIMPORTTIME="1")
    errors = [line for line in done.stderr.splitlines() if not line.startswith("import time:")]
    assert done.returncode == 2 and done.stdout == ""
    assert errors == [
        "gkd_ds: error: GKDConfig field 'beta' must be at least 0 and at most 1, not 2.0."
    ]
    imported = {
        line.split("|")[-1].strip()
        for line in done.stderr.splitlines()
        if line.startswith("import time:")
    }
    assert not imported & {"torch", "transformers", "deepspeed", "datasets"}


def test_as_a_process_the_other_ranks_stay_silent():
    done, seconds = run_module("--beta", "2", LOCAL_RANK="1")
    assert done.returncode == 2 and done.stderr == "" and seconds >= train.SECONDS_BEFORE_EXIT


def test_the_exit_code_survives_what_happens_while_the_interpreter_goes_down():
    """gloo's threads abort there now and then; here it happens always. Handlers of atexit still
    run.
    """
    program = """
import atexit, os
from gkd_ds.train import leave
class Late:
    def __del__(self):
        os.abort()
late = Late()
atexit.register(print, "closed")
leave(75)
"""
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT
    )
    assert (result.returncode, result.stdout) == (75, "closed\n")

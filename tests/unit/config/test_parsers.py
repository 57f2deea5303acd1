"""Parsers that make flags of dataclasses: transformers' HfArgumentParser, and TRL's TrlParser with
ScriptArguments and ModelConfig beside GKDConfig.
"""

import dataclasses
import json
from pathlib import Path

import pytest
from transformers import HfArgumentParser

from gkd_ds.config.config import GKDConfig
from gkd_ds.config.fields import OPTIONS
from gkd_ds.config.recipe import read_flags
from gkd_ds.runtime.errors import InputError

TRL = json.loads(Path(__file__).with_name("trl_api.json").read_text())


def stand_in(name: str) -> type:
    """A dataclass with the fields of TRL's class of that name, all of them text."""
    fields = [(f, str | None, dataclasses.field(default=None)) for f in TRL[name]]
    return dataclasses.make_dataclass(name, fields)


def parse(*arguments: str) -> GKDConfig:
    (config,) = HfArgumentParser(GKDConfig).parse_args_into_dataclasses(list(arguments))
    return config


def test_nothing_given_is_the_default_and_the_help_can_be_printed():
    assert parse() == GKDConfig()
    assert "--rollout_memory_mb" in HfArgumentParser(GKDConfig).format_help()


@pytest.mark.parametrize(
    ("arguments", "settings"),
    [
        ("--bf16 false --fp16", {"bf16": False, "fp16": True}),
        ("--no_disable_dropout --no-save-safetensors", None),
        ("--no_disable_dropout", {"disable_dropout": False}),
        ("--eval_strategy steps --eval_steps 3", {"eval_strategy": "steps", "eval_steps": 3}),
        ("--max_runtime 3h30m --max_length 64", {"max_runtime": "3h30m", "max_length": 64}),
        ("--resume_from_checkpoint true", {"resume_from_checkpoint": True}),
        ("--resume_from_checkpoint a/b", {"resume_from_checkpoint": "a/b"}),
        ("--include_num_input_tokens_seen", {"include_num_input_tokens_seen": "all"}),
        ("--include_for_metrics inputs loss", {"include_for_metrics": ["inputs", "loss"]}),
        ("--report_to wandb,tensorboard", {"report_to": ["wandb", "tensorboard"]}),
        ("--pad_to_multiple_of auto", {"pad_to_multiple_of": "auto"}),
        ("--rollout_engine sharded --lmbda 1", {"rollout_engine": "sharded", "lmbda": 1.0}),
        ("--model_init_kwargs {'dtype':'bfloat16'}", {"model_init_kwargs": {"dtype": "bfloat16"}}),
        ("--deepspeed a.json", {"deepspeed": "a.json"}),
        ("--lr_scheduler_type cosine --lr_scheduler_kwargs {'num_cycles':2}", None),
        ("--beta 1.5", InputError),
        ("--fsdp full_shard", InputError),
    ],
)
def test_flags_of_hf_argument_parser_mean_what_ours_mean(arguments, settings):
    arguments = arguments.replace("'", '"').split()
    if settings is InputError:
        with pytest.raises(InputError):
            parse(*arguments)
    elif settings is None:
        try:
            ours = GKDConfig(**read_flags(arguments))
        except InputError as error:
            with pytest.raises(InputError, match=str(error).split(":")[0]):
                parse(*arguments)
        else:
            assert parse(*arguments) == ours
    else:
        assert parse(*arguments) == GKDConfig(**settings) == GKDConfig(**read_flags(arguments))


def test_a_parser_changes_nothing_in_the_configuration():
    HfArgumentParser(GKDConfig)  # it overwrites Field.type
    assert GKDConfig(data_seed=None, max_steps="4", eval_steps=None).max_steps == 4
    with pytest.raises(InputError, match="'hub_token'"):
        GKDConfig(hub_token=4)


def test_every_field_of_trl_is_a_flag_and_has_its_default_or_the_seed_s():
    differing = {
        # None and False are what none, auto, {} and no stand for
        *("report_to", "pad_to_multiple_of", "lr_scheduler_kwargs"),
        "include_num_input_tokens_seen",
        # the seed's default
        "trackio_space_id",
    }
    flags = {field.name for field in dataclasses.fields(GKDConfig)}
    for name, default in TRL["GKDConfig"].items():
        assert name in flags
        assert (OPTIONS[name].default == default) is (name not in differing), name


@pytest.mark.parametrize("other", ["ScriptArguments", "ModelConfig"])
def test_every_field_of_trl_s_other_classes_is_an_argument_but_no_flag_of_a_parser(other):
    flags = {field.name for field in dataclasses.fields(GKDConfig)}
    for name, default in TRL[other].items():
        assert name not in flags
        ours = default if OPTIONS[name].default is not None else None
        assert getattr(GKDConfig(**{name: ours}), name) == ours
        assert name in read_flags([f"--{name}", "x"])  # of `python -m gkd_ds.train`, it is one


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2)])
def test_a_script_s_classes_share_a_parser_with_it(order):
    classes = (stand_in("ScriptArguments"), GKDConfig, stand_in("ModelConfig"))
    parser = HfArgumentParser([classes[index] for index in order])
    arguments = "--dataset_name d --model_name_or_path m --lora_r 4 --learning_rate 1e-3".split()
    parsed = dict(zip(order, parser.parse_args_into_dataclasses(arguments)))
    assert parsed[0].dataset_name == "d" and parsed[2].model_name_or_path == "m"
    assert parsed[1] == GKDConfig(learning_rate=1e-3)


def test_trl_parser_reads_flags_and_its_yaml_file(tmp_path):
    trl = pytest.importorskip("trl")
    file = tmp_path / "run.yaml"
    file.write_text("lmbda: 0.25\ndataset_name: d\nlora_r: 4\nmax_length: null\n")
    parser = trl.TrlParser((trl.ScriptArguments, GKDConfig, trl.ModelConfig))
    script, config, model = parser.parse_args_and_config(
        ["--config", str(file), "--model_name_or_path", "m", "--rollout_engine", "gather"]
    )
    assert (script.dataset_name, model.model_name_or_path, model.lora_r) == ("d", "m", 4)
    assert config == GKDConfig(lmbda=0.25, max_length=None, rollout_engine="gather")


# ---- Subclasses and copies, as scripts make them ----


@dataclasses.dataclass
class Extended(GKDConfig):
    """A script's own configuration, written as TRL's are."""

    learning_rate: float = 1e-4
    notes: list[str] | None = None
    weights: dict[str, float] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        super().__post_init__()
        self.notes = [*(self.notes or []), "seen"]


def test_a_subclass_adds_fields_and_its_own_post_init():
    config = Extended("runs/a", model_name_or_path="m", notes=["one"], weights={"a": 0.5})
    assert (config.model_name_or_path, config.learning_rate) == ("m", 1e-4)
    assert config.notes == ["one", "seen"] and config.to_dict()["weights"] == {"a": 0.5}
    with pytest.raises(InputError, match="'beta'"):
        Extended(beta=2)


def test_a_subclass_has_flags_for_its_fields():
    (config,) = HfArgumentParser(Extended).parse_args_into_dataclasses(["--notes", "a", "b"])
    assert config.notes == ["a", "b", "seen"] and config.learning_rate == 1e-4


def test_a_copy_keeps_every_value():
    config = GKDConfig(model_name_or_path="m", dataset_name="d", lmbda=1.0, dtype="float32")
    copy = dataclasses.replace(config, beta=0.25)
    assert copy.to_dict() == {**config.to_dict(), "beta": 0.25}


def test_names_of_one_field_are_one_value():
    assert GKDConfig(activation_checkpointing=False).gradient_checkpointing is False
    assert GKDConfig(gradient_checkpointing=False).activation_checkpointing is False
    assert GKDConfig(torch_dtype="bfloat16").dtype == "bfloat16"
    config = GKDConfig(activation_checkpointing=True)
    config.gradient_checkpointing = False
    config.validate()
    assert config.activation_checkpointing is config.gradient_checkpointing is False

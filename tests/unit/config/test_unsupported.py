"""The fields of TRL's that are accepted at their defaults only."""

import dataclasses
import json
from pathlib import Path

import pytest

from gkd_ds.config.config import GKDConfig
from gkd_ds.config.unsupported import REASONS, TABLE
from gkd_ds.runtime.errors import InputError
from tests.refusals import assert_one_sentence

SEED = json.loads(Path(__file__).with_name("seed_api.json").read_text())["GKDConfig"]


def test_every_row_is_a_field_of_the_seed_under_a_name_of_its_own():
    names = [name for name, *_ in TABLE]
    assert len(names) == len(set(names))
    assert set(names) <= {field["name"] for field in SEED}


def test_a_token_among_them_is_written_nowhere():
    (token,) = [f for f in dataclasses.fields(GKDConfig) if f.name == "push_to_hub_token"]
    assert token.metadata["secret"] and "push_to_hub_token" not in GKDConfig().to_dict()


def test_they_stand_behind_what_acts():
    config = GKDConfig()
    assert [name in REASONS for name in config.to_dict()] == sorted(
        name in REASONS for name in config.to_dict()
    )
    assert "packing" not in repr(config)


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

"""TRL's fields on which nothing acts: which values are taken, and the sentence that refuses others."""

import typing

import pytest

from gkd_ds.config.config import GKDConfig
from gkd_ds.config.fields import OPTIONS
from gkd_ds.config.inactive_fields import ALREADY, ANY, FIXED, RETIRED, TABLE
from gkd_ds.runtime.errors import InputError
from tests.refusals import assert_one_sentence

EXAMPLES = {
    bool: [True, False],
    int: [7, 1],
    float: [0.5],
    str: ["other"],
    dict: [{"other": 1}],
}
ids = {"ids": lambda row: row.name}


def values(row) -> list:
    """Values of the field's type, its default not among them."""
    kinds = typing.get_args(OPTIONS[row.name].kind) or (OPTIONS[row.name].kind,)
    found = []
    for kind in kinds:
        if typing.get_origin(kind) is list:
            found.append(["other"])
        elif kind in EXAMPLES:
            found.extend(EXAMPLES[kind])
        elif typing.get_origin(kind) is typing.Literal:
            found.extend(typing.get_args(kind))
        elif isinstance(kind, str):  # a choice of a Literal that stands alone
            found.append(kind)
    return [value for value in found if value != row.default]


@pytest.mark.parametrize("row", TABLE, **ids)
def test_the_default_is_accepted_and_kept(row):
    default = [] if row.default is list else row.default
    assert getattr(GKDConfig(**{row.name: default}), row.name) == default


@pytest.mark.parametrize("row", [row for row in TABLE if row.accepts is ANY], **ids)
def test_where_everything_is_so_already_every_value_is_accepted(row):
    assert row.kind == ALREADY
    for value in values(row):
        assert getattr(GKDConfig(**{row.name: value}), row.name) == value


@pytest.mark.parametrize(
    "row", [row for row in TABLE if row.accepts is not ANY and row.accepts != ()], **ids
)
def test_values_that_ask_for_what_is_done_are_accepted(row):
    accepted = row.accepts
    if isinstance(accepted, dict):
        accepted = [{key: value} for key, values in accepted.items() for value in values]
    for value in accepted:
        assert getattr(GKDConfig(**{row.name: value}), row.name) == value


@pytest.mark.parametrize("row", [row for row in TABLE if row.accepts is not ANY], **ids)
def test_other_values_are_refused_by_name_with_the_reason_and_what_to_do(row):
    refused = [value for value in values(row) if not row.is_accepted(value)]
    assert refused
    for value in refused:
        with pytest.raises(InputError) as caught:
            GKDConfig(**{row.name: value})
        assert_one_sentence(str(caught.value), f"'{row.name}' is not supported by gkd_ds")
        assert row.reason in str(caught.value)
    told = r"remove|use |set |rename|shorten|make|put|raise|train|convert"
    assert any(word in row.reason for word in told.replace(" ", "").split("|")), row.reason


@pytest.mark.parametrize("row", [row for row in TABLE if row.kind == RETIRED], **ids)
def test_a_retired_field_names_a_successor_that_exists(row):
    if "use " in row.reason:
        successor = row.reason.split("use ")[1].split(",")[0].split(":")[0]
        assert successor in OPTIONS


def test_a_refusal_of_a_token_does_not_show_it():
    with pytest.raises(InputError) as caught:
        GKDConfig(push_to_hub_token="hf_secret")
    assert "secret" not in str(caught.value)
    assert "push_to_hub_token" not in GKDConfig().to_dict()


def test_what_acts_comes_first_when_it_is_written_down():
    inactive = {row.name for row in TABLE}
    places = [name in inactive for name in GKDConfig().to_dict()]
    assert places == sorted(places) and "packing" not in repr(GKDConfig())


def test_kinds():
    assert {row.kind for row in TABLE} == {ALREADY, FIXED, RETIRED}
    assert len({row.name for row in TABLE}) == len(TABLE)

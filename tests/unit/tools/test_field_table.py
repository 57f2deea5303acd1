"""gkd_ds/FIELDS.md says what the code does, about every field of the seed's API and of TRL's."""

import json
import re

from gkd_ds.config.fields import OPTIONS
from tests import ROOT
from tools.field_table import ALREADY, APIS, WORKS, answer_of, table

SEED = json.loads((APIS / "seed_api.json").read_text())["GKDConfig"]
TRL = json.loads((APIS / "trl_api.json").read_text())
PAGE = (ROOT / "gkd_ds" / "FIELDS.md").read_text()


def test_the_page_is_what_the_command_on_it_prints():
    command = re.search(r"`python (tools/\S+) > (\S+)`", PAGE)
    assert command[1] == "tools/field_table.py" and command[2] == "gkd_ds/FIELDS.md"
    assert table() == PAGE, "run the command"


def test_every_field_is_there_once():
    told = re.findall(r"^\| `(\w+)` \|", PAGE, re.MULTILINE)
    assert sorted(told) == sorted(OPTIONS)
    trl = {name for names in TRL.values() if isinstance(names, dict) for name in names}
    assert {field["name"] for field in SEED} | trl <= set(told)


def test_most_of_the_seed_s_fields_work_or_are_already_so():
    answers = [answer_of(field["name"]) for field in SEED]
    assert len(SEED) == 157
    assert answers.count(WORKS) + answers.count(ALREADY) >= 115

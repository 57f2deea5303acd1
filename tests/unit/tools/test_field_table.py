"""gkd_ds/FIELDS.md says what the code does."""

from __future__ import annotations

import json

from tests import ROOT
from tools.field_table import ALREADY, APIS, WORKS, answer_of, table


def test_the_page_is_what_the_code_makes():
    """python tools/field_table.py > gkd_ds/FIELDS.md"""
    assert (ROOT / "gkd_ds/FIELDS.md").read_text(encoding="utf-8") == table()


def test_most_of_trl_s_fields_work_or_are_already_so():
    seed = json.loads((APIS / "seed_api.json").read_text())["GKDConfig"]
    answers = [answer_of(field["name"]) for field in seed]
    assert len(answers) == 157 and answers.count(WORKS) + answers.count(ALREADY) >= 115

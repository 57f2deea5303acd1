"""Causal language models of transformers, tiny: each gives the dense float64 model's loss,
gradient norm and greedy tokens, or is refused at the start. `gkd_ds/ARCHITECTURES.md` says which.
"""

from __future__ import annotations

import pytest

from tests.architectures import SUITE
from tests.dist import architecture_outcomes
from tests.dist.architecture_outcomes import Outcomes
from tests.dist.rank_server import Server

REGENERATE = "PYTHONPATH=. python -m tests.dist.architecture_outcomes"


@pytest.fixture(scope="module")
def outcomes(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    return architecture_outcomes.find_out(server, tmp_path_factory.mktemp("architectures"))


@pytest.mark.parametrize("name", SUITE)
def test_an_architecture_is_right_or_refused(outcomes: Outcomes, name: str) -> None:
    wrong = {form: outcome for form, outcome in outcomes[name].items() if not outcome.is_right}
    assert not wrong, wrong


def test_the_list_of_architectures_is_up_to_date(outcomes: Outcomes) -> None:
    found = {
        name: tuple(outcome.kind for outcome in forms.values()) for name, forms in outcomes.items()
    }
    assert architecture_outcomes.listed() == found, f"run `{REGENERATE}`"

"""The hybrid engine is refused where it writes other tokens than the plain model."""

import pytest

from gkd_ds.records import Completions
from gkd_ds.rollout import hybrid
from gkd_ds.runtime.errors import InputError


def written(*tokens: int) -> Completions:
    return Completions([list(tokens)], [False], 0, 0)


def test_other_tokens_are_refused():
    with pytest.raises(
        InputError, match=r"writes other tokens than without \(\[5, 6, 8\] instead of \[5, 6, 7\]\)"
    ):
        hybrid.check(written(5, 6, 8), written(5, 6, 7))


def test_the_same_tokens_are_accepted():
    hybrid.check(written(5, 6, 7), written(5, 6, 7))

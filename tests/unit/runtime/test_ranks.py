"""run_on_all_ranks: every rank gets every result, or the same error. The other ranks are played."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from gkd_ds.runtime import ranks
from gkd_ds.runtime.errors import InputError


def fail(error: Exception) -> Callable[[], Any]:
    def work() -> Any:
        raise error

    return work


def test_results_come_in_the_order_of_the_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    assert ranks.run_on_all_ranks(lambda: 4) == [4]
    monkeypatch.setattr(ranks, "gather", lambda mine: [mine, (5, None)])
    assert ranks.run_on_all_ranks(lambda: 4) == [4, 5]


def test_the_error_is_the_one_that_failure_makes_and_knows_its_cause() -> None:
    cause = OSError(28, "No space left on device")
    with pytest.raises(InputError, match="rank 0: .*No space") as caught:
        ranks.run_on_all_ranks(fail(cause), lambda rank, error: InputError(f"rank {rank}: {error}"))
    assert caught.value.__cause__ is cause


def test_without_failure_it_is_the_error_itself() -> None:
    error = InputError("wrong")
    with pytest.raises(InputError) as caught:
        ranks.run_on_all_ranks(fail(error))
    assert caught.value is error and error.__cause__ is None


def test_a_rank_that_succeeded_raises_what_another_met(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "gather", lambda mine: [mine, (None, InputError("elsewhere"))])
    with pytest.raises(InputError, match="elsewhere"):
        ranks.run_on_all_ranks(lambda: 4)


def test_what_is_not_to_be_caught_passes() -> None:
    with pytest.raises(ZeroDivisionError):
        ranks.run_on_all_ranks(fail(ZeroDivisionError()), catch=OSError)

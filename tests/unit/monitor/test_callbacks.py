"""Callbacks that the configuration asks for."""

import sys
import types

import pytest
from transformers import EarlyStoppingCallback, TrainerCallback, TrainerControl, TrainerState

from gkd_ds.config.checks import INTEGRATIONS
from gkd_ds.config.config import GKDConfig
from gkd_ds.monitor.callbacks import callbacks_of, may_add_metrics
from gkd_ds.monitor.tracker import SINKS, reported_to
from gkd_ds.runtime.errors import InputError
from tests.refusals import assert_one_sentence

pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
INTEGRATION = "transformers.integrations.integration_utils"


def test_the_names_are_transformers():
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

    assert sorted(INTEGRATIONS) == sorted(INTEGRATION_TO_CALLBACK)


def test_nothing_is_asked_for_by_default():
    assert callbacks_of(GKDConfig()) == [] and reported_to(GKDConfig()) == []


def test_all_are_those_that_are_installed(monkeypatch):
    monkeypatch.setattr(f"{INTEGRATION}.is_trackio_available", lambda: True)
    names = reported_to(GKDConfig(report_to="all"))
    assert "wandb" in names and "trackio" in names and "clearml" not in names


@pytest.mark.parametrize("name", [name for name in INTEGRATIONS if name != "wandb"])
def test_what_is_not_installed_is_refused_by_name(name):
    try:
        callbacks_of(GKDConfig(report_to=["wandb", name]))
    except InputError as error:
        assert_one_sentence(str(error), "'report_to'", name, "install it")
    else:
        pytest.skip(f"{name} is installed")


def test_an_integration_gets_its_fields(monkeypatch):
    """Trackio's callback, with a package that only keeps what it is told."""

    class Config(dict):
        def update(self, values, **_):
            super().update(values)

    told = types.SimpleNamespace(init=None, logs=[], config=Config())
    trackio = types.SimpleNamespace(
        init=lambda **settings: setattr(told, "init", settings),
        log=told.logs.append,
        finish=lambda: None,
        config=told.config,
        context_vars=types.SimpleNamespace(
            current_space_id=types.SimpleNamespace(get=lambda: None)
        ),
    )
    monkeypatch.setattr(f"{INTEGRATION}.is_trackio_available", lambda: True)
    monkeypatch.setitem(sys.modules, "trackio", trackio)
    config = GKDConfig(
        report_to=["trackio", "wandb"],
        project="p",
        run_name="r",
        trackio_space_id="me/space",
        trackio_bucket_id="me/bucket",
        hub_private_repo=True,
    )
    (callback,) = callbacks_of(config)
    assert isinstance(callback, TrainerCallback)
    state, control = TrainerState(is_world_process_zero=True), TrainerControl()
    callback.setup(config, state, types.SimpleNamespace(config=None, num_parameters=lambda: 7))
    assert told.init == {
        "project": "p",
        "name": "r",
        "space_id": "me/space",
        "resume": "allow",
        "private": True,
        "bucket_id": "me/bucket",
    }
    assert told.config["lmbda"] == 0.5
    callback.on_log(config, state, control, logs={"loss": 0.5})
    assert told.logs


def test_sinks_of_our_own_are_no_callbacks(monkeypatch):
    monkeypatch.setattr("gkd_ds.monitor.callbacks.is_tensorboard_available", lambda: True)
    assert callbacks_of(GKDConfig(report_to=list(SINKS))) == []


def test_which_callbacks_may_add_a_metric():
    class Adds(TrainerCallback):
        def on_evaluate(self, args, state, control, metrics, **kwargs):
            metrics["eval_mine"] = 1.0

    class Patient(EarlyStoppingCallback):
        pass

    assert may_add_metrics([Adds()]) and may_add_metrics([TrainerCallback(), Adds])
    assert not may_add_metrics([TrainerCallback, EarlyStoppingCallback(), Patient()])

"""Nothing is ignored: whatever transformers' Trainer or TRL's GKDTrainer have is called when a subclass
overrides it, or refused when the trainer is made.
"""

from __future__ import annotations

import inspect

import pytest
from transformers import Trainer

from gkd_ds import GKDTrainer
from gkd_ds.overrides import INSTEAD, ONLY_READ
from gkd_ds.runtime.errors import InputError
from tests import ROOT
from tests.scripts.subclasses import CALLED_BY_A_RUN

# Of trl 1.16.0, which is no dependency of the tests: GKDTrainer, SFTTrainer and their base.
TRL = """_tag_names _name _paper _template_file generalized_jsd_loss compute_loss
generate_on_policy_outputs training_step _prepare_dataset _set_signature_columns_if_needed
_reject_skip_prepare_without_labels evaluate prediction_step log _save_checkpoint
loss_is_scaled_for_ga _send_telemetry create_model_card""".split()
TRANSFORMERS = [
    name
    for name, value in vars(Trainer).items()
    if name != "__init__"
    and (inspect.isfunction(value) or isinstance(value, (staticmethod, property)))
]
# The caller's own calls reach an override by themselves.
CALLED_BY_CALLERS = """train evaluate predict save_model push_to_hub create_model_card add_callback
pop_callback remove_callback log_metrics metrics_format save_metrics save_state get_learning_rates
get_num_trainable_parameters get_optimizer_group is_local_process_zero is_world_process_zero
""".split()


def subclass(name: str, value=None) -> type:
    return type("Mine", (GKDTrainer,), {name: value or (lambda self, *args, **kwargs: None)})


def refusal(trainer_class: type) -> str:
    """What the constructor says; it looks at the class first, and needs no models to refuse it."""
    with pytest.raises(InputError) as caught:
        trainer_class()
    return str(caught.value)


@pytest.mark.parametrize("name", sorted({*TRANSFORMERS, *TRL}))
def test_an_override_is_called_or_refused(name: str) -> None:
    said = refusal(subclass(name))
    if name in {*CALLED_BY_A_RUN, *CALLED_BY_CALLERS}:
        assert name in dir(GKDTrainer) and said.startswith("no student is given")
    else:
        assert said.startswith(f"Mine.{name} would never be called by gkd_ds, where ")
        assert said.endswith(".") and "\n" not in said and ". " not in said


def test_the_pinned_transformers_is_known_by_name() -> None:
    """The general sentence is for versions to come."""
    ours = {*INSTEAD, *ONLY_READ, *CALLED_BY_A_RUN, *CALLED_BY_CALLERS}
    assert {*TRANSFORMERS, *TRL} <= ours


def test_a_method_of_a_later_transformers_is_refused(monkeypatch) -> None:
    monkeypatch.setattr(Trainer, "dream", lambda self: None, raising=False)
    assert "Mine.dream would never be called" in refusal(subclass("dream"))


def test_what_is_the_subclass_s_own_is_left_alone() -> None:
    own = {"my_loss": lambda self: None, "momentum": 0.9, "_count": 0}
    assert refusal(type("Mine", (GKDTrainer,), own)).startswith("no student is given")


@pytest.mark.parametrize("name", ["run", "engines", "student", "tracker", "_log", "_window"])
def test_a_name_of_ours_is_no_name_for_the_subclass_s_own(name: str) -> None:
    """It would take the place of something that neither transformers nor TRL has."""
    said = refusal(subclass(name))
    assert said.startswith(f"Mine.{name} would take the place of") and "another name" in said


def test_what_trl_has_may_be_defined_anew() -> None:
    for name in ("generalized_jsd_loss", "lmbda", "generation_config", "create_model_card"):
        assert refusal(subclass(name)).startswith("no student is given")


@pytest.mark.parametrize("name", ["inputs", "models", "windows", "session", "student", "progress"])
def test_so_is_an_attribute(name: str) -> None:
    trainer = GKDTrainer.__new__(GKDTrainer)
    with pytest.raises(InputError, match=f"GKDTrainer.{name} would take the place of"):
        setattr(trainer, name, [])
    trainer.my_inputs = []


def test_an_override_in_a_mixin_or_a_parent_is_seen() -> None:
    class Mixin:
        def training_step(self, model, inputs):
            return None

    assert "Mine.training_step" in refusal(type("Mine", (Mixin, GKDTrainer), {}))
    assert "Mine.compute_loss" in refusal(type("Mine", (subclass("compute_loss"),), {}))


def test_an_override_put_into_our_own_class_is_seen(monkeypatch) -> None:
    monkeypatch.setattr(GKDTrainer, "compute_loss", lambda self: None, raising=False)
    assert "GKDTrainer.compute_loss would never be called" in refusal(GKDTrainer)


@pytest.mark.parametrize("name", sorted({*INSTEAD, *ONLY_READ}))
def test_an_assignment_is_refused(name: str) -> None:
    trainer = GKDTrainer.__new__(GKDTrainer)
    with pytest.raises(InputError, match=f"GKDTrainer.{name} would never be called"):
        setattr(trainer, name, lambda: None)


@pytest.mark.parametrize("name", sorted(INSTEAD))
def test_what_is_not_there_says_where_it_is(name: str) -> None:
    trainer = GKDTrainer.__new__(GKDTrainer)
    with pytest.raises(AttributeError, match=f"trainer.{name} does not exist in gkd_ds, where "):
        getattr(trainer, name)


def test_the_counted_reasons_are_counted() -> None:
    """gkd_ds/MIGRATING.md says how many of transformers' functions a subclass would use."""
    as_they_are = set(
        """get_learning_rates get_optimizer_group log_metrics metrics_format save_metrics save_state
        add_callback pop_callback remove_callback is_local_process_zero is_world_process_zero
        num_examples get_optimizer_cls_and_kwargs _load_callback_state""".split()
    )
    functions = [name for name, value in vars(Trainer).items() if inspect.isroutine(value)]
    overridden = {name for name in functions if name in dir(GKDTrainer)} - as_they_are
    dead = set(functions) - as_they_are - overridden
    text = (ROOT / "gkd_ds" / "MIGRATING.md").read_text()
    assert f"Of the {len(functions)} functions" in text
    assert f"- {len(as_they_are)} would be right as they are" in text
    assert f"- {len(overridden)} would be overridden" in text
    assert f"- {len(dead)} would be dead or wrong" in text


def test_another_attribute_is_unknown_as_usual() -> None:
    with pytest.raises(AttributeError, match="no attribute 'tokeniser'"):
        _ = GKDTrainer.__new__(GKDTrainer).tokeniser

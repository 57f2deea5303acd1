"""Liger's kernels, by a package of its name that only keeps what it is told."""

import sys
import types

import pytest

from gkd_ds.config.config import GKDConfig
from gkd_ds.engine import liger
from gkd_ds.runtime.errors import InputError
from tests.refusals import assert_one_sentence, refusal


@pytest.fixture
def applied(monkeypatch):
    """What `_apply_liger_kernel_to_instance` is called with."""
    calls = []

    def to_llama(rope=True, rms_norm=True, cross_entropy=False, fused_linear_cross_entropy=True, model=None):  # fmt: skip
        """As Liger's for Llama."""

    patch = types.SimpleNamespace(MODEL_TYPE_TO_APPLY_LIGER_FN={"llama": to_llama})
    transformers = types.SimpleNamespace(
        monkey_patch=patch, _apply_liger_kernel_to_instance=lambda **given: calls.append(given)
    )
    monkeypatch.setitem(
        sys.modules, "liger_kernel", types.SimpleNamespace(transformers=transformers)
    )
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", transformers)
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers.monkey_patch", patch)
    available = "transformers.integrations.liger.is_liger_kernel_available"
    monkeypatch.setattr(available, lambda: True)
    return calls


LOSSES_OFF = {"cross_entropy": False, "fused_linear_cross_entropy": False}


@pytest.mark.parametrize("chosen", [None, {}, {"rope": False}])
def test_layers_get_its_kernels_and_the_loss_stays_ours(chosen, model, applied):
    liger.use(model, chosen)
    assert applied == [{"model": model, **(chosen or {}), **LOSSES_OFF}]


def test_what_liger_would_pass_over_is_refused(model, applied, monkeypatch):
    with pytest.raises(InputError) as caught:
        liger.use(model, {"rms_nrom": True})
    assert_one_sentence(str(caught.value), "'rms_nrom'", "rms_norm, rope")
    monkeypatch.setattr(model.config, "model_type", "mamba")
    with pytest.raises(InputError) as caught:
        liger.use(model, None)
    assert_one_sentence(str(caught.value), "no kernels for mamba")
    assert not applied


def test_without_the_package_it_is_refused_by_its_name(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "liger-kernel" in refusal(use_liger_kernel=True)


@pytest.mark.parametrize(
    ("settings", "part"),
    [
        ({"liger_kernel_config": {"rope": True}}, "use_liger_kernel is false"),
        ({"use_liger_kernel": True, "liger_kernel_config": {"rope": "on"}}, "true or false"),
        ({"use_liger_kernel": True, "liger_kernel_config": {"cross_entropy": True}}, "is ours"),
    ],
)
def test_a_contradiction_is_refused(settings, part):
    with pytest.raises(InputError) as caught:
        GKDConfig(**settings)
    assert_one_sentence(str(caught.value), "'liger_kernel_config'", part)

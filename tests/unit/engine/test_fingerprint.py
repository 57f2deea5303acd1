"""Fingerprints: parts add up, and weights that are not the same have other ones."""

from __future__ import annotations

import pytest
import torch

from gkd_ds.engine.fingerprint import fingerprint, is_same


def some_weight(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 0.02


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("ranks", [2, 3, 7])
def test_those_of_the_parts_add_up_to_that_of_the_whole(dtype, ranks):
    weight = some_weight(500, 1000).to(dtype)
    size = -(-weight.numel() // ranks)
    parts = weight.flatten().split(size)
    summed = sum(fingerprint(part, number * size) for number, part in enumerate(parts))
    assert is_same(summed, fingerprint(weight))
    assert fingerprint(weight)[0] == pytest.approx(weight.double().square().sum().item(), rel=1e-12)


def exchanged(weight: torch.Tensor, a: int, b: int) -> torch.Tensor:
    order = list(range(len(weight)))
    order[a], order[b] = order[b], order[a]
    return weight[order]


def one_other(weight: torch.Tensor) -> torch.Tensor:
    other = weight.clone()
    other[3, 5] = -other[3, 5]
    return other


@pytest.mark.parametrize("change", [
    one_other,
    lambda weight: -weight,
    lambda weight: weight.T.contiguous(),
    lambda weight: exchanged(weight, 0, 1),
    lambda weight: exchanged(weight, 3, 400),
    lambda weight: weight.roll(1),
    lambda weight: weight.bfloat16(),
    lambda weight: weight * 1.00001,
    lambda weight: some_weight(512, 512, seed=1),
    torch.zeros_like,
    lambda weight: weight / 0,
])  # fmt: skip
def test_another_weight_has_another_one(change):
    weight = some_weight(512, 512)
    assert not is_same(fingerprint(change(weight)), fingerprint(weight))


@pytest.mark.parametrize("size", [2**17, 2**18, 3 * 2**17])
def test_so_have_experts_that_changed_places(size):
    experts = some_weight(4, size)
    assert not is_same(fingerprint(exchanged(experts, 0, 2)), fingerprint(experts))


def test_weights_that_are_not_finite_are_no_difference():
    weight = some_weight(8, 8)
    weight[0, 0] = torch.nan
    assert is_same(fingerprint(weight), fingerprint(weight))
    assert not is_same(fingerprint(some_weight(8, 8)), fingerprint(weight))

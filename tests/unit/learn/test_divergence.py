"""The divergence against definitions that are written another way: with F.kl_div, with
probabilities, with autograd.

Everything is compared with float64. Shapes: N tokens, V shared vocabulary, D student width, E
teacher width.
"""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from deepspeed.runtime.rollout import opsd
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gkd_ds.learn.divergence import divergence_and_gradient_, generalized_jsd
from gkd_ds.learn.trl import generalized_jsd_loss
from tests.unit.learn.formulas import BETAS, kl_div_definition

# -- the formula ------------------------------------------------------------------------------


def logits(*shape: int, seed: int = 0, scale: float = 3.0) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return tuple(scale * torch.randn(*shape, generator=draw, dtype=torch.float64) for _ in range(2))


def labels(batch: int, length: int, seed: int = 0) -> Tensor:
    """Some positions are left out with -100; the first sequence is left out as a whole."""
    draw = torch.Generator().manual_seed(seed)
    keep = torch.rand(batch, length, generator=draw) < 0.6
    keep[0] = False
    return torch.where(keep, 7, -100)


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("temperature", [1.0, 0.7, 2.5])
def test_dense_divergence_is_trl_s_definition(beta: float, temperature: float) -> None:
    student, teacher = logits(3, 5, 41)
    expected = kl_div_definition(student, teacher, beta, temperature)
    torch.testing.assert_close(
        generalized_jsd(student, teacher, beta, temperature), expected, rtol=1e-12, atol=1e-15
    )


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("masked", [False, True])
def test_every_reduction_of_trl(beta: float, masked: bool) -> None:
    student, teacher = logits(3, 5, 17)
    given = labels(3, 5) if masked else None
    kept = kl_div_definition(student, teacher, beta, 1.3)
    kept = kept[given != -100] if masked else kept
    expected = {
        "batchmean": kept.sum()
        / kept.shape[0],  # per labelled position, or per sequence without labels
        "sum": kept.sum(),
        "mean": kept.mean(),
        "none": kept,
    }
    for reduction, value in expected.items():
        got = generalized_jsd_loss(
            student, teacher, given, beta=beta, temperature=1.3, reduction=reduction
        )
        torch.testing.assert_close(got, value, rtol=1e-12, atol=1e-14)
        for count in (23, torch.tensor(23)):
            got = generalized_jsd_loss(
                student, teacher, given, beta, 1.3, reduction, num_items_in_batch=count
            )
            torch.testing.assert_close(got, kept.sum() / 23, rtol=1e-12, atol=1e-14)


def test_no_labelled_position_gives_zero() -> None:
    student, teacher = logits(2, 3, 11)
    assert generalized_jsd_loss(student, teacher, torch.full((2, 3), -100)) == 0


@pytest.mark.parametrize("beta", BETAS)
def test_deepspeed_s_own_formula_agrees(beta: float) -> None:
    student, teacher = logits(3, 5, 29)
    mask = labels(3, 5) != -100
    theirs = opsd.generalized_jsd_loss(student, teacher, mask, beta=beta, temperature=0.8)
    ours = generalized_jsd_loss(student, teacher, labels(3, 5), beta=beta, temperature=0.8)
    torch.testing.assert_close(ours, theirs.loss, rtol=1e-12, atol=0)


def test_the_mixture_tends_to_zero_at_both_ends_and_the_ends_are_whole_divergences() -> None:
    student, teacher = logits(4, 31)
    forward, reverse = (generalized_jsd(student, teacher, beta).sum() for beta in (0.0, 1.0))
    near_0, near_1 = (
        generalized_jsd(student, teacher, 1e-7).sum(),
        generalized_jsd(student, teacher, 1 - 1e-7).sum(),
    )
    assert near_0 / 1e-7 == pytest.approx(float(forward), rel=1e-3)
    assert near_1 / 1e-7 == pytest.approx(float(reverse), rel=1e-3)
    assert forward > 1 and reverse > 1


# -- the closed form --------------------------------------------------------------------------


def float64_gradient(
    student: Tensor, teacher: Tensor, beta: float, temperature: float
) -> tuple[Tensor, Tensor]:
    student = student.double().requires_grad_()
    loss_n = kl_div_definition(student, teacher.double(), beta, temperature).sum(-1)
    (gradient,) = torch.autograd.grad(loss_n.sum(), student)
    return loss_n.detach(), gradient


@settings(deadline=None, max_examples=150)
@given(
    beta=st.one_of(st.sampled_from(BETAS), st.floats(1e-4, 1 - 1e-4)),
    temperature=st.floats(0.3, 4.0),
    scale=st.floats(0.01, 60.0),
    vocabulary=st.integers(2, 700),
    seed=st.integers(0, 2**31),
)
def test_closed_form_equals_float64_autograd(beta, temperature, scale, vocabulary, seed) -> None:
    student, teacher = (x.float() for x in logits(3, vocabulary, seed=seed, scale=scale))
    loss, gradient = float64_gradient(student, teacher, beta, temperature)
    got_loss, got_gradient, student_norm, teacher_norm, entropy = divergence_and_gradient_(
        student.clone(), teacher.clone(), beta, temperature
    )
    # fp32 resolves a logit of size s to s * 6e-8, and differences of logits are weighted with
    # probabilities: the error stays within a few of those.
    resolution = (
        8 * float(torch.maximum(student.abs().max(), teacher.abs().max())) / temperature * 1.2e-7
    )
    assert (got_gradient - gradient).abs().max() <= (3e-6 + resolution) * max(
        1.0, float(gradient.abs().max())
    )
    assert (got_loss - loss).abs().max() <= (3e-6 + resolution) * max(1.0, float(loss.abs().max()))
    log_q = F.log_softmax(student.double() / temperature, -1)
    torch.testing.assert_close(
        student.double() / temperature - student_norm[:, None], log_q, rtol=1e-5, atol=1e-4
    )
    torch.testing.assert_close(
        teacher_norm.double(), (teacher.double() / temperature).logsumexp(-1), rtol=1e-6, atol=1e-5
    )
    torch.testing.assert_close(
        entropy.double(), -(log_q.exp() * log_q).sum(-1), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("beta", BETAS)
def test_saturated_logits_keep_the_gradient(beta: float) -> None:
    """A student that has almost ruled out what the teacher wants: where the textbook form in fp32
    fails.
    """
    student, teacher = (x.float() for x in logits(16, 512, scale=1.0))
    student[:, 0], teacher[:, 1] = 80.0, 80.0
    loss, gradient = float64_gradient(student, teacher, beta, 1.0)
    got_loss, got, *_ = divergence_and_gradient_(student, teacher, beta, 1.0)
    assert (got - gradient).abs().max() <= 2e-5 * max(1.0, float(gradient.abs().max()))
    torch.testing.assert_close(got_loss.double(), loss, rtol=2e-6, atol=2e-6)


def probability_definition(q: Tensor, p: Tensor, beta: float) -> Tensor:
    """The divergence of two rows of probabilities, zeros allowed, float64."""
    kl = lambda x, y: torch.where(x > 0, x * (x.log() - y.log()), torch.zeros_like(x)).sum(-1)  # noqa: E731
    if beta == 0:
        return kl(p, q)
    if beta == 1:
        return kl(q, p)
    m = beta * p + (1 - beta) * q
    return beta * kl(p, m) + (1 - beta) * kl(q, m)


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("ruled_out", ["both", "teacher", "student"])
def test_ruled_out_tokens(beta: float, ruled_out: str) -> None:
    """Logits of -inf: a term whose weight is 0 counts nothing; gradients stay finite."""
    student, teacher = logits(6, 64, scale=2.0)
    if ruled_out in ("both", "student"):
        student[:, 5:20] = -math.inf
    if ruled_out in ("both", "teacher"):
        teacher[:, 5:20] = -math.inf
    expected = probability_definition(student.softmax(-1), teacher.softmax(-1), beta)
    dense = generalized_jsd(student, teacher, beta).sum(-1)
    loss, gradient, *_ = divergence_and_gradient_(student.float(), teacher.float(), beta, 1.0)
    assert gradient.isfinite().all()
    if expected.isfinite().all():
        torch.testing.assert_close(dense, expected, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(loss.double(), expected, rtol=3e-6, atol=3e-6)
    else:  # KL is infinite; ours is large, so that the run goes on
        assert (
            beta in (0.0, 1.0)
            and (loss > 100).all()
            and loss.isfinite().all()
            and dense.isfinite().all()
        )
    if ruled_out == "both":
        keep = [token for token in range(64) if not 5 <= token < 20]
        _, reduced = float64_gradient(student[:, keep], teacher[:, keep], beta, 1.0)
        torch.testing.assert_close(gradient[:, keep].double(), reduced, rtol=0, atol=3e-6)
        assert (gradient[:, 5:20] == 0).all()

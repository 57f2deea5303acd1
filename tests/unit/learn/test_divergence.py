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
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from gkd_ds.engine import accelerator
from gkd_ds.learn.divergence import (
    LossHead,
    LogitTransform,
    LossInputs,
    TeacherHead,
    chunk_rows,
    divergence_and_gradient_,
    generalized_jsd,
)
from gkd_ds.learn.trl import generalized_jsd_loss

BETAS = [0.0, 0.1, 0.5, 0.9, 1.0]
PLAIN = LogitTransform()


# -- the formula ------------------------------------------------------------------------------


def kl_div_definition(
    student_logits: Tensor, teacher_logits: Tensor, beta: float, temperature: float
) -> Tensor:
    """TRL's generalized_jsd_loss before masking and reduction, `[..., V]`."""
    log_q = F.log_softmax(student_logits / temperature, -1)
    log_p = F.log_softmax(teacher_logits / temperature, -1)
    if beta == 0:
        return F.kl_div(log_q, log_p, reduction="none", log_target=True)
    if beta == 1:
        return F.kl_div(log_p, log_q, reduction="none", log_target=True)
    weight = torch.tensor(beta, dtype=log_q.dtype)
    log_m = torch.logsumexp(
        torch.stack([log_q + torch.log1p(-weight), log_p + torch.log(weight)]), 0
    )
    to_teacher = F.kl_div(log_m, log_p, reduction="none", log_target=True)
    to_student = F.kl_div(log_m, log_q, reduction="none", log_target=True)
    return weight * to_teacher + (1 - weight) * to_student


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


# -- the chunked head -------------------------------------------------------------------------


class Case:
    """Random hidden states of both models and their heads, in fp32."""

    def __init__(
        self, N=50, V=96, D=24, E=40, student_rows=None, teacher_rows=None, bias=False, seed=0
    ):
        draw = torch.Generator().manual_seed(seed)
        random = lambda *shape: torch.randn(*shape, generator=draw)  # noqa: E731
        self.V = V
        self.layer = nn.Linear(D, student_rows or V, bias=bias)
        with torch.no_grad():
            for parameter in self.layer.parameters():
                parameter.copy_(random(*parameter.shape) * 0.6)
        self.hidden = random(N, D)
        self.teacher_hidden = random(N, E)
        self.teacher_weight = random(teacher_rows or V, E) * 0.5
        self.teacher_bias = random(teacher_rows or V) if bias else None
        self.tokens = torch.randint(0, V, (N,), generator=draw)

    def inputs(
        self, beta: float, temperature: float, chunk_bytes: int, transform: LogitTransform
    ) -> LossInputs:
        head = TeacherHead(self.teacher_weight, self.teacher_bias, transform)
        return LossInputs(
            self.teacher_hidden, self.tokens, head, self.V, beta, temperature, chunk_bytes
        )

    def reference(
        self, beta: float, temperature: float, transform: LogitTransform, upstream: float
    ):
        """float64 autograd through whole logits: loss, gradients, per-token values."""
        double = lambda x: None if x is None else x.detach().double()  # noqa: E731
        hidden, weight, bias = (
            double(self.hidden),
            double(self.layer.weight),
            double(self.layer.bias),
        )
        leaves = [x.requires_grad_() for x in (hidden, weight, bias) if x is not None]
        student = transformed(F.linear(hidden, weight, bias), transform)[:, : self.V]
        teacher = F.linear(
            double(self.teacher_hidden), double(self.teacher_weight), double(self.teacher_bias)
        )
        teacher = transformed(teacher, transform)[:, : self.V]
        loss_N = kl_div_definition(student, teacher, beta, temperature).sum(-1)
        gradients = torch.autograd.grad(upstream * loss_N.sum(), leaves)
        log_q, log_p = (F.log_softmax(x / temperature, -1) for x in (student, teacher))
        index = self.tokens[:, None]
        entropy = -(log_q.exp() * log_q).sum(-1)
        return (
            loss_N.sum(),
            gradients,
            [loss_N, log_q.gather(1, index)[:, 0], log_p.gather(1, index)[:, 0], entropy],
        )

    def check(
        self,
        beta=0.5,
        temperature=1.0,
        chunk_bytes=1 << 14,
        transform=PLAIN,
        upstream=1.0,
        floor=0.0,
    ) -> None:
        """`floor` (nats per token) is what the loss may be off by beside 1e-6 of itself."""
        head, hidden = LossHead(self.layer, transform), self.hidden.clone().requires_grad_()
        loss, *per_token = head(hidden, loss=self.inputs(beta, temperature, chunk_bytes, transform))
        (loss * upstream).backward()
        expected, gradients, expected_per_token = self.reference(
            beta, temperature, transform, upstream
        )
        assert abs(loss.item() - expected.item()) <= 1e-6 * abs(expected.item()) + floor * len(
            self.tokens
        )
        ours = [hidden.grad, *(p.grad for p in self.layer.parameters())]
        for got, gradient in zip(ours, gradients, strict=True):
            assert (got - gradient).abs().max() <= 1e-5 * gradient.abs().max()
        for got, value in zip(per_token, expected_per_token, strict=True):
            torch.testing.assert_close(got.double(), value.detach(), rtol=1e-5, atol=1e-5)
            assert not got.requires_grad


def transformed(x: Tensor, transform: LogitTransform) -> Tensor:
    x = x * transform.scale
    return x if transform.softcap is None else transform.softcap * torch.tanh(x / transform.softcap)


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_chunked_head_equals_float64_autograd(beta: float, temperature: float) -> None:
    Case(seed=int(10 * beta)).check(beta, temperature)


@pytest.mark.parametrize("chunk_bytes", [1, 16 * 2 * 96 * 4, 32 * 2 * 96 * 4, 1 << 30])
def test_chunk_size_does_not_matter(chunk_bytes: int) -> None:
    Case().check(chunk_bytes=chunk_bytes)


@pytest.mark.parametrize("N", [1, 15, 16, 17, 33])
def test_any_number_of_tokens(N: int) -> None:
    Case(N=N).check(chunk_bytes=1)


@pytest.mark.parametrize("student_rows, teacher_rows", [(96, 120), (120, 96), (128, 112)])
@pytest.mark.parametrize("bias", [False, True])
def test_padding_rows_of_either_head_are_left_out(
    student_rows: int, teacher_rows: int, bias: bool
) -> None:
    case = Case(student_rows=student_rows, teacher_rows=teacher_rows, bias=bias)
    case.check(beta=0.3)
    assert (case.layer.weight.grad[96:] == 0).all()


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize(
    "transform",
    [
        LogitTransform(scale=0.3),
        LogitTransform(softcap=2.0),
        LogitTransform(scale=1.7, softcap=4.0),
    ],
    ids=["scale", "softcap", "both"],
)
def test_scaled_and_soft_capped_logits(beta: float, transform: LogitTransform) -> None:
    # So small logits make nearly the same model of both, and fp32 cannot tell a token's divergence
    # closer than this.
    Case(bias=True, seed=3).check(beta, 1.4, transform=transform, floor=1e-7)


def test_an_upstream_gradient_reaches_every_gradient() -> None:
    Case(bias=True).check(upstream=0.037)
    Case(bias=True).check(upstream=-250.0)


def test_large_vocabulary_runs_in_several_tiles() -> None:
    """Above 2^20 entries a chunk is cut into cache-sized tiles; the last one is ragged."""
    Case(N=75, V=30_000, D=8, E=8).check(chunk_bytes=1 << 30)


def test_a_tied_weight_gets_the_gradients_of_both_uses() -> None:
    torch.manual_seed(0)
    case, ids = Case(), torch.randint(0, 96, (50,))
    embedding = nn.Embedding(96, 24)
    embedding.weight = case.layer.weight
    hidden = embedding(ids).tanh()
    LossHead(case.layer, PLAIN)(hidden, loss=case.inputs(0.5, 1.0, 1, PLAIN))[0].backward()

    weight = case.layer.weight.detach().double().requires_grad_()
    student = F.embedding(ids, weight).tanh() @ weight.T
    teacher = case.teacher_hidden.double() @ case.teacher_weight.double().T
    (expected,) = torch.autograd.grad(kl_div_definition(student, teacher, 0.5, 1.0).sum(), weight)
    assert (case.layer.weight.grad - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_no_token_gives_zero_loss_and_zero_gradients() -> None:
    case = Case(N=0, bias=True)
    hidden = case.hidden.clone().requires_grad_()
    loss, *per_token = LossHead(case.layer, PLAIN)(
        hidden, loss=case.inputs(0.5, 1.0, 1 << 20, PLAIN)
    )
    loss.backward()
    assert loss == 0 and hidden.grad.shape == (0, 24) and [x.shape for x in per_token] == [(0,)] * 4
    assert all(p.grad is not None and (p.grad == 0).all() for p in case.layer.parameters())


def test_a_second_backward_is_refused() -> None:
    case = Case()
    loss, *_ = LossHead(case.layer, PLAIN)(
        case.hidden.requires_grad_(), loss=case.inputs(0.5, 1.0, 1, PLAIN)
    )
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="once per forward"):
        loss.backward()


def test_no_gradient_is_computed_for_what_is_frozen() -> None:
    case = Case(bias=True)
    case.layer.requires_grad_(False)
    hidden = case.hidden.clone().requires_grad_()
    LossHead(case.layer, PLAIN)(hidden, loss=case.inputs(0.5, 1.0, 1, PLAIN))[0].backward()
    _, (expected, *_), _ = case.reference(0.5, 1.0, PLAIN, 1.0)
    assert (hidden.grad - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert case.layer.weight.grad is None and case.layer.bias.grad is None


def test_without_loss_it_is_the_layer_it_replaces() -> None:
    case = Case(bias=True)
    head = LossHead(case.layer, LogitTransform(scale=2.0))
    assert torch.equal(head(case.hidden), case.layer(case.hidden))
    assert head.weight is case.layer.weight


def test_bf16_weights_stay_close() -> None:
    case = Case(N=200, V=500)
    expected, gradients, _ = case.reference(0.5, 1.0, PLAIN, 1.0)
    for name in ("hidden", "teacher_hidden", "teacher_weight"):
        setattr(case, name, getattr(case, name).bfloat16())
    case.layer.bfloat16()
    hidden = case.hidden.requires_grad_()
    loss, *_ = LossHead(case.layer, PLAIN)(hidden, loss=case.inputs(0.5, 1.0, 1 << 16, PLAIN))
    loss.backward()
    assert float(loss) == pytest.approx(float(expected), rel=0.01)
    for got, gradient in zip([hidden.grad, case.layer.weight.grad], gradients):
        assert got.dtype == torch.bfloat16
        assert (got - gradient).norm() <= 0.03 * gradient.norm()


class LargestTensor(TorchDispatchMode):
    """Notes the number of elements of the largest tensor that any operation returns."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else (result,):
            if isinstance(value, Tensor):
                self.numel = max(self.numel, value.numel())
        return result


@pytest.mark.parametrize(
    "tokens, rows", [(0, 16), (1, 16), (64, 64), (65, 48), (200, 64), (1000, 64)]
)
def test_chunks_fit_the_budget_and_are_of_about_equal_size(tokens: int, rows: int) -> None:
    """Just too little for 80 rows: on the CPU a block of exactly 32 MiB would be taken from the
    system every time.
    """
    V = 2000
    assert chunk_rows(tokens, 80 * 2 * (V + accelerator.CPU_ROW_GAP) * 4, V, torch.float32) == rows
    assert chunk_rows(tokens, 1, V, torch.float32) == 16


def test_whole_logits_are_never_held() -> None:
    N, V, D = 1000, 2000, 16
    case, chunk_bytes = Case(N=N, V=V, D=D, E=16), 70 * 2 * (V + accelerator.CPU_ROW_GAP) * 4
    assert chunk_rows(N, chunk_bytes, V, torch.float32) == 64
    with LargestTensor() as chunked:
        loss, *_ = LossHead(case.layer, PLAIN)(
            case.hidden.requires_grad_(), loss=case.inputs(0.5, 1.0, chunk_bytes, PLAIN)
        )
        loss.backward()
    with LargestTensor() as dense:
        generalized_jsd(
            case.layer(case.hidden), case.teacher_hidden @ case.teacher_weight.T, 0.5
        ).sum().backward()
    assert dense.numel >= N * V, "the recorder sees whole logits where there are any"
    assert chunked.numel == 64 * (V + accelerator.CPU_ROW_GAP)

"""The student's output layer as a loss: against float64 autograd through whole logits.

Shapes: N tokens, V shared vocabulary, D student width, E teacher width.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from gkd_ds.engine import accelerator
from gkd_ds.engine.causal_lm import LogitTransform
from gkd_ds.learn.divergence import generalized_jsd, generalized_jsd_objective
from gkd_ds.learn.head import LossHead, LossInputs, TeacherHead, chunk_rows
from gkd_ds.records import TargetForm
from tests.unit.learn.formulas import BETAS, kl_div_definition

PLAIN = LogitTransform()


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
            targets_NE=self.teacher_hidden,
            form=TargetForm.HIDDEN_STATES,
            teacher_head=head,
            tokens_N=self.tokens,
            vocabulary=self.V,
            objective=generalized_jsd_objective(beta, temperature),
            chunk_bytes=chunk_bytes,
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

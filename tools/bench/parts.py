"""Parts of the work measured alone: the machine's peak, plain `generate`, and the loss at the
head.
"""

from __future__ import annotations

import time

import torch
from transformers import AutoModelForCausalLM, GenerationConfig

from gkd_ds.engine import accelerator
from tools.bench.case import Case
from tools.bench.forced import force_lengths
from tools.bench.pace import Pace, peak_mb, reset_peak, resident_mb
from tools.bench.workload import END, SHAPES, prompt_ids

BANDWIDTH_BYTES = 100 * 2**20  # about a teacher


def matmul(case: Case, pace: Pace) -> None:
    """The fastest of a few large fp32 products and of a few sums of a large tensor: what floors are
    made of.
    """
    size = 2048
    a, b, out = (torch.randn(size, size) for _ in range(3))
    read = torch.ones(2 * BANDWIDTH_BYTES // 4)
    pace.ready()
    while True:
        product = min(_seconds(lambda: torch.mm(a, b, out=out)) for _ in range(5))
        reading = min(_seconds(read.sum) for _ in range(5))
        pace.counted = {
            "flops_per_s": 2 * size**3 / product,
            "read_bytes_per_s": 2 * BANDWIDTH_BYTES / reading,
        }
        pace.step()


def generate(case: Case, pace: Pace) -> None:
    """transformers' `generate` on the prompts of a window, all rows in one batch, sampling as TRL's
    trainers do.
    """
    work = case.workload
    prompts, lengths = case.prompts_and_lengths()
    model = AutoModelForCausalLM.from_pretrained(case.models / "student").eval()
    model.to(accelerator.device())
    force_lengths(model, case)
    config = GenerationConfig(
        max_new_tokens=work.budget,
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        eos_token_id=END,
        pad_token_id=END,
    )
    pace.ready()
    for window in range(case.windows):
        here = slice(window * work.samples, (window + 1) * work.samples)
        prompt_BT = torch.tensor(
            [prompt_ids(prompt) for prompt in prompts[here]], device=accelerator.device()
        )
        with pace.phase("rollout"):
            model.generate(
                prompt_BT, attention_mask=torch.ones_like(prompt_BT), generation_config=config
            )
        pace.counted = {"tokens": sum(lengths[here])}
        pace.step()


def bandwidth_cpu(case: Case, pace: Pace) -> None:
    """Copying as many bytes as the teacher's weights take, within the host's memory."""
    source = torch.randn(BANDWIDTH_BYTES // 4)
    target = torch.empty_like(source)
    pace.ready()
    while True:
        best = min(_seconds(lambda: target.copy_(source)) for _ in range(5))
        pace.counted = {"bytes_per_s": BANDWIDTH_BYTES / best}
        pace.step()


def bandwidth_nvme(case: Case, pace: Pace) -> None:
    """Reading as many bytes from a file the way DeepSpeed reads offloaded weights: its own op, past
    the page cache.
    """
    from deepspeed.ops.op_builder import AsyncIOBuilder

    from gkd_ds.engine import builds

    file = case.output_dir.with_suffix(".bin")
    buffer = torch.randn(BANDWIDTH_BYTES // 4)
    buffer.numpy().tofile(file)
    # DeepSpeed's defaults for the "aio" block of a configuration.
    handle = builds.load(AsyncIOBuilder()).aio_handle(1048576, 8, False, True, 1)
    pinned = handle.new_cpu_locked_tensor(buffer.numel(), buffer)
    pace.ready()
    while True:
        best = min(_seconds(lambda: handle.sync_pread(pinned, str(file), 0)) for _ in range(3))
        pace.counted = {"bytes_per_s": BANDWIDTH_BYTES / best}
        pace.step()


# -- the loss at the head: 2 x 1,024 completion tokens, gradients for the hidden states and the
# student's head --

LOSS_TOKENS = 2048


def loss_ours(case: Case, pace: Pace) -> None:
    from gkd_ds.engine.causal_lm import LogitTransform
    from gkd_ds.learn.divergence import generalized_jsd_objective
    from gkd_ds.learn.head import LossHead, LossInputs, TeacherHead
    from gkd_ds.records import TargetForm

    hidden_ND, teacher_NE, head, teacher_VE = _loss_inputs(case)
    transform = LogitTransform()
    divergence = LossHead(head, transform)
    inputs = LossInputs(
        targets_NE=teacher_NE,
        form=TargetForm.HIDDEN_STATES,
        tokens_N=torch.zeros(LOSS_TOKENS, dtype=torch.long),
        teacher_head=TeacherHead(teacher_VE, None, transform),
        vocabulary=case.workload.vocabulary,
        objective=generalized_jsd_objective(beta=0.5),
        chunk_bytes=case.options["loss_memory_mb"] * 2**20,
    )
    _measure_loss(
        pace, head, hidden_ND, lambda: divergence(hidden_ND, loss=inputs)[0] / LOSS_TOKENS
    )


def loss_dense(case: Case, pace: Pace) -> None:
    """TRL's GKDTrainer: both models' logits, and autograd through its formula."""
    from trl.experimental.gkd import GKDTrainer

    hidden_ND, teacher_NE, head, teacher_VE = _loss_inputs(case)

    def loss():
        with torch.no_grad():
            teacher_NV = torch.nn.functional.linear(teacher_NE, teacher_VE)
        return GKDTrainer.generalized_jsd_loss(head(hidden_ND), teacher_NV, beta=0.5)

    _measure_loss(pace, head, hidden_ND, loss)


def loss_chunked(case: Case, pace: Pace) -> None:
    """TRL's DistillationTrainer."""
    from trl.trainer.distillation_trainer import _chunked_divergence_loss

    hidden_ND, teacher_NE, head, teacher_VE = _loss_inputs(case)
    mask_1N = torch.ones(1, LOSS_TOKENS)

    def loss():
        return _chunked_divergence_loss(
            hidden_ND[None], teacher_NE[None], head.weight, teacher_VE, mask_1N, 0.5
        )[0]

    _measure_loss(pace, head, hidden_ND, loss)


def _loss_inputs(case: Case):
    torch.manual_seed(0)
    D, E = (SHAPES[role]["hidden_size"] for role in ("student", "teacher"))
    vocabulary = case.workload.vocabulary
    head = torch.nn.Linear(D, vocabulary, bias=False)
    torch.nn.init.normal_(head.weight, std=0.05)
    hidden_ND = torch.randn(LOSS_TOKENS, D, requires_grad=True)
    return hidden_ND, torch.randn(LOSS_TOKENS, E), head, 0.05 * torch.randn(vocabulary, E)


def _measure_loss(pace: Pace, head: torch.nn.Linear, hidden_ND: torch.Tensor, loss) -> None:
    """Peak of the resident memory above what is there before; the head's gradient counts, on all
    sides.
    """
    pace.ready()
    while True:
        head.weight.grad = hidden_ND.grad = None
        reset_peak()
        before = resident_mb()
        value = loss()
        value.backward()
        increase = peak_mb() - before
        gradients = float(head.weight.grad.norm()), float(hidden_ND.grad.norm())
        pace.counted = {
            "increase_mb": increase,
            "loss": float(value.detach()),
            "gradient_norms": gradients,
        }
        pace.step()


def _seconds(function) -> float:
    started = time.perf_counter()
    function()
    return time.perf_counter() - started

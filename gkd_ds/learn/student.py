"""The student's DeepSpeed engine, and the steps of the learn phase: loss, backward, update.

How it samples: rollout/.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from deepspeed.utils import z3_leaf_module
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from transformers import PreTrainedModel

from gkd_ds.config.config import GKDConfig
from gkd_ds.data.lengths import RowLengths
from gkd_ds.engine import accelerator, causal_lm, liger, zero
from gkd_ds.engine.causal_lm import LogitTransform
from gkd_ds.engine.counters import Counters
from gkd_ds.engine.lending import Loan, guard
from gkd_ds.engine.startup_checks import (
    refuse_both_sides,
    require_gradients,
    require_same_order,
    try_rows,
)
from gkd_ds.learn.head import LossHead, LossInputs
from gkd_ds.records import SequenceBatch, Source
from gkd_ds.runtime import ranks
from gkd_ds.runtime.errors import InputError

if TYPE_CHECKING:
    from peft import PeftModel


class Student:
    """Wraps `model` (whole, or partitioned by `zero.load`) in a DeepSpeed engine.

    Args: `vocabulary` is the number V of token ids that the student and the teacher share;
    `optimizer` a torch optimizer, or None where the DeepSpeed file has one; `scheduler` a
    learning-rate scheduler, or a function that makes one for the engine's torch optimizer; `passed`
    says which of "optimizer" and "schedule" are the caller's, and not the configuration's;
    `prepare` changes what the engine is made of, before it exists (RolloutEngine.prepare);
    `adapter` is what peft has put into `model`, of which only that is trained. Raises InputError
    when the architecture's logits cannot be reproduced.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        config: GKDConfig,
        ds_config: dict[str, Any],
        vocabulary: int,
        counters: Counters,
        optimizer: Optimizer | None,
        scheduler: LRScheduler | Callable[[Optimizer], LRScheduler],
        passed: tuple[str, ...] = (),
        prepare: Callable[[dict[str, Any], zero.EngineRoot, PreTrainedModel], None] | None = None,
        adapter: PeftModel | None = None,
    ):
        self.adapter, self.passed = adapter, passed
        self.model, self.config, self.vocabulary, self.counters = (
            model,
            config,
            vocabulary,
            counters,
        )
        self.device = accelerator.device()
        self._loan = Loan(model)
        guard(model)
        if adapter is not None:
            guard(adapter)
        self._whole_norm, self._has_learned = 0.0, False
        if config.use_liger_kernel:
            liger.use(model, config.liger_kernel_config)
        causal_lm.require_plain_head(model, "student")
        transform = LogitTransform.of(model.config)
        model.set_output_embeddings(LossHead(model.get_output_embeddings(), transform))
        if config.disable_dropout:
            causal_lm.disable_dropout(model)
        if config.gradient_checkpointing:
            if not model.supports_gradient_checkpointing:
                raise InputError(
                    f"the student ({type(model).__name__}) has no gradient checkpointing; set "
                    "gradient_checkpointing to false."
                )
            model.gradient_checkpointing_enable(config.gradient_checkpointing_kwargs)
        root = zero.EngineRoot(model=model)
        if prepare is not None:
            prepare(ds_config, root, model)
        groups = optimizer.param_groups if optimizer is not None else []
        self._trained = [list(group["params"]) for group in groups if group["params"]]
        self.engine = zero.initialize(root, ds_config, optimizer=optimizer, lr_scheduler=scheduler)
        if ranks.world_size() == 1 and isinstance(self.engine.optimizer, torch.optim.Optimizer):
            # DeepSpeed would copy all gradients into one buffer and back, to average them over this
            # rank alone.
            self.engine.enable_backward_allreduce = False
        model.eval()
        self.run_pass(lambda: causal_lm.check_head(model, "student", self.device))
        if config.packs(evaluating=False) or config.packs(evaluating=True):
            self.run_pass(lambda: causal_lm.check_packing(model, self.device))
        if zero.stage(self.engine) == 3 and ranks.world_size() > 1:
            require_same_order(model, self.run_pass)
        # Rows up to this length and longer ones must not share a batch; None: all of them may.
        self.switch: int | None = None
        self.to_learn()
        self._try_learning()

    def to_learn(self) -> None:
        """Put the model into the mode of the learn phase, in which it always is between phases."""
        causal_lm.set_learning_mode(self.model, dropout=not self.config.disable_dropout)

    def try_rows(self, lengths: RowLengths) -> None:
        """Try rows of these lengths before training (engine/startup_checks.py). Collective; raises
        InputError where a row's result would be random, or depend on others.
        """

        def run(batches: list[SequenceBatch]) -> list[Tensor]:
            """The first as when sampling, the others as when learning: it must be the same."""
            hidden = []
            for batch in batches:
                if hidden:
                    self.to_learn()
                else:
                    self.model.eval()
                run_batch = partial(causal_lm.completion_hidden, self.model, batch)
                hidden.append(self.run_pass(run_batch))
            return hidden

        advice = "use another model"
        if self.config.gradient_checkpointing:
            advice = "set gradient_checkpointing to false"  # its layers are in training mode
        if not self.config.disable_dropout:
            advice = "set disable_dropout to true"
        with causal_lm.without_dropout(self.model):
            self.switch = try_rows("student", self.model, run, lengths, advice)
        advice = "lmbda to 0 and eval_on_policy to false"
        refuse_both_sides("student", Source.STUDENT, self.switch, lengths, advice)

    def _try_learning(self) -> None:
        """Try to go backwards, before training; not where modules are fetched as a whole, since
        DeepSpeed would then average the gradients of weights that have none.
        """
        if zero.stage(self.engine) < 3 or not any(map(z3_leaf_module, self.model.modules())):
            require_gradients(self.model, lambda run: self.engine.module(run=run))
            zero.forget_order(self.engine)

    @contextmanager
    def sampling(self) -> Iterator[None]:
        """Around a rollout: no dropout, and the optimizer's states on the host if asked for."""
        self.model.eval()
        try:
            with self._room_for_rollout():
                yield
        finally:
            self.to_learn()

    def _room_for_rollout(self) -> AbstractContextManager[None]:
        if self.config.offload_optimizer_states:
            return zero.optimizer_states_on_host(self.engine, self.counters)
        return nullcontext()

    def loss(
        self, batch: SequenceBatch, inputs: LossInputs
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """The objective on a micro-batch: what `LossHead` returns for it. Collective."""

        def run():
            hidden_ND = causal_lm.completion_hidden(self.model, batch)
            return self.model.get_output_embeddings()(hidden_ND, loss=inputs)

        with self._not_taken_for_learning():
            return self.engine(run=run)

    def logits(self, batch: SequenceBatch) -> Tensor:
        """The model's own logits `[B, T, W]`. Collective."""
        with self._not_taken_for_learning():
            return self.engine(
                run=lambda: self.model(input_ids=batch.input_ids_BT, use_cache=False).logits
            )

    def backward(self, loss: Tensor, is_last: bool) -> None:
        """Accumulate the gradient of `loss`; on the window's last micro-batch, make it ready for
        `update`.

        DeepSpeed averages gradients over ranks and would divide by the accumulation steps. The loss
        is a sum over the window's tokens, already divided by their number, so the first is undone
        here and the second left out.
        """
        self._has_learned = True
        self.engine.set_gradient_accumulation_boundary(is_last)
        self.engine.backward(loss * ranks.world_size(), scale_wrt_gas=False)

    def update(self) -> bool:
        """Apply the accumulated gradient. False when it was not finite on some rank: then nothing
        has changed.
        """
        if isinstance(self.engine.optimizer, torch.optim.Optimizer):
            # Stage 0 in fp32: the gradient is whole on every rank. DeepSpeed would neither look for
            # NaN nor tell the norm, and would clip by a norm that is summed in fp32: a thousandth
            # off for a large vocabulary.
            gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
            # Rows in fp32, their norms in fp64: no copy of a whole gradient in fp64.
            norms = [
                torch.linalg.vector_norm(gradient, dim=-1).double().norm() for gradient in gradients
            ]
            self._whole_norm = float(torch.stack(norms).norm())
            if not math.isfinite(self._whole_norm):
                self.engine.zero_grad()
                return False
            if 0 < self.config.max_grad_norm < self._whole_norm:
                torch._foreach_mul_(
                    gradients, self.config.max_grad_norm / (self._whole_norm + 1e-6)
                )
        self.engine.step()
        return self.engine.was_step_applied()

    @property
    def grad_norm(self) -> float:
        """L2 norm of the last gradient, before clipping."""
        norm = self.engine.get_global_grad_norm()
        return float(norm) if norm is not None else self._whole_norm

    @property
    def learning_rate(self) -> float:
        return float(self.engine.get_lr()[0])

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """No gradients, no dropout."""
        self.model.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            zero.release_prefetched(self.engine)  # for a backward that does not come
            self.to_learn()

    def run_pass(self, run: Callable[[], Any]) -> Any:
        """One pass over the partitioned parameters, without gradients. Collective."""
        with torch.no_grad(), self._not_taken_for_learning():
            return zero.run_pass(self.engine, run)

    @contextmanager
    def _not_taken_for_learning(self) -> Iterator[None]:
        """Around a forward: ZeRO-3 must not take one without a backward for what learning does.

        Where it knows of forwards alone it releases each weight after its use, from then on and for
        good, and a backward has to gather it again. Once a backward has come it knows better.
        """
        try:
            yield
        finally:
            if not self._has_learned and not torch.is_grad_enabled():
                zero.forget_order(self.engine)

    def show(self) -> None:
        """Let others look at `model`, in one process: its parameters are whole, as views of their
        partitions, until the next pass. Those that are not on the device stay away.
        """
        parameters = [p for p in self.model.parameters() if zero.is_partitioned(p)]
        zero.keep_whole([p for p in parameters if p.ds_tensor.device == self.device])

    def forget_moments(self) -> None:
        """Leave the optimizer without what it has gathered about the weights, as a new one. Raises
        InputError where that is on NVMe.
        """
        if self.engine.zero_nvme_offload_optimizer():
            raise InputError(
                "train() was called again, but the optimizer's states on NVMe cannot begin anew; "
                "start the script again, or keep them in memory."
            )
        self.engine.basic_optimizer.state.clear()

    def release(self) -> None:
        """Take the engine down: `model` is a model again, with its weights. One process only.

        A torch optimizer of the caller's gets its parameters back, without what it has gathered
        about them.
        """
        optimizer = self.engine.basic_optimizer
        self._loan.end(self.engine)
        del self.engine
        for group, parameters in zip(optimizer.param_groups, self._trained):
            group["params"] = parameters
        optimizer.state.clear()

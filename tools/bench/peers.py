"""The other sides of the benchmark: TRL's two trainers and DeepSpeed's rollout helper, each used as
its users use it.

Nothing here makes a peer slower: no hook runs inside its loops but a timer around generation,
around the teacher's forward, around a training step and around the optimizer, and in the ragged
case a stopping criterion per row.
"""

from __future__ import annotations

import os
from contextlib import contextmanager
from typing import Any

import deepspeed
import torch
import trl.experimental.gkd.gkd_trainer
import trl.trainer.distillation_trainer
from datasets import Dataset
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.rollout import opsd
from deepspeed.runtime.rollout.base import RolloutRequest, SamplingConfig
from deepspeed.runtime.rollout.hybrid_engine_rollout import HybridEngineRollout
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DistillationConfig, DistillationTrainer
from trl.experimental.gkd import GKDConfig, GKDTrainer

from gkd_ds.engine import accelerator
from tools.bench.case import Case
from tools.bench.forced import force_lengths
from tools.bench.pace import Pace, PaceCallback
from tools.bench.parity import collect_gradients, given_completions, padded
from tools.bench.workload import END, PROMPT_TOKENS, prompt_ids


def trl_gkd(case: Case, pace: Pace) -> None:
    """TRL's GKDTrainer, every micro-batch on-policy."""
    if case.deepspeed:
        # On the CPU accelerate starts torch's process group alone, and DeepSpeed would take itself
        # for one rank.
        deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False, verbose=False)
    work = case.workload
    prompts, _ = case.prompts_and_lengths()
    # The completion of the data is replaced by a sampled one; one token of it is enough.
    answer = {"role": "assistant", "content": "w3"}
    rows = [{"messages": [{"role": "user", "content": prompt}, answer]} for prompt in prompts]
    config = GKDConfig(
        max_new_tokens=work.budget, lmbda=1.0, **_common(case), train_sampling_strategy="sequential"
    )
    trainer = GKDTrainer(
        model=str(case.models / "student"),
        teacher_model=str(case.models / "teacher"),
        args=config,
        train_dataset=Dataset.from_list(rows),
        processing_class=_tokenizer(case),
    )
    _time_phases(trainer, pace, trl.experimental.gkd.gkd_trainer, trainer.teacher_model)
    force_lengths(trainer.model, case)

    def loss(samples, total):
        return trainer.compute_loss(
            trainer.model_wrapped, _on_device(padded(samples, END)), num_items_in_batch=total
        )

    trainer.add_callback(PaceCallback(pace, lambda: _parity_of_trainer(trainer, case, loss)))
    trainer.train()


def trl_distillation(case: Case, pace: Pace) -> None:
    """TRL's DistillationTrainer: one generation per update, chunked loss."""
    work = case.workload
    prompts, _ = case.prompts_and_lengths()
    rows = [{"prompt": [{"role": "user", "content": prompt}]} for prompt in prompts]
    config = DistillationConfig(
        max_completion_length=work.budget, shuffle_dataset=False, **_common(case)
    )
    trainer = DistillationTrainer(
        model=str(case.models / "student"),
        teacher_model=str(case.models / "teacher"),
        args=config,
        train_dataset=Dataset.from_list(rows),
        processing_class=_tokenizer(case),
    )
    teacher = trainer.accelerator.unwrap_model(trainer.teacher_model)
    _time_phases(trainer, pace, trl.trainer.distillation_trainer, teacher.base_model)
    force_lengths(trainer.model, case)

    def loss(samples, total):
        batch = _on_device(padded(samples, END))
        ids, mask = batch["input_ids"], batch["attention_mask"]
        inputs = {
            "prompt_ids": ids[:, :PROMPT_TOKENS],
            "prompt_mask": mask[:, :PROMPT_TOKENS],
            "completion_ids": ids[:, PROMPT_TOKENS:],
            "completion_mask": mask[:, PROMPT_TOKENS:],
            "num_items_in_batch": total * case.world_size,
        }
        trainer.model.train()
        return trainer.compute_loss(trainer.model_wrapped, inputs)

    trainer.add_callback(PaceCallback(pace, lambda: _parity_of_trainer(trainer, case, loss)))
    trainer.train()


def deepspeed_rollout(case: Case, pace: Pace) -> None:
    """DeepSpeed's rollout helper and its dense loss, in the shortest loop that trains with them.

    The engine is an ordinary one: a hybrid engine of a Llama does not initialise on the CPU ("not
    implemented on CPU backend"). At stage 0 its parameters are whole, which suits the helper's
    plain `generate` best.
    """
    work = case.workload
    prompts, _ = case.prompts_and_lengths()
    student = AutoModelForCausalLM.from_pretrained(case.models / "student")
    teacher = AutoModelForCausalLM.from_pretrained(case.models / "teacher").eval()
    ds_config = {
        "train_micro_batch_size_per_gpu": work.rows,
        "gradient_accumulation_steps": work.micro_batches,
        "gradient_clipping": 1.0,
        "zero_optimization": {"stage": 0},
        "steps_per_print": 2**62,
    }
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1")
    deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False, verbose=False)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-5, weight_decay=0.0, fused=True)
    engine, *_ = deepspeed.initialize(
        model=student, config=ds_config, optimizer=optimizer, dist_init_required=False
    )
    rollout = HybridEngineRollout(engine, _tokenizer(case))
    sampling = SamplingConfig(max_new_tokens=work.budget, temperature=1.0)
    force_lengths(student, case)

    def loss(batch: opsd.ResponseTokenBatch, score: str = "score"):
        with torch.no_grad(), pace.phase(score):
            teacher_logits = teacher(
                input_ids=batch.input_ids, attention_mask=batch.attention_mask
            ).logits
        logits = engine(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
        return opsd.generalized_jsd_loss(
            batch.select_causal_logits(logits),
            batch.select_causal_logits(teacher_logits),
            batch.response_mask,
            beta=0.5,
        )

    facts = {}
    if case.parity_file:
        samples = given_completions(case)
        total = sum(len(completion) for _, completion in samples)
        whole = 0.0
        for start in range(0, work.samples, work.rows):
            inputs = padded(samples[start : start + work.rows], END)
            batch = opsd.ResponseTokenBatch(
                inputs["input_ids"],
                inputs["attention_mask"],
                inputs["input_ids"][:, 1:],
                inputs["labels"][:, 1:] != -100,
            )
            engine.set_gradient_accumulation_boundary(start + work.rows >= work.samples)
            of_batch = loss(batch).loss_sum / total
            whole += float(of_batch)
            engine.backward(of_batch, scale_wrt_gas=False)
        collect_gradients(student, case.parity_file, case.rank)
        engine.step()
        facts["parity"] = whole
    pace.ready(**facts)
    for window in range(case.windows):
        ids = [
            prompt_ids(prompt)
            for prompt in prompts[window * work.samples : (window + 1) * work.samples]
        ]
        tokens = 0
        for micro_batch in range(work.micro_batches):
            engine.set_gradient_accumulation_boundary(micro_batch == work.micro_batches - 1)
            with pace.phase("rollout"):
                engine.eval()
                prompt_BT = torch.tensor(
                    ids[micro_batch * work.rows : (micro_batch + 1) * work.rows]
                )
                rolled_out = rollout.generate(
                    RolloutRequest(prompt_BT, torch.ones_like(prompt_BT)), sampling
                )
                engine.train()
                batch = opsd.ResponseTokenBatch.from_rollout(rolled_out)
            scored = pace.seconds["score"]
            with pace.phase("learn"):
                out = loss(batch)
                engine.backward(out.loss)
            pace.seconds["learn"] -= pace.seconds["score"] - scored
            tokens += int(out.valid_token_count)
            with pace.phase("update"):
                engine.step()
        pace.counted = {"tokens": tokens}
        pace.step()


# -- what TRL's two trainers share -----------------------------------------------------------------


def _common(case: Case) -> dict[str, Any]:
    """Training arguments that mean the same to both."""
    work = case.workload
    return {
        "output_dir": str(case.output_dir),
        "per_device_train_batch_size": work.rows,
        "gradient_accumulation_steps": work.micro_batches,
        "beta": 0.5,
        "temperature": 1.0,
        "learning_rate": 1e-5,
        "lr_scheduler_type": "constant",
        "max_steps": case.windows,
        "gradient_checkpointing": case.checkpointing,
        "deepspeed": case.deepspeed,
        "ddp_backend": get_accelerator().communication_backend_name()
        if case.world_size > 1 or case.deepspeed
        else None,
        "use_cpu": accelerator.on_cpu(),
        "bf16": False,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
    }


def _tokenizer(case: Case):
    return AutoTokenizer.from_pretrained(case.models / "student", padding_side="left")


def _on_device(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.to(accelerator.device()) for name, tensor in batch.items()}


def _time_phases(trainer, pace: Pace, module, teacher: torch.nn.Module) -> None:
    """Rollout: the model unwrapped for generation, and generation. Learn: what else a training step
    does.
    """
    unwrap = module.unwrap_model_for_generation

    @contextmanager
    def timed_unwrap(*args, **kwargs):
        with pace.phase("rollout"), unwrap(*args, **kwargs) as unwrapped:
            yield unwrapped

    module.unwrap_model_for_generation = timed_unwrap
    teacher.forward = pace.timed("score", teacher.forward)
    training_step = trainer.training_step

    def step(*args, **kwargs):
        before = pace.seconds["rollout"] + pace.seconds["score"]
        with pace.phase("learn"):
            loss = training_step(*args, **kwargs)
        pace.seconds["learn"] -= pace.seconds["rollout"] + pace.seconds["score"] - before
        return loss

    trainer.training_step = step


def _parity_of_trainer(trainer, case: Case, loss) -> dict[str, Any]:
    """Loss and gradients of the parity batch, micro-batch by micro-batch, through `loss(samples,
    total)`.

    Gradients of several ranks are averaged, so `total` is the number of completion tokens per rank.
    """
    if case.parity_file is None:
        return {}
    work, model = case.workload, trainer.model_wrapped
    samples = given_completions(case)
    total = torch.tensor(
        float(sum(len(completion) for _, completion in samples)), device=accelerator.device()
    )
    if case.world_size > 1:
        torch.distributed.all_reduce(total)
        total /= case.world_size
    model.train()
    whole = torch.zeros_like(total)
    for start in range(0, work.samples, work.rows):
        of_batch = loss(samples[start : start + work.rows], total)
        whole += of_batch.detach() / case.world_size
        if case.deepspeed:
            model.set_gradient_accumulation_boundary(start + work.rows >= work.samples)
            model.backward(of_batch, scale_wrt_gas=False)
        else:
            of_batch.backward()
    if case.world_size > 1:
        torch.distributed.all_reduce(whole)
    collect_gradients(trainer.model, case.parity_file, case.rank)
    if case.deepspeed:
        model.step()
    else:
        trainer.model.zero_grad()
    return {"parity": float(whole)}

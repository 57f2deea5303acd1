"""Our side of the benchmark: gkd_ds through its public trainer."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from deepspeed.accelerator import get_accelerator

from gkd_ds import GKDConfig, GKDTrainer
from gkd_ds.data.schedule import SampleOrder
from gkd_ds.engine import accelerator
from gkd_ds.pipeline import count_tokens
from gkd_ds.records import Rollout, Source
from gkd_ds.rollout.sampling import Sampling
from tools.bench.case import Case
from tools.bench.pace import Pace, PaceCallback
from tools.bench.parity import collect_gradients, given_completions
from tools.bench.workload import prompt_ids


@dataclasses.dataclass(frozen=True)
class ForcedLengths(Sampling):
    """Ends each sample at the length that the workload prescribes for its prompt."""

    lengths: dict[tuple[int, ...], int] = dataclasses.field(default_factory=dict)

    def limit(self, prompt: list[int]) -> int:
        return self.lengths[tuple(prompt)]


class AsGiven(SampleOrder):
    """Visits the samples in the order in which the workload lists them."""

    def permutation(self, epoch: int) -> np.ndarray:
        return np.arange(self.num_samples, dtype=np.int64)


def run(case: Case, pace: Pace) -> None:
    work = case.workload
    prompts, lengths = case.prompts_and_lengths()
    answer = {"role": "assistant", "content": "w3"}
    rows = [{"messages": [{"role": "user", "content": prompt}, answer]} for prompt in prompts]
    config = GKDConfig(
        output_dir=str(case.output_dir),
        overwrite_output_dir=True,
        per_device_train_batch_size=work.rows,
        gradient_accumulation_steps=work.micro_batches,
        max_new_tokens=work.budget,
        lmbda=1.0,
        beta=0.5,
        temperature=1.0,
        learning_rate=1e-5,
        lr_scheduler_type="constant",
        max_steps=case.windows,
        gradient_checkpointing=case.checkpointing,
        deepspeed=case.deepspeed,
        teacher_deepspeed=case.teacher_deepspeed,
        ddp_backend=get_accelerator().communication_backend_name(),
        use_cpu=accelerator.on_cpu(),
        bf16=False,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        watchdog_timeout=7200.0,
        **case.options,
    )
    trainer = GKDTrainer(
        model=str(case.models / "student"),
        teacher_model=str(case.models / "teacher"),
        args=config,
        train_dataset=Dataset.from_list(rows),
    )
    trainer.windows.order = AsGiven(len(rows), seed=0)
    pipeline = trainer.pipeline
    known = {prompt_ids(prompt): length for prompt, length in zip(prompts, lengths)}
    pipeline.sampling = ForcedLengths(**vars(pipeline.sampling), lengths=known)

    def begin() -> dict[str, Any]:
        return {"parity": _parity(trainer, case)} if case.parity_file else {}

    class Callback(PaceCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if (
                case.rank > 0
            ):  # the driver takes these numbers from the first rank, which writes them
                return super().on_step_end(args, state, control, **kwargs)
            row = json.loads((case.output_dir / "metrics.jsonl").read_text().splitlines()[-1])
            for phase in ("rollout", "score", "learn"):
                pace.seconds[phase] = row[f"perf/{phase}_s"]
            names = (
                "decoded_rows_per_token",
                "padded_tokens",
                "teacher_bytes",
                "teacher_passes",
                "student_gathers",
            )
            pace.counted = {name: row[f"perf/{name}"] for name in names} | {
                "tokens": row["completion_tokens"]
            }
            super().on_step_end(args, state, control, **kwargs)

    trainer.add_callback(Callback(pace, begin))
    trainer.train()


def _parity(trainer: GKDTrainer, case: Case) -> float:
    """Loss and gradients of the parity batch through the pipeline's score and learn phases."""
    pipeline, student = trainer.pipeline, trainer.pipeline.student
    rollouts = [
        Rollout(number, Source.STUDENT, prompt, completion, True)
        for number, (prompt, completion) in enumerate(given_completions(case))
    ]
    total = count_tokens(rollouts)
    learned = pipeline.learn(rollouts, pipeline.score(rollouts), total)
    collect_gradients(student.model, case.parity_file, pace_rank=case.rank)
    assert student.update()
    total_loss = [sum(learned.divergence)]
    loss = torch.tensor(total_loss, dtype=torch.float64, device=student.device)
    if torch.distributed.get_world_size() > 1:
        torch.distributed.all_reduce(loss)
    return float(loss) / total

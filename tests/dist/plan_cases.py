"""What test_plan_dist.py compares with the planner: one window by real ranks, and the tensors that their engines hold.

PYTHONPATH=. python -m tests.dist.plan_cases DIRECTORY      # prints one JSON object per configuration
"""

import json
import sys
from pathlib import Path

import datasets
import torch

from gkd_ds import GKDConfig, GKDTrainer, zero
from gkd_ds.plan import count_memory, make_plan
from tests.dist import forked
from tests.tiny import make_chat_rows, make_model, make_tokenizer

ROWS = 3
# Ranks, where the teacher is, where the student's optimizer is.
CASES = [
    (1, "none", "none"),
    (1, "cpu", "cpu"),
    (2, "none", "none"),
    (2, "none", "cpu"),
    (2, "cpu", "none"),
    (2, "cpu", "cpu"),
]
# Where DeepSpeed can read and write asynchronously. The model is larger: shards below 1 MiB are not swapped.
NVME_CASES = [(1, "nvme", "none"), (2, "nvme", "none")]


def config_of(directory: Path, teacher_on: str, optimizer_on: str) -> GKDConfig:
    zero = {"stage": 3, "reduce_bucket_size": 100_000}
    offload: dict = {"device": teacher_on}
    if teacher_on == "nvme":
        offload |= {"nvme_path": str(directory / "nvme"), "buffer_count": "auto", "buffer_size": "auto"}
    return GKDConfig(
        output_dir=str(directory / "run"),
        overwrite_output_dir=True,
        model_name_or_path=str(directory / "student"),
        teacher_model_name_or_path=str(directory / ("teacher-large" if teacher_on == "nvme" else "teacher")),
        per_device_train_batch_size=1,
        gradient_accumulation_steps=ROWS,
        max_steps=1,
        max_length=160,
        max_new_tokens=8,
        lmbda=1.0,
        gradient_checkpointing=False,
        save_strategy="no",
        disable_tqdm=True,
        log_level="error",
        use_cpu=True,
        deepspeed={"zero_optimization": zero | {"offload_optimizer": {"device": optimizer_on}}},
        teacher_deepspeed={"zero_optimization": zero | {"offload_param": offload}},
    )


def tensor_bytes(tensors) -> int:
    """Bytes of distinct storages."""
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


def measure(trainer: GKDTrainer) -> dict[str, float]:
    """Bytes on this rank, under the planner's names."""
    student, teacher = trainer.student.engine, trainer.teacher.engine
    optimizer = student.optimizer
    shards = [p.ds_tensor for p in student.module.parameters()]
    masters = optimizer.fp32_partitioned_groups_flat
    moments = [state[name] for state in optimizer.optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
    parameters = tensor_bytes(shards)
    swappers = {p.nvme_swapper for p in teacher.module.parameters() if zero.is_on_nvme(p)}
    return {
        "NVMe buffers, teacher": sum(swapper.buffers.nbytes for swapper in swappers),
        "student parameters": parameters,
        "student gradients": tensor_bytes([optimizer.grad_partitions_flat_buffer]),
        "optimizer states": tensor_bytes([*shards, *masters, *moments]) - parameters,
        "teacher parameters": sum(p.ds_tensor.nbytes for p in teacher.module.parameters()) + swapped_bytes(trainer.args),
        "teacher's head, whole": trainer.teacher.head.weight.ds_numel * 4,
        "teacher_bytes": trainer.counters.teacher_bytes,
        "teacher_passes": trainer.counters.teacher_passes,
        "student_gathers": trainer.counters.student_gathers,
    }


def swapped_bytes(config: GKDConfig) -> int:
    """This rank's part of what is on NVMe."""
    path = config.teacher_deepspeed["zero_optimization"]["offload_param"].get("nvme_path")
    rank = torch.distributed.get_rank()
    return sum(file.stat().st_size for file in Path(path).rglob(f"rank{rank}/**/*.swp")) if path else 0


def train_and_note(directory: Path, config: GKDConfig, rows: list[dict], note: Path) -> None:
    trainer = GKDTrainer(
        model=config.model_name_or_path,
        teacher_model=config.teacher_model_name_or_path,
        args=config,
        train_dataset=datasets.Dataset.from_list(rows),
    )
    before = dict(vars(trainer.counters))
    trainer.train()
    measured = measure(trainer)
    for name in ("teacher_bytes", "teacher_passes", "student_gathers"):
        measured[name] -= before[name]
    if torch.distributed.get_rank() == 0:
        note.write_text(json.dumps(measured))


def predict(config: GKDConfig, ranks: int) -> dict[str, float]:
    """What the planner says about `config`, with bytes of the device, the host and NVMe together."""
    plan = make_plan(config, ranks, weight_bytes=4, on_cpu=True)
    memory = {line.what: line.device + line.host + line.nvme for line in count_memory(plan)}
    teacher = plan.teacher
    per_pass, head = teacher.layers_total + teacher.embedding, teacher.head or teacher.embedding
    return memory | {
        "teacher_bytes": (per_pass * plan.teacher_passes + head) * 4,
        "teacher_passes": plan.teacher_passes,
        "student_gathers": 1,
    }


def main() -> None:
    directory = Path(sys.argv[1])
    tokenizer, rows = make_tokenizer(), make_chat_rows(12)
    for name, layers in (("student", 2), ("teacher", 3)):
        make_model("llama", directory / name, layers=layers, hidden=128, tokenizer=tokenizer, tie_word_embeddings=False)
    cases = list(CASES)
    if Path("/usr/include/libaio.h").exists():
        make_model("llama", directory / "teacher-large", layers=3, hidden=768, tokenizer=tokenizer, init_range=0.02)
        cases += NVME_CASES
    for ranks, teacher_on, optimizer_on in cases:
        config, note = config_of(directory, teacher_on, optimizer_on), directory / "measured.json"
        codes = forked.run(ranks, lambda c=config, n=note: train_and_note(directory, c, rows, n), limit=120)
        assert codes == [0] * ranks, codes
        case = {"ranks": ranks, "teacher_on": teacher_on, "optimizer_on": optimizer_on}
        print(
            json.dumps(case | {"measured": json.loads(note.read_text()), "predicted": predict(config, ranks)}),
            flush=True,
        )


if __name__ == "__main__":
    main()

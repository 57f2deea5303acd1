"""What test_plan_dist.py compares with the planner: windows by real ranks, what their engines hold,
what they send.

PYTHONPATH=. python -m tests.dist.plan_cases DIRECTORY      # prints one JSON object per
configuration

Everything is measured in the second window: in the first ZeRO-3 still records the order of its
modules. On the CPU there are no moves between host and device, so those bytes are not measured
anywhere; and both places are the same memory, so an engine's own flags tell which of the two it
would use.
"""

import contextlib
import gc
import json
import sys
from collections import defaultdict
from pathlib import Path

import datasets
import torch
from torch import distributed

from gkd_ds import GKDConfig, GKDTrainer
from gkd_ds.engine import zero
from gkd_ds.plan.memory import count_memory
from gkd_ds.plan.run import make_plan
from gkd_ds.rollout.kv_cache import RoomyLayer
from tests.dist import forked
from tests.tiny import make_chat_rows, make_model, make_tokenizer
from tools.plan_work import ExpectedPlan, count_work

ROWS, NEW_TOKENS = 3, 8
# Ranks, where the teacher is, where the student's optimizer is.
CASES = [
    (1, "none", "none"),
    (1, "cpu", "cpu"),
    (2, "none", "none"),
    (2, "none", "cpu"),
    (2, "cpu", "none"),
    (2, "cpu", "cpu"),
]
# Where DeepSpeed can read and write asynchronously. The models are larger: shards below 1 MiB are
# not swapped.
NVME_CASES = [(1, "nvme", "none"), (2, "nvme", "none"), (2, "none", "nvme")]


def config_of(directory: Path, teacher_on: str, optimizer_on: str, prompt_tokens: int) -> GKDConfig:
    # Everything is partitioned: by default ZeRO-3 keeps small parameters whole, and these all are.
    zero = {"stage": 3, "reduce_bucket_size": 100_000, "stage3_param_persistence_threshold": 0}
    teacher, optimizer = ({"device": place} for place in (teacher_on, optimizer_on))
    if teacher_on == "nvme":
        teacher |= {
            "nvme_path": str(directory / "nvme"),
            "buffer_count": "auto",
            "buffer_size": "auto",
        }
    if optimizer_on == "nvme":
        optimizer |= {"nvme_path": str(directory / "nvme-optimizer")}
    return GKDConfig(
        output_dir=str(directory / "run"),
        overwrite_output_dir=True,
        model_name_or_path=str(directory / ("large" if optimizer_on == "nvme" else "student")),
        teacher_model_name_or_path=str(
            directory / ("large" if teacher_on == "nvme" else "teacher")
        ),
        per_device_train_batch_size=1,
        gradient_accumulation_steps=ROWS,
        max_steps=2,
        max_length=prompt_tokens + NEW_TOKENS,
        max_new_tokens=NEW_TOKENS,
        lmbda=1.0,
        gradient_checkpointing=False,
        save_strategy="no",
        eval_on_start=True,  # forwards without a backward, which must not spoil what comes after
        per_device_eval_batch_size=1,
        disable_tqdm=True,
        log_level="error",
        use_cpu=True,
        deepspeed={"zero_optimization": zero | {"offload_optimizer": optimizer}},
        teacher_deepspeed={"zero_optimization": zero | {"offload_param": teacher}},
    )


# ---- Traffic ----

# What a rank receives of a collective, as the planner counts it: of R equal parts it has one
# already.
COLLECTIVES = {
    "all_gather_into_tensor": lambda output, given, ranks: output.nbytes - given.nbytes,
    "reduce_scatter_tensor": lambda output, given, ranks: given.nbytes - output.nbytes,
    "all_reduce": lambda given, ranks: 2 * given.nbytes * (ranks - 1) // ranks,
    "broadcast": lambda given, ranks: given.nbytes * (ranks - 1) // ranks,
}


class Meter:
    """Counts what torch's collectives bring to this rank, what it reads from drives, and the
    tensors that are alive.
    """

    def __init__(self):
        self.phase, self.received, self.heartbeat = "", defaultdict(int), defaultdict(int)
        for name, size in COLLECTIVES.items():
            counted = self._counted(getattr(distributed, name), size)
            setattr(distributed, name, counted)
            setattr(distributed.distributed_c10d, name, counted)
        self.before = tensor_bytes(tensors_alive())

    def _counted(self, collective, size):
        def run(*tensors, **options):
            given = [t for t in (*tensors, *options.values()) if isinstance(t, torch.Tensor)]
            self.received[self.phase] += size(*given, distributed.get_world_size())
            return collective(*tensors, **options)

        return run

    def watch(self, trainer: GKDTrainer) -> None:
        """Attribute everything to the phases of `trainer`'s last window."""
        phase_of, backward, score = (
            trainer.pipeline.phase,
            trainer.student.backward,
            trainer.pipeline.score,
        )

        @contextlib.contextmanager
        def phase(name):
            if name == "rollout":
                self.received.clear()
                self.heartbeat.clear()
                self.counted, self.kv_cache = dict(vars(trainer.pipeline.counters)), 0
            self.phase, read = name, drive_bytes_read()
            with phase_of(name) as heartbeat:
                yield lambda: (self.sweep(), heartbeat())
            self.received[f"{name} from NVMe"] += drive_bytes_read() - read
            self.phase = ""

        def swept_backward(*given, **options):
            self.sweep()  # everything that the forward has gathered is still here
            backward(*given, **options)

        for layer in trainer.teacher.engine.module.layers:  # while its weights are here
            layer.module.register_forward_hook(lambda *_: self.sweep())

        def measured_score(rollouts):
            targets = score(rollouts)
            self.targets = targets.hidden_NE.nbytes
            return targets

        trainer.pipeline.phase, trainer.student.backward, trainer.pipeline.score = (
            phase,
            swept_backward,
            measured_score,
        )

    def sweep(self) -> None:
        """Note the bytes of all tensors that Python knows."""
        self.heartbeat[self.phase] = max(
            self.heartbeat[self.phase], tensor_bytes(tensors_alive()) - self.before
        )
        if self.phase == "rollout":
            layers = [thing for thing in gc.get_objects() if isinstance(thing, RoomyLayer)]
            kept = tensor_bytes(t for layer in layers for t in (layer.keys_BHCD, layer.values_BHCD))
            self.kv_cache = max(self.kv_cache, kept)


def tensors_alive() -> list[torch.Tensor]:
    return [thing for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor)]


def tensor_bytes(tensors) -> int:
    """Bytes of distinct storages, and of what oneDNN has packed."""
    plain = [t for t in tensors if t.layout == torch.strided and t.device.type == "cpu"]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in plain}
    packed = [t for t in tensors if t.layout == torch._mkldnn]
    return sum(storages.values()) + sum(t.numel() * t.element_size() for t in packed)


def drive_bytes_read() -> int:
    """Bytes that this process has had read from drives."""
    fields = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(fields["read_bytes"])


# ---- Memory ----


def measure(trainer: GKDTrainer, meter: Meter) -> dict[str, dict]:
    """Bytes on this rank: of what stays by place, of what comes and goes by phase, and of the
    traffic of a window.
    """
    student, teacher = trainer.student.engine, trainer.teacher.engine
    optimizer = student.optimizer
    shards = [p.ds_tensor for p in student.module.parameters()]
    parameters = tensor_bytes(shards)
    fp32_gradients = {
        "nvme": swapped_bytes(trainer.args.deepspeed, "offload_optimizer", "*_gradient_*.swp")
    }
    if optimizer.swap_optimizer:
        on_nvme = swapped_bytes(trainer.args.deepspeed, "offload_optimizer")
        states, where = on_nvme - fp32_gradients["nvme"], "nvme"
    else:
        masters = optimizer.fp32_partitioned_groups_flat
        moments = [
            state[name]
            for state in optimizer.optimizer.state.values()
            for name in ("exp_avg", "exp_avg_sq")
        ]
        states = tensor_bytes([*shards, *masters, *moments]) - parameters
        where = "host" if optimizer.offload_optimizer else "device"
    on_nvme = [p for p in teacher.module.parameters() if zero.is_on_nvme(p)]
    elsewhere = [p.ds_tensor for p in teacher.module.parameters() if not zero.is_on_nvme(p)]
    teacher_place = "host" if teacher.optimizer.offload_device else "device"
    buffers = sum(swapper.buffers.nbytes for swapper in {p.nvme_swapper for p in on_nvme})
    places = {
        "student parameters": {"device": parameters},
        "student gradients": {
            "host" if optimizer.offload_optimizer else "device": tensor_bytes(
                [optimizer.grad_partitions_flat_buffer]
            )
        },
        "optimizer states": {where: states},
        **({"gradients in fp32": fp32_gradients} if optimizer.swap_optimizer else {}),
        "teacher parameters": {
            teacher_place: tensor_bytes(elsewhere),
            "nvme": swapped_bytes(trainer.args.teacher_deepspeed, "offload_param"),
        },
        "NVMe buffers, teacher": {"host": buffers},
        "KV cache": {"device": meter.kv_cache},
        "teacher's hidden states": {"device": meter.targets},
    }
    now = vars(trainer.pipeline.counters)
    return {
        "places": {
            what: {place: size for place, size in sizes.items() if size}
            for what, sizes in places.items()
        },
        "phases": dict(meter.heartbeat),
        "ranks": {phase: meter.received[phase] for phase in ("rollout", "score", "learn")},
        "nvme": {
            phase: meter.received[f"{phase} from NVMe"] for phase in ("rollout", "score", "learn")
        },
        "counts": {
            name: now[name] - meter.counted[name]
            for name in ("teacher_passes", "student_gathers", "teacher_bytes")
        }
        | {"micro_batches": trainer._learned.micro_batches},
    }


def swapped_bytes(file: dict, block: str, pattern: str = "*.swp") -> int:
    """This rank's part of what is on NVMe."""
    path = file["zero_optimization"][block].get("nvme_path")
    rank = distributed.get_rank()
    return (
        sum(found.stat().st_size for found in Path(path).rglob(f"rank{rank}/**/{pattern}"))
        if path
        else 0
    )


def train_and_note(config: GKDConfig, rows: list[dict], note: Path) -> None:
    meter = Meter()
    trainer = GKDTrainer(
        model=config.model_name_or_path,
        teacher_model=config.teacher_model_name_or_path,
        args=config,
        train_dataset=datasets.Dataset.from_list(rows),
        eval_dataset=datasets.Dataset.from_list(rows[:6]),
    )
    with trainer.engines():  # one process gives them back when nobody uses them
        meter.watch(trainer)
        trainer.train()
        if distributed.get_rank() == 0:
            note.write_text(json.dumps(measure(trainer, meter)))


# ---- Prediction ----

# Kept by autograd or inside an operation: not among the tensors that Python knows.
OUT_OF_SIGHT = ["activations", "activations in a layer", "logits chunk"]


def predict(config: GKDConfig, ranks: int, prompt_tokens: int) -> dict[str, dict]:
    """What the planner says about `config`, as `measure` puts it."""
    plan = make_plan(config, ranks, weight_bytes=4, on_cpu=True)
    plan = ExpectedPlan.of(plan, prompt_tokens=prompt_tokens)
    places: dict[tuple[str, str], dict[str, int]] = defaultdict(lambda: defaultdict(int))
    phases: dict[str, int] = defaultdict(int)
    for line in count_memory(plan):
        for place in ("device", "host", "nvme"):
            if size := getattr(line, place):
                places[line.phase, line.what.removesuffix(", room ahead")][place] += size
        if line.what not in OUT_OF_SIGHT:
            phases[line.phase] += line.device + line.host
    work = count_work(plan)
    teacher = plan.teacher
    return {
        "places": {what: sizes for (_, what), sizes in places.items()},
        "phases": {
            phase: phases["always"] + phases[phase] for phase in ("rollout", "score", "learn")
        },
        "ranks": {
            phase: work[phase].links.get("ranks", 0) for phase in ("rollout", "score", "learn")
        },
        "nvme": {
            phase: work[phase].links.get("nvme", 0) for phase in ("rollout", "score", "learn")
        },
        "counts": {
            "teacher_passes": plan.teacher_passes,
            "student_gathers": 1,
            "teacher_bytes": 4 * (teacher.layers_total + teacher.embedding + teacher.head),
            "micro_batches": plan.micro_batches,
        },
    }


def main() -> None:
    directory = Path(sys.argv[1])
    tokenizer, rows = (
        make_tokenizer(),
        make_chat_rows(1) * 12,
    )  # all samples are equally long: no padding
    prompt = tokenizer.apply_chat_template(rows[0]["messages"][:-1], add_generation_prompt=True)[
        "input_ids"
    ]
    for name, layers, hidden in (("student", 2, 128), ("teacher", 3, 128), ("large", 3, 768)):
        shape = {
            "layers": layers,
            "hidden": hidden,
            "tie_word_embeddings": False,
            "init_range": 0.02,
        }
        make_model("llama", directory / name, tokenizer=tokenizer, **shape)
    for case in CASES + NVME_CASES:
        if "nvme" in case and not Path("/usr/include/libaio.h").exists():
            continue
        ranks, teacher_on, optimizer_on = case
        config, note = (
            config_of(directory, teacher_on, optimizer_on, len(prompt)),
            directory / "measured.json",
        )
        codes = forked.run(ranks, lambda c=config, n=note: train_and_note(c, rows, n), limit=180)
        assert codes == [0] * ranks, (case, codes)
        predicted, measured = predict(config, ranks, len(prompt)), json.loads(note.read_text())
        print(json.dumps({"case": case, "measured": measured, "predicted": predicted}), flush=True)


if __name__ == "__main__":
    main()

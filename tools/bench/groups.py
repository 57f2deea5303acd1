"""What is compared with what: each group is a set of sides that are timed in turn on the same
work.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from tools.bench.case import Case
from tools.bench.workload import Workload

# From FACTS: large blocks come from one heap that is never given back, in huge pages.
ALLOCATOR = (
    "glibc.malloc.hugetlb=1:glibc.malloc.mmap_max=0:"
    "glibc.malloc.trim_threshold=17179869184:glibc.malloc.top_pad=67108864"
)
# One file for both trainers; what is "auto" either of them fills in.
ZERO3 = {
    "zero_optimization": {
        "stage": 3,
        "overlap_comm": False,
        "contiguous_gradients": True,
        "reduce_bucket_size": "auto",
        "stage3_prefetch_bucket_size": "auto",
        "stage3_param_persistence_threshold": "auto",
    },
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
}


@dataclass(frozen=True)
class Group:
    """`sides` by the name they have in the tables; `parts` do not train, so they have no gradient
    to check.
    """

    name: str
    workload: Workload
    sides: dict[str, Case]
    parts: tuple[str, ...] = ("matmul",)
    gated: bool = True
    allocator: bool = False
    runs: int | None = None

    @property
    def world_size(self) -> int:
        return max(case.world_size for case in self.sides.values())


@dataclass
class _Maker:
    """Makes the cases of one group; the driver fills in the directories."""

    workload: Workload
    world_size: int = 1
    sides: dict[str, Case] = field(default_factory=dict)

    def add(self, name: str, side: str, **settings) -> _Maker:
        settings = {"workload": self.workload, "world_size": self.world_size, **settings}
        self.sides[name] = Case(side=side, models=Path(), output_dir=Path(), **settings)
        return self

    def add_peak(self) -> _Maker:
        return self.add("matmul", "matmul", world_size=1)


def all_groups(work_dir: Path, quick: bool) -> list[Group]:
    """Every group, in the order in which they run. `work_dir` takes what is offloaded to NVMe."""
    small, large = (1024, 2048) if quick else (8192, 32768)
    groups = [
        _fixed(small, quick),
        _fixed(large, quick),
        _fixed(small, quick, allocator=True),
        _fixed(large, quick, allocator=True),
        _ragged(small, quick, whole=False),
        _ragged(large, quick, whole=True),
        _zero3(small, quick),
        _zero3(large, quick),
        _teacher(small, quick, work_dir),
        _loss(large),
    ]
    return groups


def _fixed(vocabulary: int, quick: bool, allocator: bool = False) -> Group:
    """Completions of 64 tokens, one process. TRL's GKDTrainer by default recomputes activations,
    and then samples without a key-value cache; it is compared with and without, and so are we.
    """
    work = Workload(vocabulary, budget=16 if quick else 64)
    make = _Maker(work).add("gkd_ds", "ours", deepspeed=STAGE_OF_ONE)
    if not allocator:
        make.add("gkd_ds, checkpointing", "ours", deepspeed=STAGE_OF_ONE, checkpointing=True)
        make.add("TRL GKDTrainer, defaults", "trl_gkd", checkpointing=True)
    make.add("TRL GKDTrainer", "trl_gkd").add("TRL DistillationTrainer", "trl_distillation")
    if not allocator:
        make.add("DeepSpeed rollout", "deepspeed_rollout")
    name = f"fixed/{vocabulary}" + ("/allocator" if allocator else "")
    # Updates of a second or so: more of them, since the machine's speed moves by a tenth from one
    # to the next.
    return Group(name, work, make.add_peak().sides, allocator=allocator, runs=15)


def _ragged(vocabulary: int, quick: bool, whole: bool) -> Group:
    """Log-normal completion lengths, batch 32 in micro-batches of 8; `whole`: compare updates, else
    rollouts only.
    """
    work = Workload(vocabulary, rows=8, micro_batches=4, budget=32 if quick else 256, ragged=True)
    make = (
        _Maker(work)
        .add("gkd_ds", "ours", deepspeed=STAGE_OF_ONE)
        .add("transformers generate", "generate")
    )
    if whole:
        make.add("TRL GKDTrainer", "trl_gkd")
    return Group(
        f"ragged/{vocabulary}",
        work,
        make.add_peak().sides,
        parts=("matmul", "transformers generate"),
    )


def _zero3(vocabulary: int, quick: bool) -> Group:
    """Two ranks, each with a micro-batch of 8 at a time, on the same DeepSpeed file."""
    work = Workload(vocabulary, budget=16 if quick else 64)
    make = _Maker(work, world_size=2).add("gkd_ds", "ours", deepspeed=ZERO3)
    make.add("TRL GKDTrainer", "trl_gkd", deepspeed=ZERO3)
    return Group(f"zero3/{vocabulary}", work, make.add_peak().sides)


def _teacher(vocabulary: int, quick: bool, work_dir: Path) -> Group:
    """Where the teacher's weights are, and into how many micro-batches 8 samples are cut."""
    make = _Maker(Workload(vocabulary))
    for place in ("resident", "cpu", "nvme"):
        for micro_batches in (1, 4, 8):
            work = Workload(
                vocabulary, 8 // micro_batches, micro_batches, budget=16 if quick else 64
            )
            zero: dict = {"stage": 3}
            if place != "resident":
                zero["offload_param"] = {"device": place}
            if place == "nvme":
                here = work_dir / f"nvme-{micro_batches}"
                here.mkdir(exist_ok=True)
                zero["offload_param"] |= {
                    "nvme_path": str(here),
                    "buffer_count": "auto",
                    "buffer_size": "auto",
                }
            file = {"zero_optimization": zero}
            name = f"{place}, {micro_batches}"
            make.add(name, "ours", workload=work, deepspeed=STAGE_OF_ONE, teacher_deepspeed=file)
    make.add("bandwidth, cpu", "bandwidth_cpu").add("bandwidth, nvme", "bandwidth_nvme").add_peak()
    return Group(f"teacher/{vocabulary}", work, make.sides, gated=False, runs=15)


def _loss(vocabulary: int) -> Group:
    """The loss alone: memory."""
    work = Workload(vocabulary)
    make = _Maker(work).add("gkd_ds", "loss_ours", options={"loss_memory_mb": 64})
    make.add("dense (TRL GKDTrainer)", "loss_dense").add(
        "chunked (TRL DistillationTrainer)", "loss_chunked"
    )
    return Group(f"loss/{vocabulary}", work, make.sides, gated=False)


# One process needs no partitioning.
STAGE_OF_ONE = {"zero_optimization": {"stage": 0}}

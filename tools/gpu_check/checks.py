"""Every check, in the order in which they run: what is needed most comes first, since the time is
limited, and the hybrid engine, whose kernels may take minutes to compile, last.

Nothing is imported here that takes time: each check runs in a process of its own (one.py).
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Check:
    """`function` is "<module of this package>.<function of a directory>"; `seconds` is the most that
    it may take on a device; `not_on_cpu` says why the CPU accelerator has nothing to check.
    """

    name: str
    function: str
    seconds: int
    about: str
    not_on_cpu: str | None = None


CHECKS = [
    Check(
        "against_cpu",
        "against_cpu.both_precisions",
        120,
        "losses, gradients and greedy tokens beside the CPU's, in fp32 and bf16",
    ),
    Check(
        "collectives",
        "collectives.one_rank",
        45,
        "ZeRO's collectives over the accelerator's own backend (NCCL), one rank",
    ),
    Check(
        "teacher_streaming",
        "memory.teacher_streaming",
        120,
        "a teacher in pinned host memory: the same targets, and how much of its copying overlaps",
        "the weights are in host memory anyway: nothing is copied that could overlap",
    ),
    Check(
        "offload_optimizer_states",
        "memory.offload_optimizer_states",
        60,
        "the optimizer's states leave the device for a rollout, and training is the same",
        "the states are in host memory anyway",
    ),
    Check("fp16", "precision.fp16", 60, "fp16: the loss scale falls until gradients are finite"),
    Check(
        "flash_attention",
        "precision.flash_attention",
        60,
        "flash attention beside torch's own",
        "flash attention has kernels for GPUs only",
    ),
    Check("bench_fixed", "bench.fixed", 130, "the benchmark's group `fixed`, shortened: an update"),
    Check(
        "bench_ragged", "bench.ragged", 130, "the benchmark's group `ragged`, shortened: an update"
    ),
    Check(
        "hybrid_native",
        "rollouts.hybrid_native",
        60,
        "DeepSpeed's hybrid engine where it injects nothing writes what `gather` writes",
    ),
    Check(
        "hybrid_kernels",
        "rollouts.hybrid_kernels",
        200,
        "DeepSpeed's hybrid engine with kernels writes what `gather` writes, or is refused",
    ),
    Check(
        "cuda_graph",
        "rollouts.cuda_graph",
        5,
        "a decode step as a CUDA graph",
        "the CPU has no CUDA graphs",
    ),
]

"""Where DeepSpeed keeps the models and what it is told to do with them: the same losses everywhere."""

from __future__ import annotations

import deepspeed
from deepspeed.comm import comms_logger

from tests.dist.scenarios.common import PARTITIONED, PLACES, RESULTS, build, rows_of, shipped, train
from tests.tiny import MIXTURES


def teacher_places() -> dict:
    return {
        place: train(
            f"teacher-{place}", **PLACES, teacher_deepspeed=shipped(f"teacher_{place}.json")
        )
        for place in ("resident", "cpu")
    }


def scale_features() -> dict:
    """DeepSpeed's switches for large clusters, each beside the same run without it; and mixtures of
    experts.
    """
    profile = {"enabled": True, "profile_step": 1, "output_file": str(RESULTS / "flops.txt")}
    files = {
        "plain": PARTITIONED,
        "shipped": shipped("student_zero3.json"),
        "offload_optimizer": shipped("student_zero3_offload_optimizer.json"),
        "hpz": shipped("student_zeropp.json", zero_hpz_partition_size=2),
        "comms_logger": {**PARTITIONED, "comms_logger": {"enabled": True, "prof_all": True}},
        "flops_profiler": {**PARTITIONED, "flops_profiler": profile},
        "states_on_host": PARTITIONED,
    }
    results = {}
    for name, file in files.items():
        on_host = name == "states_on_host"
        trainer = build(f"scale-{name}", **PLACES, deepspeed=file, offload_optimizer_states=on_host)
        comms_logger.reset_data()
        trainer.train()
        results[name] = {
            "rows": rows_of(f"scale-{name}"),
            "second copies": sum(
                p.ds_secondary_tensor is not None for p in trainer.model.parameters()
            ),
            "optimizer offloaded": bool(trainer.student.engine.optimizer.offload_optimizer),
            "shard": sum(p.ds_tensor.numel() for p in trainer.model.parameters()),
            "bytes moved": trainer.student.counters.optimizer_bytes,
            "recorded": {
                name: sum(calls for calls, *_ in sizes.values())
                for name, sizes in comms_logger.comms_dict.items()
            },
        }
        deepspeed.comm.configure(enabled=False)  # it is one for the whole process
    for family in MIXTURES:
        for engine in ("gather", "sharded"):
            how = {"student": family, "max_steps": 2, "lmbda": 1.0, "rollout_engine": engine}
            results[f"{family}/{engine}"] = train(f"scale-{family}-{engine}", **how)
    return results


def counts() -> dict:
    return {
        n: train(
            f"counts-{n}", per_device_train_batch_size=1, gradient_accumulation_steps=n, lmbda=1.0
        )
        for n in (1, 4, 8)
    }


def precision() -> dict:
    fields = {"lmbda": 0.0, "max_steps": 3, "learning_rate": 1e-3}
    zero_0, zero_2 = ({"zero_optimization": {"stage": stage}} for stage in (0, 2))
    return {
        "fp32": train("fp32", **fields),
        "bf16": train("bf16", bf16=True, **fields),
        "bf16, stage 0": train("bf16-0", bf16=True, deepspeed=zero_0, **fields),
        "bf16, stage 2": train("bf16-2", bf16=True, deepspeed=zero_2, **fields),
    }

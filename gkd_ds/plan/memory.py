"""The memory that a planned run takes on one rank, by phase, in bytes.

"Device" is where the engines compute, which on a CPU run is the host. It is the worst case: every
sequence as long as it may be. What DeepSpeed allocates was read in deepspeed 0.19.8;
tests/dist/test_plan_dist.py compares it with runs.
"""

import math
from dataclasses import dataclass

from gkd_ds.plan.run import MIB, PHASES, ModelCounts, Plan, swapped
from gkd_ds.rollout import kv_cache


@dataclass(frozen=True)
class Memory:
    """One thing that takes memory on a rank, in bytes; `phase` is "always" for what stays."""

    phase: str
    what: str
    device: int = 0
    host: int = 0
    nvme: int = 0
    remedy: str = ""  # what makes it smaller


def count_memory(plan: Plan) -> list[Memory]:
    """Everything that takes memory on one rank, by phase."""
    return [
        *student_states(plan),
        *teacher_states(plan),
        *rollout_memory(plan),
        *score_memory(plan),
        *learn_memory(plan),
    ]


def student_states(plan: Plan) -> list[Memory]:
    """Parameters, gradients and optimizer states of the student's engine."""
    engine, b, n = plan.student_engine, plan.weight_bytes, plan.student.total
    trained = plan.student.trained
    params = math.ceil(n / plan.ranks) if engine.stage == 3 else n
    shard = math.ceil(trained / plan.ranks)
    grads = shard if engine.stage >= 2 else trained
    states = shard if engine.stage >= 1 else trained
    # ZeRO copies fp32 parameters too: it compares their device with a name, which is never equal.
    master = 0 if b == 4 and engine.stage == 0 else 4
    fp32_grad = 4 * (states if engine.optimizer_on == "cpu" else min(states, engine.sub_group))
    offload = 'stage 3 with "offload_optimizer" in the student\'s DeepSpeed file, or more ranks'
    lines = [
        placed(
            "always",
            "student parameters",
            params * b,
            engine.params_on,
            "ZeRO stage 3, or more ranks",
        ),
        placed(
            "always",
            "student gradients",
            grads * b,
            "none" if engine.optimizer_on == "none" else "cpu",
            offload,
        ),
        placed("always", "optimizer states", states * (master + 8), engine.optimizer_on, offload),
    ]
    if engine.stage > 0:
        # A GPU allocates the bucket; on the CPU only the pages that are written become memory.
        bucket = min(engine.bucket, trained) if plan.on_cpu else engine.bucket
        lines.append(
            Memory(
                "always",
                "gradient bucket",
                device=bucket * b,
                remedy="a smaller reduce_bucket_size",
            )
        )
    if engine.hpz > 1:
        second = math.ceil(n / engine.hpz) * b
        lines.append(
            Memory(
                "always",
                "student, second copy (hpZ)",
                device=second,
                remedy="a larger zero_hpz_partition_size",
            )
        )
    if engine.params_on == "nvme":
        buffers = (
            (engine.buffer_count or 5) * (engine.buffer_size or 100_000_000) * b
        )  # DeepSpeed's own numbers
        lines.append(
            Memory("always", "NVMe buffers, parameters", host=buffers, remedy="smaller buffer_size")
        )
    if engine.optimizer_on == "nvme":
        buffers = engine.nvme_optimizer_buffers * min(states, engine.sub_group) * 4
        lines.append(
            Memory(
                "always", "NVMe buffers, optimizer", host=buffers, remedy="a smaller sub_group_size"
            )
        )
        on_nvme = (
            sum(swapped((*plan.student.matrices, plan.student.head), plan.ranks, 4))
            * 4
            // plan.ranks
        )
        lines.append(Memory("always", "gradients in fp32", nvme=on_nvme))
    elif b == 2 or engine.stage > 0:
        # On the host they are kept from one update to the next.
        phase = "update" if engine.optimizer_on == "none" else "always"
        lines.append(placed(phase, "gradients in fp32", fp32_grad, engine.optimizer_on, offload))
    return lines


def teacher_states(plan: Plan) -> list[Memory]:
    if plan.teacher_is_base:
        return []
    engine, b, teacher = plan.teacher_engine, plan.weight_bytes, plan.teacher
    shard = math.ceil((teacher.total - teacher.glue) / plan.ranks) * b
    remedy = '"offload_param" in the teacher\'s DeepSpeed file'
    if engine.params_on == "nvme":
        on_nvme = sum(swapped((*teacher.matrices, teacher.head), plan.ranks, b)) * b // plan.ranks
        parameters = Memory("always", "teacher parameters", host=shard - on_nvme, nvme=on_nvme)
    else:
        parameters = placed("always", "teacher parameters", shard, engine.params_on, remedy)
    lines = [parameters, Memory("always", "teacher norms, whole", device=teacher.glue * b)]
    if engine.params_on == "nvme":
        matrices = len(swapped(teacher.layer_matrices, plan.ranks, b))
        count = engine.buffer_count or 2 * max(1, matrices)  # nvme.py's "auto"
        size = engine.buffer_size or math.ceil(teacher.largest_matrix / plan.ranks)
        remedy = '"auto" for buffer_count and buffer_size, or more ranks'
        lines.append(
            Memory("always", "NVMe buffers, teacher", host=count * size * b, remedy=remedy)
        )
    return lines


def placed(phase: str, what: str, size: int, where: str, remedy: str) -> Memory:
    place = {"none": "device", "cpu": "host", "nvme": "nvme"}[where]
    return Memory(phase, what, remedy=remedy, **{place: size})


def rollout_memory(plan: Plan) -> list[Memory]:
    student, b = plan.student, plan.weight_bytes
    if plan.config.lmbda == 0:
        return []
    rows = plan.rollout_rows
    kv = rows * (plan.longest * student.kv_per_token + student.states_per_row) * b
    # The cache grows by so many positions at a time, beginning at the prompt's end.
    ahead = rows * (-plan.longest_completion % kv_cache.ROOM) * student.kv_per_token * b
    logits = 2 * rows * student.vocabulary * 4
    whole = student.total * b
    lines = [
        Memory("rollout", "KV cache", device=kv, remedy="rollout_memory_mb"),
        Memory("rollout", "KV cache, room ahead", device=ahead, remedy="rollout_memory_mb"),
        Memory("rollout", "next-token logits", device=logits, remedy="rollout_memory_mb"),
    ]
    if (
        plan.config.offload_optimizer_states
    ):  # at stage 0 or 3, in the place of their room among what stays
        moved = 8 * math.ceil(
            student.trained / (plan.ranks if plan.student_engine.stage == 3 else 1)
        )
        lines.append(Memory("rollout", "optimizer states, moved", device=-moved, host=moved))
    if plan.config.rollout_engine == "sharded":
        live = min(
            student.total,
            student.largest_layer + max(student.embedding, plan.student_engine.prefetch),
        )
        lines.append(Memory("rollout", "student layers, gathered", device=live * b))
    elif not plan.is_whole(plan.student_engine):
        lines.append(
            Memory("rollout", "student, gathered", device=whole, remedy="rollout_engine: sharded")
        )
    if student.adapted and plan.config.rollout_engine != "sharded":
        lines.append(Memory("rollout", "adapted matrices, merged", device=student.adapted * b))
    if plan.on_cpu and b == 4 and plan.config.rollout_engine != "sharded":
        copied = (student.layers_total + student.embedding) * b
        lines.append(Memory("rollout", "student, in another layout", device=copied))
    return lines


def score_memory(plan: Plan) -> list[Memory]:
    teacher, b, config = plan.teacher, plan.weight_bytes, plan.config
    tokens = min(plan.rows * plan.longest, plan.pass_tokens)
    if plan.is_whole(plan.teacher_engine):
        layers = 0
    else:
        # What is prefetched is gathered into one buffer, from which each parameter is copied.
        # Nothing is from NVMe.
        ahead = 0 if plan.teacher_engine.params_on == "nvme" else 2 * plan.teacher_engine.prefetch
        live = min(teacher.largest_layer + ahead, 2 * teacher.layers_total)
        layers = max(teacher.embedding, live) * b
    return [
        Memory(
            "score",
            "teacher layers, fetched",
            device=layers,
            remedy="a smaller stage3_prefetch_bucket_size",
        ),
        Memory(
            "score",
            "window between layers",
            device=3 * tokens * teacher.hidden * b,
            remedy="targets_memory_mb",
        ),
        Memory(
            "score",
            "activations in a layer",
            device=min(config.score_memory_mb * MIB, one_layer(teacher, tokens, b)),
            remedy="score_memory_mb",
        ),
        targets(plan, "score"),
    ]


def targets(plan: Plan, phase: str) -> Memory:
    """The teacher's hidden states at completion positions."""
    size = plan.rows * plan.longest_completion * plan.teacher.hidden * plan.weight_bytes
    place = "device" if size <= plan.config.targets_memory_mb * MIB else "host"
    return Memory(phase, "teacher's hidden states", remedy="targets_memory_mb", **{place: size})


def learn_memory(plan: Plan) -> list[Memory]:
    student, teacher, b, config = plan.student, plan.teacher, plan.weight_bytes, plan.config
    tokens = min(plan.learn_tokens, plan.rows * plan.longest)
    one = one_layer(student, tokens, b)
    kept = (
        tokens * student.hidden * b * student.layers
        if config.gradient_checkpointing
        else one * student.layers
    )
    smaller = "learn_tokens_per_micro_batch, or gradient_checkpointing: true"
    chunk = min(config.loss_memory_mb * MIB, 2 * tokens * student.vocabulary * b)
    head = 0 if plan.is_whole(plan.teacher_engine) else teacher.vocabulary * teacher.hidden * b
    is_trained = student.trained == student.total  # else an adapter is, and the head is not
    head_gradient = student.vocabulary * student.hidden * 4 if is_trained else 0
    lines = [
        Memory("learn", "activations", device=kept + one, remedy=smaller),
        Memory("learn", "logits chunk", device=2 * chunk, remedy="loss_memory_mb"),
        Memory("learn", "gradient of the head in fp32", device=head_gradient),
        Memory("learn", "teacher's head, whole", device=head),
        targets(plan, "learn"),
    ]
    if not plan.is_whole(plan.student_engine):
        live = min(
            student.total,
            max(plan.student_engine.max_live, student.largest_layer + student.embedding),
        )
        lines.append(
            Memory(
                "learn",
                "student layers, gathered",
                device=live * b,
                remedy="a smaller stage3_max_live_parameters",
            )
        )
    return lines


def one_layer(model: ModelCounts, tokens: int, b: int) -> int:
    """Bytes of the activations that one decoder layer keeps for its backward, attention without its
    matrix.
    """
    return tokens * (8 * model.hidden + 2 * model.attention_width + 3 * model.intermediate) * b


def peak(lines: list[Memory], place: str) -> tuple[int, str]:
    """The largest sum over phases at `place` (device, host or nvme), and the phase."""
    always = sum(getattr(line, place) for line in lines if line.phase == "always")
    sums = {
        phase: sum(getattr(line, place) for line in lines if line.phase == phase)
        for phase in PHASES
    }
    phase = max(PHASES, key=lambda name: sums[name])
    return always + sums[phase], phase

"""What a run will take, counted from configurations alone: batches, memory, bytes moved and products computed.

    python -m gkd_ds.train --config recipe.yaml --dry_run         # prints this file's counts for one machine
    python tools/plan.py --config recipe.yaml --hostfile hosts    # and times for a whole cluster

No weight is read: models are built on torch's meta device. Bytes are per rank unless said otherwise. "Device" is where
the engines compute, which on a CPU run is the host. Memory is the worst case (every sequence as long as it may
be), work and traffic are the expected ones. What DeepSpeed allocates was read in deepspeed 0.19.8.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
import yaml
from transformers import AutoConfig, AutoModelForCausalLM

from gkd_ds import kernels, kv_cache, zero
from gkd_ds.causal_lm import decoder_layers
from gkd_ds.config import NOT_SUPPORTED, GKDConfig
from gkd_ds.deepspeed_files import is_number
from gkd_ds.errors import InputError
from gkd_ds.scheduler import StepScheduler

MIB, GIB = 2**20, 2**30
PHASES = ("rollout", "score", "learn", "update")
LENGTH_IF_UNBOUNDED = 1024  # tokens of a prompt, where max_length is null


# ---- Models ----


@dataclass(frozen=True)
class ModelCounts:
    """Numbers of elements, not bytes. `layers_total` + `embedding` + `head` + `glue` = `total`."""

    total: int
    layers_total: int  # all decoder layers
    layers_active: int  # of them, what one token passes through (fewer in a mixture of experts)
    largest_layer: int
    embedding: int
    head: int  # 0 where it is tied to the embedding
    glue: int  # norms, position tables
    layers: int
    hidden: int
    intermediate: int
    vocabulary: int
    kv_per_token: int  # keys and values of one token in all layers
    attention_width: int  # heads x head size
    layer_matrices: tuple[int, ...]  # each matrix of one layer
    largest_matrix: int

    @property
    def matrices(self) -> tuple[int, ...]:
        """All but the head's."""
        return self.layer_matrices * self.layers + (self.embedding,)


def count_model(source: str, init_kwargs: dict[str, Any] | None = None, trust_remote_code: bool = False) -> ModelCounts:
    """Count a model from its configuration: a directory, a hub name, or a config.json file.

    Raises:
        InputError: the configuration cannot be read, or is not one of a causal language model.
    """
    known = {key: (init_kwargs or {})[key] for key in ("gguf_file", "revision") if key in (init_kwargs or {})}
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code, **known)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().split("\n")[0].rstrip(".")
        raise InputError(f"The model configuration of '{source}' cannot be used ({reason}); check the path.") from None
    return count_parameters(model)


def count_parameters(model: torch.nn.Module) -> ModelCounts:
    """Count a causal language model of transformers, on any device."""
    text = model.config.get_text_config()
    layers = decoder_layers(model)
    per_layer = [sum(p.numel() for p in layer.parameters()) for layer in layers]
    experts = sum(p.numel() for name, p in layers.named_parameters() if ".experts." in name)
    used = getattr(text, "num_experts_per_tok", None) or 0
    of = getattr(text, "num_local_experts", None) or getattr(text, "num_experts", None) or 0
    idle = round(experts * (1 - used / of)) if used and of else 0
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    total = sum(p.numel() for p in model.parameters())
    untied = 0 if head is embedding else head.numel()
    heads = text.num_attention_heads
    head_size = getattr(text, "head_dim", None) or text.hidden_size // heads
    kv_heads = getattr(text, "num_key_value_heads", None) or heads
    return ModelCounts(
        total=total,
        layers_total=sum(per_layer),
        layers_active=sum(per_layer) - idle,
        largest_layer=max(per_layer),
        embedding=embedding.numel(),
        head=untied,
        glue=total - sum(per_layer) - embedding.numel() - untied,
        layers=len(per_layer),
        hidden=text.hidden_size,
        intermediate=getattr(text, "intermediate_size", None) or 4 * text.hidden_size,
        vocabulary=text.vocab_size,
        kv_per_token=2 * len(per_layer) * kv_heads * head_size,
        attention_width=heads * head_size,
        layer_matrices=max((tuple(p.numel() for p in layer.parameters() if p.dim() > 1) for layer in layers), key=len),
        largest_matrix=max(p.numel() for p in model.parameters()),
    )


# ---- Batches ----


@dataclass(frozen=True)
class Batches:
    """How the data become windows. A window is one update."""

    samples: int
    ranks: int
    per_rank: int  # samples of a window on one rank
    per_window: int
    windows_per_epoch: int
    updates: int


def count_batches(config: GKDConfig, samples: int, ranks: int) -> Batches:
    """Raises InputError when there are no samples."""
    if samples < 1:
        raise InputError(f"The data set '{config.dataset_name}' has no rows; nothing can be trained on it.")
    scheduler = StepScheduler(
        num_samples=samples,
        micro_batch_size=config.per_device_train_batch_size,
        micro_batches=config.gradient_accumulation_steps,
        world_size=ranks,
        seed=config.seed,
        lmbda=config.lmbda,
        seq_kd=config.seq_kd,
        drop_last=config.dataloader_drop_last,
    )
    windows = scheduler.windows_per_epoch
    updates = config.max_steps if config.max_steps > 0 else math.ceil(config.num_train_epochs * windows)
    return Batches(samples, ranks, scheduler.window_samples // ranks, scheduler.window_samples, windows, updates)


# ---- What the DeepSpeed files decide ----


@dataclass(frozen=True)
class Engine:
    """The part of a DeepSpeed file that decides where things are."""

    stage: int
    params_on: str  # none (the device), cpu or nvme
    optimizer_on: str
    bucket: int  # elements of the gradient bucket
    prefetch: int
    max_live: int
    sub_group: int
    buffer_count: int  # pinned buffers for parameters on NVMe; 0: not given
    buffer_size: int  # elements of each; 0: not given
    nvme_optimizer_buffers: int
    max_reuse: int
    hpz: int  # ranks over which ZeRO++ keeps a second copy of the parameters; 1: it does not

    @classmethod
    def of(cls, file: dict | None, hidden: int) -> "Engine":
        """`file` as zero.py resolves it for a model of width `hidden`; None is the built-in one.

        Raises:
            InputError: a size that is no number.
        """
        zero = (file or {"zero_optimization": {"stage": 3}})["zero_optimization"]
        params, optimizer = zero.get("offload_param") or {}, zero.get("offload_optimizer") or {}

        def number(block: dict, key: str, default: int, auto: int | None = None) -> int:
            value = block.get(key, default)
            if value == "auto":
                return default if auto is None else auto
            if not is_number(value):
                raise InputError(f"The DeepSpeed configuration has {key} {value!r}, which is not a number.")
            return int(value)

        return cls(
            stage=zero.get("stage", 0),
            params_on=params.get("device", "none"),
            optimizer_on=optimizer.get("device", "none"),
            bucket=number(zero, "reduce_bucket_size", 500_000_000, auto=hidden * hidden),
            prefetch=number(zero, "stage3_prefetch_bucket_size", 50_000_000, auto=int(0.9 * hidden * hidden)),
            max_live=number(zero, "stage3_max_live_parameters", 1_000_000_000),
            sub_group=number(zero, "sub_group_size", 1_000_000_000),
            buffer_count=number(params, "buffer_count", 0),
            buffer_size=number(params, "buffer_size", 0),
            nvme_optimizer_buffers=number(optimizer, "buffer_count", 4),
            max_reuse=number(zero, "stage3_max_reuse_distance", 1_000_000_000),
            hpz=number(zero, "zero_hpz_partition_size", 1),
        )


@dataclass(frozen=True)
class Plan:
    """A run, reduced to what the counts below need."""

    config: GKDConfig
    student: ModelCounts
    teacher: ModelCounts
    student_engine: Engine
    teacher_engine: Engine
    ranks: int
    weight_bytes: int  # 2 for bf16 and fp16, else 4
    on_cpu: bool = False
    prompt_tokens: int | None = None  # expected; None: as many as max_length leaves
    completion_tokens: int | None = None  # expected; None: max_new_tokens

    # Worst case, for memory.
    @property
    def rows(self) -> int:
        return self.config.per_device_train_batch_size * self.config.gradient_accumulation_steps

    @property
    def longest_completion(self) -> int:
        bound = self.config.max_length
        return self.config.max_new_tokens if bound is None else min(self.config.max_new_tokens, bound - 1)

    @property
    def longest(self) -> int:
        return self.config.max_length or LENGTH_IF_UNBOUNDED + self.longest_completion

    # Expected, for work and traffic.
    @property
    def completion(self) -> int:
        return self.completion_tokens or self.longest_completion

    @property
    def length(self) -> int:
        return self.completion + (self.prompt_tokens or self.longest - self.longest_completion)

    @property
    def student_share(self) -> float:
        """Probability that a window has any on-policy micro-batch, and so a rollout of the student."""
        return 1 - (1 - self.config.lmbda) ** self.config.gradient_accumulation_steps

    def is_whole(self, engine: Engine) -> bool:
        """Whether the engine's weights can be used where they are, without a copy."""
        return engine.stage < 3 or (self.ranks == 1 and (engine.params_on == "none" or self.on_cpu))

    @property
    def rollout_rows(self) -> int:
        """Rows that are decoded at a time."""
        if self.config.rollout_memory_mb is None:
            return self.rows
        per_row = self.longest * self.student.kv_per_token * self.weight_bytes
        return max(1, min(self.rows, self.config.rollout_memory_mb * MIB // per_row))

    @property
    def learn_tokens(self) -> int:
        widest = self.config.per_device_train_batch_size * self.longest
        return self.config.learn_tokens_per_micro_batch or widest

    @property
    def micro_batches(self) -> int:
        return max(1, math.ceil(self.rows * self.length / self.learn_tokens))

    @property
    def pass_tokens(self) -> int:
        """Tokens of the window that one teacher pass may hold."""
        return max(self.longest, self.config.targets_memory_mb * MIB // (self.teacher.hidden * self.weight_bytes))

    @property
    def teacher_passes(self) -> int:
        return max(1, math.ceil(self.rows * self.length / self.pass_tokens))


def make_plan(config: GKDConfig, ranks: int, weight_bytes: int, **known: Any) -> Plan:
    """Read what `config` names: DeepSpeed files and model configurations. `known` are further fields of Plan.

    Raises:
        InputError: one of them is missing or wrong.
    """
    student_file, teacher_file = config.read_deepspeed_files()
    models = {
        "student": (config.model_name_or_path, config.model_init_kwargs),
        "teacher": (config.teacher_model_name_or_path, config.teacher_model_init_kwargs),
    }
    counts = {
        role: count_model(source, init_kwargs, config.trust_remote_code)
        for role, (source, init_kwargs) in models.items()
    }
    engines = {
        "student_engine": Engine.of(student_file, counts["student"].hidden),
        "teacher_engine": Engine.of(teacher_file, counts["teacher"].hidden),
    }
    return Plan(config=config, ranks=ranks, weight_bytes=weight_bytes, **counts, **engines, **known)


# ---- Memory ----


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
    shard = math.ceil(n / plan.ranks)
    params = shard if engine.stage == 3 else n
    grads = shard if engine.stage >= 2 else n
    states = shard if engine.stage >= 1 else n
    # ZeRO copies fp32 parameters too: it compares their device with a name, which is never equal.
    master = 0 if b == 4 and engine.stage == 0 else 4
    fp32_grad = 4 * (states if engine.optimizer_on == "cpu" else min(states, engine.sub_group))
    offload = 'stage 3 with "offload_optimizer" in the student\'s DeepSpeed file, or more ranks'
    lines = [
        placed("always", "student parameters", params * b, engine.params_on, "ZeRO stage 3, or more ranks"),
        placed("always", "student gradients", grads * b, "none" if engine.optimizer_on == "none" else "cpu", offload),
        placed("always", "optimizer states", states * (master + 8), engine.optimizer_on, offload),
    ]
    if engine.stage > 0:
        # A GPU allocates the bucket; on the CPU only the pages that are written become memory.
        bucket = min(engine.bucket, n) if plan.on_cpu else engine.bucket
        lines.append(Memory("always", "gradient bucket", device=bucket * b, remedy="a smaller reduce_bucket_size"))
    if engine.hpz > 1:
        second = math.ceil(n / engine.hpz) * b
        lines.append(
            Memory("always", "student, second copy (hpZ)", device=second, remedy="a larger zero_hpz_partition_size")
        )
    if engine.params_on == "nvme":
        buffers = (engine.buffer_count or 5) * (engine.buffer_size or 100_000_000) * b  # DeepSpeed's own numbers
        lines.append(Memory("always", "NVMe buffers, parameters", host=buffers, remedy="smaller buffer_size"))
    if engine.optimizer_on == "nvme":
        buffers = engine.nvme_optimizer_buffers * min(states, engine.sub_group) * 4
        lines.append(Memory("always", "NVMe buffers, optimizer", host=buffers, remedy="a smaller sub_group_size"))
    if engine.optimizer_on == "nvme":
        on_nvme = sum(swapped((*plan.student.matrices, plan.student.head), plan.ranks, 4)) * 4 // plan.ranks
        lines.append(Memory("always", "gradients in fp32", nvme=on_nvme))
    elif b == 2 or engine.stage > 0:
        # On the host they are kept from one update to the next.
        phase = "update" if engine.optimizer_on == "none" else "always"
        lines.append(placed(phase, "gradients in fp32", fp32_grad, engine.optimizer_on, offload))
    return lines


def teacher_states(plan: Plan) -> list[Memory]:
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
        lines.append(Memory("always", "NVMe buffers, teacher", host=count * size * b, remedy=remedy))
    return lines


def swapped(matrices: Iterable[int], ranks: int, element_size: int) -> list[int]:
    """Those that go to NVMe: DeepSpeed leaves shards below 1 MiB in host memory."""
    return [size for size in matrices if math.ceil(size / ranks) * element_size >= MIB]


def placed(phase: str, what: str, size: int, where: str, remedy: str) -> Memory:
    place = {"none": "device", "cpu": "host", "nvme": "nvme"}[where]
    return Memory(phase, what, remedy=remedy, **{place: size})


def rollout_memory(plan: Plan) -> list[Memory]:
    student, b = plan.student, plan.weight_bytes
    if plan.config.lmbda == 0:
        return []
    rows = plan.rollout_rows
    kv = rows * plan.longest * student.kv_per_token * b
    # The cache grows by so many positions at a time, beginning at the prompt's end.
    ahead = rows * (-plan.longest_completion % kv_cache.ROOM) * student.kv_per_token * b
    logits = 2 * rows * student.vocabulary * 4
    whole = student.total * b
    lines = [
        Memory("rollout", "KV cache", device=kv, remedy="rollout_memory_mb"),
        Memory("rollout", "KV cache, room ahead", device=ahead, remedy="rollout_memory_mb"),
        Memory("rollout", "next-token logits", device=logits, remedy="rollout_memory_mb"),
    ]
    if plan.config.offload_optimizer_states:  # at stage 0 or 3, in the place of their room among what stays
        moved = 8 * math.ceil(student.total / (plan.ranks if plan.student_engine.stage == 3 else 1))
        lines.append(Memory("rollout", "optimizer states, moved", device=-moved, host=moved))
    if plan.config.rollout_engine == "sharded":
        live = min(student.total, student.largest_layer + max(student.embedding, plan.student_engine.prefetch))
        lines.append(Memory("rollout", "student layers, gathered", device=live * b))
    elif not plan.is_whole(plan.student_engine):
        lines.append(Memory("rollout", "student, gathered", device=whole, remedy="rollout_engine: sharded"))
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
        # What is prefetched is gathered into one buffer, from which each parameter is copied. Nothing is from NVMe.
        ahead = 0 if plan.teacher_engine.params_on == "nvme" else 2 * plan.teacher_engine.prefetch
        live = min(teacher.largest_layer + ahead, 2 * teacher.layers_total)
        layers = max(teacher.embedding, live) * b
    return [
        Memory("score", "teacher layers, fetched", device=layers, remedy="a smaller stage3_prefetch_bucket_size"),
        Memory("score", "window between layers", device=3 * tokens * teacher.hidden * b, remedy="targets_memory_mb"),
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
    kept = tokens * student.hidden * b * student.layers if config.gradient_checkpointing else one * student.layers
    smaller = "learn_tokens_per_micro_batch, or gradient_checkpointing: true"
    chunk = min(config.loss_memory_mb * MIB, 2 * tokens * student.vocabulary * b)
    head = 0 if plan.is_whole(plan.teacher_engine) else teacher.vocabulary * teacher.hidden * b
    head_gradient = student.vocabulary * student.hidden * 4
    lines = [
        Memory("learn", "activations", device=kept + one, remedy=smaller),
        Memory("learn", "logits chunk", device=2 * chunk, remedy="loss_memory_mb"),
        Memory("learn", "gradient of the head in fp32", device=head_gradient),
        Memory("learn", "teacher's head, whole", device=head),
        targets(plan, "learn"),
    ]
    if not plan.is_whole(plan.student_engine):
        live = min(student.total, max(plan.student_engine.max_live, student.largest_layer + student.embedding))
        lines.append(
            Memory("learn", "student layers, gathered", device=live * b, remedy="a smaller stage3_max_live_parameters")
        )
    return lines


def one_layer(model: ModelCounts, tokens: int, b: int) -> int:
    """Bytes of the activations that one decoder layer keeps for its backward, attention without its matrix."""
    return tokens * (8 * model.hidden + 2 * model.attention_width + 3 * model.intermediate) * b


def peak(lines: list[Memory], place: str) -> tuple[int, str]:
    """The largest sum over phases at `place` (device, host or nvme), and the phase."""
    always = sum(getattr(line, place) for line in lines if line.phase == "always")
    sums = {phase: sum(getattr(line, place) for line in lines if line.phase == phase) for phase in PHASES}
    phase = max(PHASES, key=lambda name: sums[name])
    return always + sums[phase], phase


# ---- Work and traffic of one update ----


@dataclass(frozen=True)
class Work:
    """What a phase does on one rank in one update (expected values).

    Attributes:
        flops: multiplications and additions.
        prefill: those before them, in a rollout: of reading the prompts, which is over when decoding begins.
        memory: bytes read from the device's own memory, where that and not `flops` may decide (decoding).
        links: bytes over "ranks" (all-gather, reduce-scatter: what this rank receives), "pcie" and "nvme".
    """

    flops: float = 0.0
    prefill: float = 0.0
    memory: float = 0.0
    links: dict[str, float] = field(default_factory=dict)


def count_work(plan: Plan) -> dict[str, Work]:
    """Work by phase."""
    return {
        "rollout": rollout_work(plan),
        "score": score_work(plan),
        "learn": learn_work(plan),
        "update": update_work(plan),
    }


def forward_flops(model: ModelCounts, tokens: float, context: float) -> float:
    """Decoder layers only: weights and attention over `context` earlier tokens."""
    return tokens * (2 * model.layers_active + 4 * model.layers * model.attention_width * context)


def from_others(elements: float, plan: Plan) -> float:
    """Bytes that a rank receives when `elements` partitioned weights are gathered."""
    return elements * plan.weight_bytes * (plan.ranks - 1) / plan.ranks


def fetch(engine: Engine, elements: float, matrices: Iterable[int], plan: Plan) -> dict[str, float]:
    """Traffic of one pass over `elements` partitioned weights, `matrices` among them: each rank fetches its share, then
    all gather."""
    links = {"ranks": from_others(elements, plan)}
    share = elements * plan.weight_bytes / plan.ranks
    if engine.params_on != "none" and not plan.on_cpu:
        links["pcie"] = share
    if engine.params_on == "nvme":
        on_nvme = sum(swapped(matrices, plan.ranks, plan.weight_bytes))
        links["nvme"] = on_nvme * plan.weight_bytes / plan.ranks
    return links


def rollout_work(plan: Plan) -> Work:
    student, config = plan.student, plan.config
    rows = config.lmbda * plan.rows
    work = generation(student, rows, plan)
    if plan.student_engine.stage == 3:
        steps = plan.completion * math.ceil(rows / plan.rollout_rows) if config.rollout_engine == "sharded" else 1
        whole = fetch(plan.student_engine, student.total, (*student.matrices, student.head), plan)
        add_links(work, whole, steps * plan.student_share)
    if config.seq_kd and config.lmbda < 1:
        by_teacher = generation(plan.teacher, plan.rows - rows, plan)
        work = Work(
            flops=work.flops + by_teacher.flops,
            prefill=work.prefill + by_teacher.prefill,
            memory=work.memory + by_teacher.memory,
            links=work.links,
        )
        teacher = plan.teacher
        whole = fetch(plan.teacher_engine, teacher.total - teacher.glue, (*teacher.matrices, teacher.head), plan)
        add_links(work, whole, plan.completion)
    return work


def generation(model: ModelCounts, rows: float, plan: Plan) -> Work:
    """Completing the prompts of `rows` rows with whole weights."""
    prompt = plan.length - plan.completion
    layers = forward_flops(model, rows * plan.completion, prompt + plan.completion / 2)
    return Work(
        flops=layers + 2 * rows * plan.completion * model.vocabulary * model.hidden,
        prefill=forward_flops(model, rows * prompt, prompt / 2),
        memory=decode_bytes(model, rows, plan),
    )


def decode_bytes(model: ModelCounts, rows: float, plan: Plan) -> float:
    """Memory reads of decoding `rows` completions: all weights once per step, the cache of every row."""
    batches = math.ceil(rows / plan.rollout_rows)
    weights = batches * plan.completion * (model.layers_total + model.vocabulary * model.hidden) * plan.weight_bytes
    cache = rows * plan.completion * (plan.length - plan.completion / 2) * model.kv_per_token * plan.weight_bytes
    return weights + cache


def score_work(plan: Plan) -> Work:
    teacher = plan.teacher
    work = Work(flops=forward_flops(teacher, plan.rows * plan.length, plan.length / 2))
    add_links(work, teacher_pass(plan), plan.teacher_passes)
    return work


def teacher_pass(plan: Plan) -> dict[str, float]:
    """Traffic of one pass over the teacher that scores: everything but its head."""
    teacher = plan.teacher
    return fetch(plan.teacher_engine, teacher.layers_total + teacher.embedding, teacher.matrices, plan)


def learn_work(plan: Plan) -> Work:
    student, teacher = plan.student, plan.teacher
    tokens, completions = plan.rows * plan.length, plan.rows * plan.completion
    times = 4 if plan.config.gradient_checkpointing else 3  # forward, again, and twice for the backward
    heads = completions * (6 * student.vocabulary * student.hidden + 2 * teacher.vocabulary * teacher.hidden)
    work = Work(flops=times * forward_flops(student, tokens, plan.length / 2) + heads)
    teacher_head = teacher.head or teacher.embedding
    add_links(work, fetch(plan.teacher_engine, teacher_head, (teacher_head,), plan), 1)
    gradient = {"ranks": from_others(student.total, plan)}
    if plan.student_engine.stage == 3:
        # A layer stays gathered from its recomputation to its backward. What the backward needs within max_reuse
        # elements of its use in the forward (both count) stays gathered from there on: small models altogether.
        # After a rollout the first micro-batch only records what is used when, and keeps nothing.
        again = max(0.0, 1 - plan.student_engine.max_reuse / 2 / student.total)
        whole = fetch(plan.student_engine, student.total, (*student.matrices, student.head), plan)
        add_links(work, whole, plan.micro_batches * (1 + again) + plan.student_share * (1 - again))
        add_links(work, gradient, plan.micro_batches)
    else:
        add_links(work, gradient, 2)  # one all-reduce, or reduce-scatter and all-gather of the new weights
    if plan.student_engine.optimizer_on != "none" and not plan.on_cpu:
        add_links(work, {"pcie": student.total / plan.ranks * plan.weight_bytes}, plan.micro_batches)
    return work


def update_work(plan: Plan) -> Work:
    share = plan.student.total / (plan.ranks if plan.student_engine.stage else 1)
    where = plan.student_engine.optimizer_on
    states = share * (12 + 12 + plan.weight_bytes)  # read and write fp32 weights and moments, write the weights
    if where == "none" or plan.on_cpu:
        return Work(memory=states)
    work = Work()
    add_links(work, {"host": states, "pcie": share * plan.weight_bytes}, 1)
    if where == "nvme":
        add_links(work, {"nvme": share * 24}, 1)
    return work


def add_links(work: Work, links: dict[str, float], times: float) -> None:
    for link, size in links.items():
        work.links[link] = work.links.get(link, 0.0) + size * times


# ---- The report of --dry_run ----


def dry_run_report(config: GKDConfig, num_samples: int) -> str:
    """The resolved configuration (itself a recipe), the batch arithmetic and the memory estimate, as text.

    Raises:
        InputError: an empty data set, or a model configuration that cannot be read.
    """
    on_cpu = kernels.on_cpu()
    half = zero.precision(config) != torch.float32
    batches = count_batches(config, num_samples, config.world_size)
    plan = make_plan(config, config.world_size, weight_bytes=2 if half else 4, on_cpu=on_cpu)
    settings = {name: value for name, value in config.to_dict().items() if name not in NOT_SUPPORTED}
    return "\n".join(
        [
            "# Resolved configuration",
            yaml.safe_dump(settings, sort_keys=False).rstrip(),
            "",
            "# Batches",
            batch_table(config, batches),
            "",
            f"# Memory of one of {plan.ranks} ranks, {'fp32' if plan.weight_bytes == 4 else '16 bit'}, at "
            "its longest sequences" + (" (no GPU here: the device is the host)" if on_cpu else ""),
            model_line("student", plan.student),
            model_line("teacher", plan.teacher),
            memory_table(count_memory(plan)),
        ]
    )


def batch_table(config: GKDConfig, batches: Batches) -> str:
    factors = f"{config.per_device_train_batch_size} x {config.gradient_accumulation_steps} x {batches.ranks} ranks"
    return "\n".join(
        [
            f"samples            {batches.samples}",
            f"samples per window {batches.per_window} ({factors})",
            f"windows per epoch  {batches.windows_per_epoch}",
            f"updates            {batches.updates}",
            f"on-policy share    {config.lmbda:g} of the micro-batches",
        ]
    )


def model_line(role: str, counts: ModelCounts) -> str:
    return (
        f"{role}: {counts.total / 1e6:,.1f} M parameters, {counts.layers} layers, {counts.vocabulary} vocabulary rows"
    )


def memory_table(lines: list[Memory]) -> str:
    """MiB by phase, with the peak of each place."""
    rows = [f"{'':8} {'MiB':30} {'device':>11} {'host':>11} {'NVMe':>11}"]
    for phase in ("always", *PHASES):
        for line in (line for line in lines if line.phase == phase):
            sizes = " ".join(
                f"{size / MIB:11,.1f}" if size else f"{'-':>11}" for size in (line.device, line.host, line.nvme)
            )
            rows.append(f"{phase:8} {line.what:30} {sizes}")
    peaks = [peak(lines, place) for place in ("device", "host", "nvme")]
    rows.append(f"{'peak':8} {'(in ' + peaks[0][1] + ')':30} " + " ".join(f"{size / MIB:11,.1f}" for size, _ in peaks))
    return "\n".join(rows)

"""What a planned run computes and moves in one update: expected values of one rank, in operations
and bytes.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

from gkd_ds.plan.run import Engine, ModelCounts, Plan, swapped


@dataclass(frozen=True)
class ExpectedPlan(Plan):
    """A plan, and the lengths of sequences that are expected instead of the longest."""

    prompt_tokens: int | None = None  # None: as many as max_length leaves
    completion_tokens: int | None = None  # None: as many as may be generated

    @classmethod
    def of(
        cls, plan: Plan, prompt_tokens: int | None = None, completion_tokens: int | None = None
    ) -> "ExpectedPlan":
        return cls(**vars(plan), prompt_tokens=prompt_tokens, completion_tokens=completion_tokens)

    @property
    def completion(self) -> int:
        return self.completion_tokens or self.longest_completion

    @property
    def length(self) -> int:
        return self.completion + (self.prompt_tokens or self.longest - self.longest_completion)

    @property
    def student_share(self) -> float:
        """Probability that a window has any on-policy micro-batch, and so a rollout of the
        student.
        """
        return 1 - (1 - self.config.lmbda) ** self.config.gradient_accumulation_steps

    @property
    def micro_batches(self) -> int:
        return max(1, math.ceil(self.rows * self.length / self.learn_tokens))

    @property
    def teacher_passes(self) -> int:
        return max(1, math.ceil(self.rows * self.length / self.pass_tokens))


@dataclass(frozen=True)
class Work:
    """What a phase does on one rank in one update (expected values).

    Attributes:
        flops: multiplications and additions.
        prefill: in a rollout, those of reading the prompts, which ends before decoding begins.
        memory: bytes read from the device's own memory, where they may decide instead of `flops`
            (decoding).
        links: bytes over "ranks" (all-gather, reduce-scatter: what this rank receives), "pcie" and
            "nvme".
    """

    flops: float = 0.0
    prefill: float = 0.0
    memory: float = 0.0
    links: dict[str, float] = field(default_factory=dict)


def count_work(plan: ExpectedPlan) -> dict[str, Work]:
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


def from_others(elements: float, plan: ExpectedPlan) -> float:
    """Bytes that a rank receives when `elements` partitioned weights are gathered."""
    return elements * plan.weight_bytes * (plan.ranks - 1) / plan.ranks


def fetch(
    engine: Engine, elements: float, matrices: Iterable[int], plan: ExpectedPlan
) -> dict[str, float]:
    """Traffic of one pass over `elements` partitioned weights, `matrices` among them: each rank
    fetches its share, then all gather.
    """
    links = {"ranks": from_others(elements, plan)}
    share = elements * plan.weight_bytes / plan.ranks
    if engine.params_on != "none" and not plan.on_cpu:
        links["pcie"] = share
    if engine.params_on == "nvme":
        on_nvme = sum(swapped(matrices, plan.ranks, plan.weight_bytes))
        links["nvme"] = on_nvme * plan.weight_bytes / plan.ranks
    return links


def rollout_work(plan: ExpectedPlan) -> Work:
    student, config = plan.student, plan.config
    rows = config.lmbda * plan.rows
    work = generation(student, rows, plan)
    if plan.student_engine.stage == 3:
        steps = (
            plan.completion * math.ceil(rows / plan.rollout_rows)
            if config.rollout_engine == "sharded"
            else 1
        )
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
        whole = fetch(
            plan.teacher_engine,
            teacher.total - teacher.glue,
            (*teacher.matrices, teacher.head),
            plan,
        )
        add_links(work, whole, plan.completion)
    return work


def generation(model: ModelCounts, rows: float, plan: ExpectedPlan) -> Work:
    """Completing the prompts of `rows` rows with whole weights."""
    prompt = plan.length - plan.completion
    layers = forward_flops(model, rows * plan.completion, prompt + plan.completion / 2)
    return Work(
        flops=layers + 2 * rows * plan.completion * model.vocabulary * model.hidden,
        prefill=forward_flops(model, rows * prompt, prompt / 2),
        memory=decode_bytes(model, rows, plan),
    )


def decode_bytes(model: ModelCounts, rows: float, plan: ExpectedPlan) -> float:
    """Memory reads of decoding `rows` completions: all weights once per step, the cache of every
    row.
    """
    batches = math.ceil(rows / plan.rollout_rows)
    weights = (
        batches
        * plan.completion
        * (model.layers_total + model.vocabulary * model.hidden)
        * plan.weight_bytes
    )
    cache = (
        rows
        * plan.completion
        * (plan.length - plan.completion / 2)
        * model.kv_per_token
        * plan.weight_bytes
    )
    return weights + cache


def score_work(plan: ExpectedPlan) -> Work:
    teacher = plan.teacher
    work = Work(flops=forward_flops(teacher, plan.rows * plan.length, plan.length / 2))
    add_links(work, teacher_pass(plan), plan.teacher_passes)
    return work


def teacher_pass(plan: ExpectedPlan) -> dict[str, float]:
    """Traffic of one pass over the teacher that scores: everything but its head."""
    teacher = plan.teacher
    return fetch(
        plan.teacher_engine, teacher.layers_total + teacher.embedding, teacher.matrices, plan
    )


def learn_work(plan: ExpectedPlan) -> Work:
    student, teacher = plan.student, plan.teacher
    tokens, completions = plan.rows * plan.length, plan.rows * plan.completion
    times = (
        4 if plan.config.gradient_checkpointing else 3
    )  # forward, again, and twice for the backward
    heads = completions * (
        6 * student.vocabulary * student.hidden + 2 * teacher.vocabulary * teacher.hidden
    )
    work = Work(flops=times * forward_flops(student, tokens, plan.length / 2) + heads)
    teacher_head = teacher.head or teacher.embedding
    add_links(work, fetch(plan.teacher_engine, teacher_head, (teacher_head,), plan), 1)
    gradient = {"ranks": from_others(student.trained, plan)}
    if plan.student_engine.stage == 3:
        # A layer stays gathered from its recomputation to its backward. What the backward needs
        # within max_reuse elements of its use in the forward (both count) stays gathered from there
        # on: small models altogether. After a rollout the first micro-batch only records what is
        # used when, and keeps nothing.
        again = max(0.0, 1 - plan.student_engine.max_reuse / 2 / student.total)
        whole = fetch(plan.student_engine, student.total, (*student.matrices, student.head), plan)
        add_links(work, whole, plan.micro_batches * (1 + again) + plan.student_share * (1 - again))
        add_links(work, gradient, plan.micro_batches)
    else:
        add_links(
            work, gradient, 2
        )  # one all-reduce, or reduce-scatter and all-gather of the new weights
    if plan.student_engine.optimizer_on != "none" and not plan.on_cpu:
        add_links(
            work, {"pcie": student.trained / plan.ranks * plan.weight_bytes}, plan.micro_batches
        )
    return work


def update_work(plan: ExpectedPlan) -> Work:
    share = plan.student.trained / (plan.ranks if plan.student_engine.stage else 1)
    where = plan.student_engine.optimizer_on
    states = share * (
        12 + 12 + plan.weight_bytes
    )  # read and write fp32 weights and moments, write the weights
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

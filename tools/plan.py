#!/usr/bin/env python3
"""Predicts memory, traffic and time of a run on a cluster, from configurations alone, before the
job queues.

    python tools/plan.py --config recipe.yaml --hostfile hosts    # nodes and GPUs of a hostfile
    python tools/plan.py --config recipe.yaml --nodes 8 --gpus 8 --nvme_gb_per_s 12
    python tools/plan.py --table > tools/plan_70b_8b.md           # 70B -> 8B on 1 to 512 GPUs

Every GKDConfig field is a flag too (--gradient_accumulation_steps 16). The counts are those of
gkd_ds/plan/memory.py and tools/plan_work.py; the times are a roofline over the bandwidths below: an
orientation, no promise. Exit code 0: it fits; 1: it does not, with what to change; 2: wrong input.
No dataset is needed, and no weight is read.
"""

import argparse
import dataclasses
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from gkd_ds.config.config import GKDConfig  # noqa: E402
from gkd_ds.config.recipe import read_flags, read_recipe  # noqa: E402
from gkd_ds.plan.dry_run import memory_table, model_line  # noqa: E402
from gkd_ds.plan.memory import Memory, count_memory, peak  # noqa: E402
from gkd_ds.plan.run import MIB, PHASES, Engine, count_model, make_plan  # noqa: E402
from gkd_ds.runtime.errors import InputError  # noqa: E402
from tools.plan_work import (  # noqa: E402
    ExpectedPlan,
    Work,
    count_work,
    forward_flops,
    teacher_pass,
)

GB = 10**9
MODELS = Path(__file__).with_name("plan_models")
# Below this share a GPU's or a host's memory is safe from fragments and from what is not counted.
USABLE = 0.9
HPZ_IS_NOT_TIMED = "zero_hpz_partition_size: its second copy of the parameters is counted above; that it spares the network is not."


@dataclass(frozen=True)
class Cluster:
    """The hardware. Bandwidths in GB/s (10^9 bytes), of one GPU unless said otherwise. The defaults
    are an A100's.
    """

    nodes: int = 1
    gpus: int = 8  # per node
    gpu_memory_gb: float = 80.0
    host_memory_gb: float = 1000.0  # per node
    nvme_gb: float = 7000.0  # per node
    tflops: float = 312.0  # peak of one GPU at the run's precision
    efficiency: float = 0.4  # share of the peak that training and scoring reach
    hbm_gb_per_s: float = 2000.0  # the GPU's own memory
    pcie_gb_per_s: float = 25.0
    gpu_link_gb_per_s: float = 250.0  # between GPUs of a node
    network_gb_per_s: float = 25.0  # of one node
    nvme_gb_per_s: float = 6.0  # of one node
    host_gb_per_s: float = 200.0  # of one node's memory, for an optimizer on the CPU

    @property
    def ranks(self) -> int:
        return self.nodes * self.gpus

    @property
    def flops(self) -> float:
        return self.tflops * 1e12 * self.efficiency


# ---- Time ----


def link_seconds(links: dict[str, float], cluster: Cluster) -> dict[str, float]:
    """Seconds per link for one rank's traffic, with all ranks of a node at work."""
    seconds = {}
    for link, size in links.items():
        if link == "ranks":
            seconds["GPU links"] = size / (cluster.gpu_link_gb_per_s * GB)
            if cluster.nodes > 1:
                # A ring brings every byte of the gathered tensor into a node once.
                gathered = size * cluster.ranks / (cluster.ranks - 1)
                inbound = gathered * (cluster.nodes - 1) / cluster.nodes
                seconds["network"] = inbound / (cluster.network_gb_per_s * GB)
        elif link == "pcie":
            seconds["PCIe"] = size / (cluster.pcie_gb_per_s * GB)
        elif link == "nvme":
            seconds["NVMe"] = size * cluster.gpus / (cluster.nvme_gb_per_s * GB)
        elif link == "host":
            seconds["host memory"] = size * cluster.gpus / (cluster.host_gb_per_s * GB)
    return {name: value for name, value in seconds.items() if value > 0}


def phase_seconds(phase: str, work: Work, cluster: Cluster) -> tuple[float, str]:
    """Seconds of a phase, and what bounds it.

    In score and learn the next layer is fetched while this one computes, so the slowest part
    decides. A rollout gathers, reads the prompts (bound by computing) and decodes then (bound by
    memory); an update moves gradients, computes and moves weights: one after the other.
    """
    links = link_seconds(work.links, cluster)
    memory, compute = work.memory / (cluster.hbm_gb_per_s * GB), work.flops / cluster.flops
    prefill = work.prefill / cluster.flops
    parts = {**links, "GPU memory": memory, "compute": prefill + compute}
    bound = max(parts, key=lambda name: parts[name])
    if phase in ("score", "learn"):
        return parts[bound], bound
    return sum(links.values()) + prefill + max(memory, compute), bound


@dataclass(frozen=True)
class Crossover:
    """From how many tokens per rank and pass on the teacher's weights stream unseen behind the
    computing.
    """

    stream_seconds: float
    tokens: int
    window_tokens: int  # this plan's, per pass

    @property
    def hidden(self) -> bool:
        return self.window_tokens >= self.tokens


def crossover(plan: ExpectedPlan, cluster: Cluster) -> Crossover:
    stream = max(link_seconds(teacher_pass(plan), cluster).values(), default=0.0)
    per_token = forward_flops(plan.teacher, 1, plan.length / 2)
    window = plan.rows * plan.length // plan.teacher_passes
    return Crossover(stream, math.ceil(stream * cluster.flops / per_token), window)


# ---- Fit ----


@dataclass(frozen=True)
class Fit:
    """One kind of memory: what the busiest phase takes, and what there is, in bytes of one rank
    (device) or node.
    """

    place: str
    needed: int
    there: float
    phase: str
    advice: list[str]

    @property
    def fits(self) -> bool:
        return self.needed <= self.there


def check_fit(memory: list[Memory], cluster: Cluster) -> list[Fit]:
    room = {
        "device": (cluster.gpu_memory_gb * GB * USABLE, 1),
        "host": (cluster.host_memory_gb * GB * USABLE, cluster.gpus),
        "nvme": (cluster.nvme_gb * GB, cluster.gpus),
    }
    fits = []
    for place, (there, sharing) in room.items():
        size, phase = peak(memory, place)
        fits.append(Fit(place, size * sharing, there, phase, advise(memory, place, phase)))
    return fits


def advise(memory: list[Memory], place: str, phase: str) -> list[str]:
    """What takes most in the busiest phase and can be made smaller, the largest first."""
    busy = [
        line
        for line in memory
        if line.phase in ("always", phase) and line.remedy and getattr(line, place)
    ]
    busy.sort(key=lambda line: -getattr(line, place))
    return [
        f"{line.what} takes {getattr(line, place) / GB:.1f} GB a rank; it shrinks with "
        f"{line.remedy}"
        for line in busy[:3]
    ]


# ---- Report ----


def report(plan: ExpectedPlan, cluster: Cluster) -> str:
    memory, work = count_memory(plan), count_work(plan)
    lines = [
        f"# Prediction for {cluster.nodes} node(s) with {cluster.gpus} GPU(s) each",
        model_line("student", plan.student),
        model_line("teacher", plan.teacher),
        f"window: {plan.rows * plan.ranks} samples, {plan.rows} on each rank, of {plan.length} "
        "tokens "
        f"({plan.completion} of them completion)",
        "",
        "# Memory of one rank",
        memory_table(memory),
        "",
        *fit_lines(check_fit(memory, cluster)),
        "",
        "# One update on one rank",
        *time_lines(work, cluster),
        "",
        *crossover_lines(plan, cluster),
        *([HPZ_IS_NOT_TIMED] if plan.student_engine.hpz > 1 else []),
    ]
    return "\n".join(lines)


def fit_lines(fits: list[Fit]) -> list[str]:
    lines = []
    for fit in fits:
        verdict = "fits" if fit.fits else "DOES NOT FIT"
        whose = "a GPU" if fit.place == "device" else "a node"
        usage = f"{fit.needed / GB:,.1f} GB of {fit.there / GB:,.1f} GB usable on {whose} (in {fit.phase})"
        lines.append(f"{fit.place:6} {verdict}: {usage}")
        if not fit.fits:
            lines += [f"       {advice}" for advice in fit.advice]
    return lines


def time_lines(work: dict[str, Work], cluster: Cluster) -> list[str]:
    lines = [
        f"{'phase':8} {'seconds':>9} {'TFLOP':>10} {'ranks GB':>9} {'PCIe GB':>9} {'NVMe GB':>9}  "
        "bound by"
    ]
    total, longest = 0.0, ("", 0.0, "")
    for phase in PHASES:
        seconds, bound = phase_seconds(phase, work[phase], cluster)
        moved = " ".join(
            f"{work[phase].links.get(link, 0) / GB:9.1f}" for link in ("ranks", "pcie", "nvme")
        )
        flops = work[phase].prefill + work[phase].flops
        lines.append(f"{phase:8} {seconds:9.2f} {flops / 1e12:10.1f} {moved}  {bound}")
        total += seconds
        if seconds > longest[1]:
            longest = (phase, seconds, bound)
    lines.append(
        f"{'window':8} {total:9.2f} s altogether; bottleneck: {longest[0]}, bound by {longest[2]}"
    )
    return lines


def crossover_lines(plan: ExpectedPlan, cluster: Cluster) -> list[str]:
    cross = crossover(plan, cluster)
    samples = math.ceil(cross.tokens / plan.length)
    lines = [
        f"Streaming the teacher takes {cross.stream_seconds:.2f} s a pass and is hidden behind "
        "computing from "
        f"{cross.tokens:,} tokens ({samples} samples) per rank on; this window has "
        f"{cross.window_tokens:,} per pass: " + ("hidden." if cross.hidden else "not hidden.")
    ]
    if not cross.hidden:
        lines.append(f"It would be hidden with {' and '.join(what_hides(plan, cross))}.")
    return lines


def what_hides(plan: ExpectedPlan, cross: Crossover) -> list[str]:
    """The fields that put enough tokens into one pass: the window must have them, and the pass must
    hold them.
    """
    per_step = plan.config.per_device_train_batch_size * plan.length
    steps = max(plan.config.gradient_accumulation_steps, math.ceil(cross.tokens / per_step))
    room = math.ceil(steps * per_step * plan.teacher.hidden * plan.weight_bytes / MIB)
    fields = {
        "gradient_accumulation_steps": steps,
        "targets_memory_mb": max(plan.config.targets_memory_mb, room),
    }
    return [
        f"{name}: {value}" for name, value in fields.items() if value > getattr(plan.config, name)
    ]


# ---- 70B -> 8B ----

PLACEMENTS = {"none": "GPU", "cpu": "CPU", "nvme": "NVMe"}


def table() -> str:
    """The same window of 1,024 samples on 1 to 512 GPUs, with the fastest placement that fits."""
    student, teacher = (
        count_model(str(MODELS / "llama_8b.json")),
        count_model(str(MODELS / "llama_70b.json")),
    )
    rows = []
    for gpus in (1, 8, 64, 512):
        cluster = Cluster(nodes=max(1, gpus // 8), gpus=min(gpus, 8))
        rows.append(table_row(list(placements(student, teacher, gpus)), cluster))
    described = ", ".join(
        f"{field.name} {getattr(Cluster(), field.name):g}" for field in fields(Cluster)[2:]
    )
    heads = [
        "GPUs",
        "teacher on",
        "optimizer on",
        "samples per rank",
        "GPU GB",
        "host GB per node",
        "rollout s",
        "score s",
        "learn s",
        "update s",
        "window s",
        "bottleneck",
        "teacher hidden from (tokens per rank and pass)",
    ]
    return "\n".join(
        [
            "# 70B → 8B: a prediction",
            "",
            "**Predicted, not measured**, by `python tools/plan.py --table`: windows of 1,024 "
            "samples of 1,024 + 512 "
            "tokens, λ = 1, bf16, gradient checkpointing, Llama shapes (`tools/plan_models/`); the "
            "fastest placement "
            "that fits. Nodes have 8 GPUs, except the first row's one.",
            "",
            f"Hardware: {described}.",
            "",
            "| " + " | ".join(heads) + " |",
            "|" + " ---: |" * len(heads),
            *rows,
            "",
        ]
    )


def placements(student, teacher, gpus: int) -> Iterator[ExpectedPlan]:
    """The ways to place the teacher and the student's optimizer."""
    per_rank = 1024 // gpus
    micro = min(8, per_rank)
    config = GKDConfig(
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=per_rank // micro,
        max_length=1536,
        max_new_tokens=512,
        lmbda=1.0,
        bf16=True,
        rollout_memory_mb=16384,
        targets_memory_mb=4096,
    )
    for teacher_on in PLACEMENTS:
        for optimizer_on in PLACEMENTS:
            zero = {"stage": 3, "reduce_bucket_size": 50_000_000}
            yield ExpectedPlan(
                config=config,
                student=student,
                teacher=teacher,
                student_engine=Engine.of(
                    {"zero_optimization": zero | {"offload_optimizer": {"device": optimizer_on}}},
                    student.hidden,
                ),
                teacher_engine=Engine.of(
                    {"zero_optimization": zero | {"offload_param": {"device": teacher_on}}},
                    teacher.hidden,
                ),
                ranks=gpus,
                weight_bytes=2,
            )


def table_row(plans: list[ExpectedPlan], cluster: Cluster) -> str:
    def times(plan: ExpectedPlan) -> dict[str, tuple[float, str]]:
        return {
            phase: phase_seconds(phase, work, cluster) for phase, work in count_work(plan).items()
        }

    fitting = [
        plan for plan in plans if all(fit.fits for fit in check_fit(count_memory(plan), cluster))
    ]
    if not fitting:
        return f"| {cluster.ranks} | does not fit |" + " |" * 11
    plan = min(fitting, key=lambda plan: sum(seconds for seconds, _ in times(plan).values()))
    device, host, _ = check_fit(count_memory(plan), cluster)
    seconds = times(plan)
    slowest = max(seconds, key=lambda phase: seconds[phase][0])
    cells = [
        cluster.ranks,
        PLACEMENTS[plan.teacher_engine.params_on],
        PLACEMENTS[plan.student_engine.optimizer_on],
        plan.rows,
        f"{device.needed / GB:.0f}",
        f"{host.needed / GB:.0f}",
        *(f"{seconds[phase][0]:.1f}" for phase in PHASES),
        f"{sum(value for value, _ in seconds.values()):.1f}",
        f"{slowest}, {seconds[slowest][1]}",
        f"{crossover(plan, cluster).tokens:,}",
    ]
    return "| " + " | ".join(str(cell) for cell in cells) + " |"


# ---- Command line ----


def read_hostfile(path: str) -> tuple[int, int]:
    """Nodes and slots per node of a DeepSpeed hostfile.

    Raises:
        InputError: it is missing, malformed, or its hosts have different numbers of slots.
    """
    try:
        lines = [line.partition("#")[0].split() for line in Path(path).read_text().splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"The hostfile '{path}' cannot be read ({error}); check --hostfile."
        ) from None
    slots = set()
    hosts = [words for words in lines if words]
    for words in hosts:
        key, _, count = words[1].partition("=") if len(words) == 2 else ("", "", "")
        if key != "slots" or not count.isdecimal() or int(count) < 1:
            raise InputError(
                f"The hostfile '{path}' holds {' '.join(words)!r}; its lines are written 'host "
                "slots=N'."
            )
        slots.add(int(count))
    if len(slots) != 1:
        raise InputError(
            f"The hostfile '{path}' must name hosts that all have the same number of slots."
        )
    return len(hosts), slots.pop()


def parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", help="the recipe")
    parser.add_argument("--hostfile", help="nodes and GPUs from a DeepSpeed hostfile")
    parser.add_argument("--table", action="store_true", help="print the 70B -> 8B table and stop")
    parser.add_argument(
        "--prompt_tokens", type=int, help="expected length of a prompt (default: the longest)"
    )
    parser.add_argument(
        "--completion_tokens",
        type=int,
        help="expected length of a completion (default: the longest)",
    )
    group = parser.add_argument_group("the cluster")
    for field in fields(Cluster):
        group.add_argument(f"--{field.name}", type=field.type, help=f"default {field.default:g}")
    return parser.parse_known_args(argv)


def main(argv: list[str] | None = None) -> int:
    """0 when everything fits, 1 when something does not, 2 for wrong input."""
    known, rest = parse(sys.argv[1:] if argv is None else argv)
    if known.table:
        print(table())
        return 0
    try:
        given = {field.name: getattr(known, field.name) for field in fields(Cluster)}
        if known.hostfile:
            given["nodes"], given["gpus"] = read_hostfile(known.hostfile)
        cluster = dataclasses.replace(
            Cluster(), **{name: value for name, value in given.items() if value is not None}
        )
        if any(getattr(cluster, field.name) <= 0 for field in fields(Cluster)):
            raise InputError("Every number that describes the cluster must be above 0.")
        config = GKDConfig(
            **{**(read_recipe(known.config) if known.config else {}), **read_flags(rest)}
        )
        if config.model_name_or_path is None or config.teacher_model_name_or_path is None:
            raise InputError(
                "model_name_or_path and teacher_model_name_or_path are needed; set them in the "
                "recipe."
            )
        half = config.bf16 is not False or config.fp16
        expected = {
            "prompt_tokens": known.prompt_tokens,
            "completion_tokens": known.completion_tokens,
        }
        plan = make_plan(config, cluster.ranks, weight_bytes=2 if half else 4)
        plan = ExpectedPlan.of(plan, **expected)
    except InputError as error:
        print(f"plan: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    print(report(plan, cluster))
    return 0 if all(fit.fits for fit in check_fit(count_memory(plan), cluster)) else 1


if __name__ == "__main__":
    sys.exit(main())

"""From results.json to a table and a plot:  python -m tools.bench.report tools/bench/results.json

Writes results.md (the table that READMEs embed) and results.png beside it. Nothing is measured
here.
"""

from __future__ import annotations

import json
import os
import platform
import sys
from importlib.metadata import version
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from tools.bench.flops import phase_bytes, phase_flops
from tools.bench.workload import SHAPES, Workload

PHASES = ("rollout", "score", "learn", "update")
# What issue B asks for: (group's beginning, sides' names, largest ratio of the medians of whole
# updates).
TARGETS = (
    ("fixed/32768", "TRL GKDTrainer", 0.30),
    ("fixed/32768", "TRL DistillationTrainer", 0.42),
    ("fixed/8192", "TRL GKDTrainer", 0.52),
    ("fixed/8192", "TRL DistillationTrainer", 0.70),
    ("fixed/8192", "TRL GKDTrainer, defaults", 0.27),
    ("fixed/32768/allocator", "TRL GKDTrainer", 0.38),
    ("fixed/32768/allocator", "TRL DistillationTrainer", 0.52),
    ("ragged/32768", "TRL GKDTrainer", 0.30),
    ("zero3/8192", "TRL GKDTrainer", 0.65),
    ("zero3/32768", "TRL GKDTrainer", 0.45),
)
ROLLOUT_TARGETS = (("ragged/8192", 0.40), ("ragged/32768", 0.22))


def machine(threads: int) -> dict[str, Any]:
    """Where and with what the numbers were made."""
    names = ("torch", "deepspeed", "transformers", "trl", "accelerate")
    with open("/proc/cpuinfo") as file:
        model = next(
            (line.split(":")[1].strip() for line in file if line.startswith("model name")),
            "unknown",
        )
    return {
        "cpu": model,
        "cpus": os.cpu_count(),
        "threads": threads,
        "python": platform.python_version(),
        "load_before": os.getloadavg()[0],
        "versions": {name: version(name) for name in names},
    }


def write_reports(file: Path) -> None:
    results = json.loads(file.read_text())
    table = markdown(results)
    file.with_suffix(".md").write_text(table)
    print(table)
    plot(results, file.with_suffix(".png"))


def markdown(results: dict[str, Any]) -> str:
    """All tables."""
    machine_ = results["machine"]
    lines = [
        f"Measured on {machine_['cpu']}, {machine_['threads']} threads, with "
        + ", ".join(f"{name} {number}" for name, number in machine_["versions"].items())
        + f". Load before the start: {machine_['load_before']:.1f}. Student 4 x 256, teacher 8 x 512, fp32.",
        "Seconds are medians over the timed runs, with the quartiles; a percentage is the share of "
        "the peak that",
        "matrix products of this machine reached between the runs.",
        "",
    ]
    if results["quick"]:
        lines[:0] = ["**A smoke run with tiny vocabularies: the numbers mean nothing.**", ""]
    for name, group in results["groups"].items():
        lines += [f"### {name}", ""]
        if name.startswith("loss"):
            lines += _loss_table(group)
        elif name.startswith("teacher"):
            lines += _teacher_table(group)
        else:
            lines += _update_table(group)
        lines.append("")
    lines += _targets(results["groups"])
    lines += ["", *_floors(results["groups"])]
    return "\n".join(lines) + "\n"


def seconds(side: dict[str, Any]) -> float:
    """Median time of a whole update."""
    return median(run["seconds"] for run in side["runs"])


def _spread(values: list[float]) -> str:
    if len(values) < 2:
        return f"{values[0]:.2f}"
    low, _, high = quantiles(values, n=4, method="inclusive")
    return f"{median(values):.2f} ({low:.2f}–{high:.2f})"


def _sides(group: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {name: side for name, side in group["sides"].items() if name != "matmul"}


def _peak(group: dict[str, Any]) -> float | None:
    side = group["sides"].get("matmul")
    return max(run["flops_per_s"] for run in side["runs"]) if side else None


def _phase(side: dict[str, Any], phase: str) -> float | None:
    values = [run["phases"][phase] for run in side["runs"] if phase in run["phases"]]
    return median(values) if values else None


def _floor(group: dict[str, Any]) -> dict[str, float]:
    """Seconds per phase if the update's operations ran at the machine's measured peak."""
    work = Workload(**group["workload"])
    flops = phase_flops(work.vocabulary, work.lengths(work.samples * group["world_size"], 1))
    return {phase: count / _peak(group) for phase, count in flops.items()}


def _update_table(group: dict[str, Any]) -> list[str]:
    work, ranks, peak = Workload(**group["workload"]), group["world_size"], _peak(group)
    samples = work.samples * ranks
    lengths = work.lengths(samples, 1)
    flops, tokens = phase_flops(work.vocabulary, lengths), sum(lengths)
    head = ["", "update, s", "ours / this"]
    head += [
        "rollout, tokens/s",
        "scored, tokens/s",
        "learned, tokens/s",
        "update phase, s",
        "peak memory, MB",
    ]
    rows = [head, ["---"] * len(head)]
    ours = seconds(next(iter(group["sides"].values())))
    for name, side in _sides(group).items():
        values = [run["seconds"] for run in side["runs"]]
        row = [name, _spread(values), f"{ours / median(values):.2f}"]
        for phase in ("rollout", "score", "learn"):
            took = _phase(side, phase)
            share = flops[phase] / took / peak if took else 0
            row.append(f"{tokens / took:,.0f} ({share:.0%})" if took else "")
        took = _phase(side, "update")
        row += [
            f"{took:.2f}" if took else "",
            f"{max(run['peak_mb'] for run in side['runs']):,.0f}",
        ]
        rows.append(row)
    total = sum(flops.values()) / 1e9
    by_phase = ", ".join(f"{phase} {value / 1e9:.1f}" for phase, value in flops.items())
    note = f"{samples} samples, {tokens} completion tokens, {total:.0f} GFLOP per update ({by_phase}); "
    note += f"peak {peak / 1e9:.0f} GFLOP/s."
    decoded = [
        run.get("decoded_rows_per_token") for run in next(iter(group["sides"].values()))["runs"]
    ]
    if work.ragged and decoded[0]:
        note += f" gkd_ds computes {median(decoded):.3f} decode steps x rows per real token."
    if group["parity"]:
        worst = max(
            max(p["loss_difference"], p["gradient_difference"]) for p in group["parity"].values()
        )
        note += f" Before timing, losses and gradients agreed within {worst:.0e}."
    return [note, "", *("| " + " | ".join(row) + " |" for row in rows)]


def _teacher_table(group: dict[str, Any]) -> list[str]:
    """Sides are named "<place>, <micro-batches>"."""
    head = ["teacher's weights", "micro-batches", "score, s", "score / resident"]
    head += ["weight bytes per update", "read from disk"]
    rows = [head, ["---"] * len(head)]
    offloaded = _offloaded(group)
    for name, side in _sides(group).items():
        if name.startswith("bandwidth"):
            continue
        run, share = side["runs"][-1], "1.00"
        if name in offloaded:
            share = "{:.2f} (allowed {:.2f})".format(*offloaded[name])
        row = [*name.split(", "), f"{_phase(side, 'score'):.3f}", share]
        rows.append([*row, f"{run['teacher_bytes']:,}", f"{run['read_bytes']:,}"])
    speeds = ", ".join(
        f"{place}: {best / 1e9:.2f} GB/s" for place, best in _bandwidths(group).items()
    )
    return [f"Measured bandwidth: {speeds}.", "", *("| " + " | ".join(row) + " |" for row in rows)]


def _bandwidths(group: dict[str, Any]) -> dict[str, float]:
    """The best bytes per second of every place that a teacher is streamed from."""
    sides = {
        name.split(", ")[1]: side
        for name, side in group["sides"].items()
        if name.startswith("bandwidth")
    }
    return {place: max(run["bytes_per_s"] for run in side["runs"]) for place, side in sides.items()}


def _offloaded(group: dict[str, Any]) -> dict[str, tuple[float, float]]:
    """By side: its score time, and the resident teacher's with 1.2 passes over the weights; in
    resident score times.
    """
    ratios = {}
    for place, bytes_per_s in _bandwidths(group).items():
        for name, side in group["sides"].items():
            if name.startswith(f"{place}, "):
                resident = _phase(group["sides"][name.replace(place, "resident")], "score")
                one_pass = side["runs"][-1]["teacher_bytes"] / bytes_per_s
                ratios[name] = _phase(side, "score") / resident, 1 + 1.2 * one_pass / resident
    return ratios


def _loss_table(group: dict[str, Any]) -> list[str]:
    head = ["", "peak increase, MB", "ours / this", "seconds", "loss"]
    rows = [head, ["---"] * len(head)]
    ours = median(run["increase_mb"] for run in next(iter(group["sides"].values()))["runs"])
    for name, side in _sides(group).items():
        increase = median(run["increase_mb"] for run in side["runs"])
        loss = side["runs"][-1]["loss"]
        rows.append(
            [
                name,
                f"{increase:,.0f}",
                f"{ours / increase:.3f}",
                f"{seconds(side):.2f}",
                f"{loss:.6f}",
            ]
        )
    D = SHAPES["student"]["hidden_size"]
    gradient = group["workload"]["vocabulary"] * D * 4 / 2**20
    note = f"2 x 1,024 tokens, forward and backward; {gradient:.0f} MB of each is the gradient of the student's head."
    return [note, "", *("| " + " | ".join(row) + " |" for row in rows)]


def _targets(groups: dict[str, Any]) -> list[str]:
    """What was asked for, what was reached, and what there is to reach."""
    rows = [["asked for", "at most", "measured", "", "arithmetic alone"], ["---"] * 5]

    def add(what: str, limit: float, ratio: float, floor: float | None = None) -> None:
        reached = "yes" if ratio <= limit else "**no**"
        rows.append(
            [what, f"{limit:.3g}", f"{ratio:.3f}", reached, f"{floor:.3f}" if floor else ""]
        )

    for name, side, limit in TARGETS:
        if name in groups and side in groups[name]["sides"]:
            theirs, ours = (seconds(groups[name]["sides"][which]) for which in (side, "gkd_ds"))
            add(
                f"{name}: update / {side}",
                limit,
                ours / theirs,
                sum(_floor(groups[name]).values()) / theirs,
            )
    for name, limit in ROLLOUT_TARGETS:
        if name in groups:
            sides = groups[name]["sides"]
            ours, theirs = (
                _phase(sides[which], "rollout") for which in ("gkd_ds", "transformers generate")
            )
            add(
                f"{name}: rollout / generate",
                limit,
                ours / theirs,
                _floor(groups[name])["rollout"] / theirs,
            )
            decoded = median(run["decoded_rows_per_token"] for run in sides["gkd_ds"]["runs"])
            add(f"{name}: decode steps x rows / real tokens", 1.15, decoded)
    for name, group in groups.items():
        if name.startswith("loss"):
            increases = [
                median(run["increase_mb"] for run in side["runs"])
                for side in group["sides"].values()
            ]
            add(f"{name}: memory / dense", 1 / 12, increases[0] / increases[1])
            add(f"{name}: memory / chunked", 1 / 4, increases[0] / increases[2])
        if name.startswith("teacher"):
            for side, (ratio, allowed) in _offloaded(group).items():
                add(f"{name}: score ({side}) / resident", allowed, ratio)
    if len(rows) == 2:
        return []
    note = "*Arithmetic alone* is what the ratio would be if all of an update ran at the peak of matrix products."
    return ["### Targets", "", note, "", *("| " + " | ".join(row) + " |" for row in rows)]


def _floors(groups: dict[str, Any]) -> list[str]:
    """How far each of our phases is from what the machine could do at best."""
    rows = [
        ["phase of an update", "measured, s", "arithmetic, s", "memory, s", "floor / measured"],
        ["---"] * 5,
    ]
    machines = []
    for name, group in groups.items():
        if name.split("/")[0] not in ("fixed", "ragged", "zero3"):
            continue
        work, ranks = Workload(**group["workload"]), group["world_size"]
        moved = phase_bytes(work.vocabulary, work.lengths(work.samples, 1))
        bandwidth = max(run["read_bytes_per_s"] for run in group["sides"]["matmul"]["runs"])
        machines.append(f"{name} {_peak(group) / 1e9:.0f} GFLOP/s and {bandwidth / 1e9:.0f} GB/s")
        arithmetic, floor = _floor(group), 0.0
        for phase in PHASES:
            took = _phase(group["sides"]["gkd_ds"], phase)
            limits = arithmetic.get(phase, 0.0), ranks * moved[phase] / bandwidth
            rows.append(_floor_row(f"{name}: {phase}", took, *limits))
            floor += max(limits)
        whole = seconds(group["sides"]["gkd_ds"])
        rows.append([f"**{name}: whole update**", f"{whole:.2f}", "", "", f"{floor / whole:.0%}"])
    if not machines:
        return []
    note = "*Arithmetic*: the phase's operations at the peak of large matrix products. *Memory*: the bytes that it "
    note += f"must move (`flops.py`) at the best reading bandwidth. Measured between the runs: {'; '.join(machines)}."
    return ["### Floors", "", note, "", *("| " + " | ".join(row) + " |" for row in rows)]


def _floor_row(name: str, took: float, arithmetic: float, memory: float) -> list[str]:
    share = f"{max(arithmetic, memory) / took:.0%}"
    return [name, f"{took:.2f}", f"{arithmetic:.2f}", f"{memory:.2f}", share]


def plot(results: dict[str, Any], file: Path) -> None:
    """Stacked phases of an update, one bar per side, one panel per group that compares updates."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    groups = {
        n: g
        for n, g in results["groups"].items()
        if n.split("/")[0] in ("fixed", "ragged", "zero3")
    }
    if not groups:
        return
    figure, panels = pyplot.subplots(
        len(groups), 1, figsize=(9, 1.0 + 1.6 * len(groups)), squeeze=False
    )
    colours = {
        "rollout": "#4477aa",
        "score": "#ccbb44",
        "learn": "#ee6677",
        "update": "#228833",
        "other": "#bbbbbb",
    }
    for panel, (name, group) in zip(panels[:, 0], groups.items()):
        sides = _sides(group)
        for place, (_, side) in enumerate(sides.items()):
            left, whole = 0.0, seconds(side)
            parts = {phase: _phase(side, phase) or 0.0 for phase in PHASES}
            parts["other"] = max(0.0, whole - sum(parts.values()))
            for phase, took in parts.items():
                panel.barh(
                    place,
                    took,
                    left=left,
                    color=colours[phase],
                    label=phase if place == 0 else None,
                )
                left += took
        panel.set_yticks(range(len(sides)), list(sides))
        panel.invert_yaxis()
        panel.set_title(name, loc="left", fontsize=10)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0, 0].legend(
        ncols=5, fontsize=8, frameon=False, loc="lower right", bbox_to_anchor=(1, 1)
    )
    panels[-1, 0].set_xlabel("seconds per update")
    figure.tight_layout()
    figure.savefig(file, dpi=120)


if __name__ == "__main__":
    write_reports(Path(sys.argv[1]))

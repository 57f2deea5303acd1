"""One self-contained page about a run: what it learned, how fast it was, what it says now.

    python tools/report.py runs/quickstart                      # writes report.html and report.png there
    python tools/report.py runs/quickstart --output first.html  # and first.png beside it

Reads metrics.jsonl and, where they exist, rollouts.jsonl, config.resolved.json and answers.json
({"prompts": [...], "before": [...], "after": [...], "teacher": [...]}). A run may still be going
on.
"""

import argparse
import base64
import html
import io
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # before pyplot: a machine that trains has no display
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import (
    FuncFormatter,
    LogLocator,
    MaxNLocator,
    NullFormatter,
    PercentFormatter,
    StrMethodFormatter,
)

Row = dict[str, Any]


class NothingToReport(Exception):
    """The run directory does not hold what a report needs; the message is for the user."""


# Okabe and Ito's colours, told apart by nearly everybody.
BLUE, RED, GREEN, ORANGE, SKY, GREY = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#E69F00",
    "#56B4E9",
    "#9AA0A6",
)
SOURCES = {
    "student": (BLUE, "student's own"),
    "teacher": (RED, "teacher's"),
    "data": (GREEN, "reference"),
}
PHASES = {"rollout": SKY, "score": ORANGE, "learn": GREEN, "update": BLUE}
STYLE = {
    "font.size": 11, "axes.titlesize": 12, "axes.titleweight": "bold", "axes.titlelocation": "left",
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.color": "#E6E8EB",
    "axes.edgecolor": "#9AA0A6", "axes.labelcolor": "#3C4043", "xtick.color": "#3C4043", "ytick.color": "#3C4043",
    "axes.axisbelow": True, "legend.frameon": False, "legend.fontsize": 9.5, "lines.linewidth": 2,
}  # fmt: skip
MOST_ROLLOUTS = 6
MOST_CHARACTERS = 700


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run_dir", type=Path, help="directory of the run (its output_dir)")
    parser.add_argument("--output", type=Path, help="the HTML file; default RUN_DIR/report.html")
    arguments = parser.parse_args()
    try:
        page, picture = write_report(arguments.run_dir, arguments.output)
    except (OSError, NothingToReport) as problem:
        print(f"report: {problem}", file=sys.stderr)
        sys.exit(2)
    print(f"{page}\n{picture}")


def write_report(run_dir: Path, output: Path | None = None) -> tuple[Path, Path]:
    """Write the page and, beside it, all plots as one PNG; returns both paths."""
    page = output or run_dir / "report.html"
    rows = read_rows(run_dir / "metrics.jsonl")
    updates, evaluations = split_rows(rows)
    if not rows:
        raise NothingToReport(f"{run_dir / 'metrics.jsonl'} has no rows yet; start the run first.")
    config = read_json(run_dir / "config.resolved.json") or {}
    panels = [(draw, height) for draw, height in PANELS if can_draw(draw, updates, evaluations)]
    picture = page.with_suffix(".png")
    with plt.rc_context(STYLE):
        overview(panels, updates, evaluations, title(run_dir, config)).savefig(picture, dpi=130)
        images = [to_png(draw, height, updates, evaluations) for draw, height in panels]
    plt.close("all")
    body = [
        f"<h1>{escape(title(run_dir, config))}</h1>",
        f'<p class="lead">{lead(config)}</p>',
        tiles(updates, evaluations),
        evaluation_table(evaluations),
        answers_section(read_json(run_dir / "answers.json")),
        '<h2>Curves</h2><div class="plots">' + "".join(images) + "</div>" if images else "",
        rollouts_section(
            read_rows(run_dir / "rollouts.jsonl") if (run_dir / "rollouts.jsonl").exists() else []
        ),
        config_section(config),
    ]
    page.write_text(
        PAGE.format(title=escape(title(run_dir, config)), body="\n".join(body)), encoding="utf-8"
    )
    return page, picture


# ---- reading


def read_rows(path: Path) -> list[Row]:
    """Rows of a JSON-lines file; a last line that a running job has not finished yet is left out."""
    rows = []
    lines = path.read_text(encoding="utf-8").split("\n")
    for number, line in enumerate(lines, start=1):
        try:
            rows.extend([json.loads(line)] if line else [])
        except ValueError as problem:
            if number < len(lines):
                raise NothingToReport(
                    f"{path} line {number} is not JSON; remove or repair it."
                ) from problem
    return rows


def read_json(path: Path) -> Row | None:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def split_rows(rows: list[Row]) -> tuple[list[Row], list[Row]]:
    """(updates, evaluations), each in order of their steps; evaluations at one step are one row."""
    evaluations: dict[int, Row] = {}
    for row in rows:
        if any(name.startswith("eval/") for name in row):
            evaluations.setdefault(row["step"], {}).update(row)
    updates = [row for row in rows if not any(name.startswith("eval/") for name in row)]
    return updates, [evaluations[step] for step in sorted(evaluations)]


def series(rows: list[Row], name: str) -> tuple[np.ndarray, np.ndarray]:
    """(steps, values) of the rows in which `name` is a finite number."""
    found = [(row["step"], row[name]) for row in rows if isinstance(row.get(name), (int, float))]
    found = [(step, value) for step, value in found if math.isfinite(value)]
    steps, values = zip(*found, strict=True) if found else ((), ())
    return np.array(steps, dtype=float), np.array(values, dtype=float)


def smooth(values: np.ndarray) -> np.ndarray:
    """Centred running mean over a tenth of the run; at the ends over what there is."""
    if not len(values):
        return values
    width = max(1, len(values) // 10) | 1
    ones = np.ones(width)
    return np.convolve(values, ones, "same") / np.convolve(np.ones(len(values)), ones, "same")


# ---- plots: each draws one panel and says by its return value whether there was anything to draw


def draw_loss(ax: Axes, updates: list[Row], evaluations: list[Row]) -> bool:
    names = [
        (f"loss/{source}", *SOURCES[source])
        for source in SOURCES
        if len(series(updates, f"loss/{source}")[0])
    ]
    for name, colour, label in names or [("loss", BLUE, "all completions")]:
        steps, values = series(updates, name)
        ax.plot(steps, values, ".", color=colour, alpha=0.4, markersize=5, markeredgewidth=0)
        ax.plot(
            steps, smooth(values), color=colour, label=f"{label} completions" if names else label
        )
    decorate(ax, "Training loss", "divergence (nats per token)")
    ax.set_ylim(bottom=0)
    ax.legend(loc="upper right")
    return bool(len(series(updates, "loss")[0]))


def draw_evaluation(ax: Axes, updates: list[Row], evaluations: list[Row]) -> bool:
    names = divergence_names(evaluations)
    colours = iter([GREEN, ORANGE, RED, SKY, GREY] * len(names))
    ends = []
    for name in names:
        steps, values = series(evaluations, name)
        colour = BLUE if "on_policy" in name else next(colours)
        ax.plot(
            steps,
            values,
            "o-" if len(steps) <= 40 else "-",
            color=colour,
            label=nice(name),
            markersize=5,
        )
        number = {
            "color": colour,
            "fontsize": 10,
            "fontweight": "bold",
            "textcoords": "offset points",
        }
        if len(values) > 1:
            ax.annotate(f"{values[0]:.3g}", (steps[0], values[0]), xytext=(0, 7), **number)
        ends.append((values[-1], steps[-1], number))
    decorate(ax, "Held-out divergence from the teacher", "divergence (nats per token)")
    top = 1.12 * max(ax.get_ylim()[1], 1e-6)
    ax.set_ylim(0, top)
    ax.margins(x=0.1)
    lowest = -math.inf
    for value, step, number in sorted(
        ends, key=lambda end: end[0]
    ):  # from below, never on top of each other
        lowest = max(value, lowest + 0.07 * top)
        ax.annotate(f"{value:.3g}", (step, lowest), xytext=(7, -3), **number)
    ax.legend(loc="best")
    return bool(names)


def draw_lengths(ax: Axes, updates: list[Row], evaluations: list[Row]) -> bool:
    drawn = [("mean_completion_length", BLUE, "training, all sources", updates),
             ("eval/on_policy_mean_length", ORANGE, "held-out, student's own", evaluations)]  # fmt: skip
    for name, colour, label, rows in drawn:
        steps, values = series(rows, name)
        if len(steps):
            ax.plot(steps, values, ".", color=colour, alpha=0.4, markersize=5, markeredgewidth=0)
            ax.plot(steps, smooth(values), color=colour, label=label)
    decorate(ax, "Completion length", "tokens")
    ax.set_ylim(bottom=0)
    ax.legend(loc="best")
    return bool(len(series(updates, drawn[0][0])[0]))


def draw_health(ax: Axes, updates: list[Row], evaluations: list[Row]) -> bool:
    drawn = [
        ("student/finished_share", GREEN, "end by themselves"),
        ("student/looping_share", RED, "repeat a loop"),
    ]
    found = [(series(updates, name), colour, label) for name, colour, label in drawn]
    for (steps, values), colour, label in found:
        if len(steps):
            ax.plot(steps, values, ".", color=colour, alpha=0.4, markersize=5, markeredgewidth=0)
            ax.plot(steps, smooth(values), color=colour, label=label)
    decorate(ax, "The student's own completions", "share")
    ax.set_ylim(-0.02, 1.02)
    ax.yaxis.set_major_formatter(PercentFormatter(1.0))
    ax.legend(loc="center right")
    return any(len(steps) for (steps, _), _, _ in found)


def draw_phases(ax: Axes, updates: list[Row], evaluations: list[Row]) -> bool:
    steps, total = series(updates, "perf/step_s")
    if not len(steps):
        return False
    rows = [row for row in updates if isinstance(row.get("perf/step_s"), (int, float))]
    parts = [np.array([row.get(f"perf/{phase}_s") or 0.0 for row in rows]) for phase in PHASES]
    parts.append(np.maximum(total - sum(parts), 0))
    half = np.diff(steps).min() / 2 if len(steps) > 1 else 0.5
    edges = np.stack(
        [steps - half, steps + half], axis=1
    ).ravel()  # every update as wide as it is apart
    ax.stackplot(edges, [part.repeat(2) for part in parts], colors=[*PHASES.values(), GREY],
                 labels=[*PHASES, "other"], linewidth=0)  # fmt: skip
    decorate(ax, "Where an update's time goes", "seconds per update")
    ax.set_ylim(
        0, 1.35 * np.percentile(total, 98)
    )  # one slow first update must not flatten the rest
    ax.legend(loc="upper center", ncols=5, columnspacing=0.9, handlelength=0.9, handletextpad=0.4)
    return True


def draw_speed(ax: Axes, updates: list[Row], evaluations: list[Row]) -> bool:
    whole = [{"step": row["step"], "whole": row["completion_tokens"] / row["perf/step_s"]} for row in updates
             if row.get("perf/step_s") and row.get("completion_tokens") is not None]  # fmt: skip
    drawn = [
        (series(updates, f"perf/{phase}_tokens_per_s"), PHASES[phase], phase) for phase in PHASES
    ]
    drawn.append((series(whole, "whole"), "#202124", "whole update"))
    for (steps, values), colour, label in drawn:
        if np.any(values > 0):
            ax.plot(steps[values > 0], smooth(values[values > 0]), color=colour, label=label)
    decorate(ax, "Speed in completion tokens", "tokens per second")
    ax.set_yscale("log")
    ax.set_ylim(top=2 * ax.get_ylim()[1])
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    ax.yaxis.set_minor_formatter(NullFormatter())
    ax.legend(loc="upper center", ncols=4, columnspacing=0.9, handlelength=1.2, handletextpad=0.4)
    return bool(whole)


def draw_gradient(ax: Axes, updates: list[Row], evaluations: list[Row]) -> bool:
    steps, values = series(updates, "grad_norm")
    ax.plot(steps, values, color=BLUE, linewidth=1.2)
    skipped = [row["step"] for row in updates if row.get("skipped")]
    ax.plot(skipped, np.full(len(skipped), 0.03), "v", color=RED, label=f"skipped updates: {len(skipped)}",
            transform=ax.get_xaxis_transform())  # fmt: skip
    decorate(ax, "Gradient", "norm before clipping")
    ax.set_ylim(bottom=0)
    if skipped:
        ax.legend(loc="upper right")
    return bool(len(steps))


def draw_rate(ax: Axes, updates: list[Row], evaluations: list[Row]) -> bool:
    steps, values = series(updates, "lr")
    ax.plot(steps, values, color=ORANGE)
    decorate(ax, "Learning rate", "AdamW's step size")
    ax.set_ylim(bottom=0)
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.1e}" if value else "0"))
    return bool(len(steps))


Draw = Callable[[Axes, list[Row], list[Row]], bool]
PANELS: list[tuple[Draw, float]] = [
    (draw_evaluation, 3.3), (draw_loss, 3.3), (draw_lengths, 2.8), (draw_health, 2.8), (draw_phases, 2.8),
    (draw_speed, 2.8), (draw_gradient, 2.4), (draw_rate, 2.4),
]  # fmt: skip


def decorate(ax: Axes, heading: str, y_label: str) -> None:
    ax.set_title(heading)
    ax.set_xlabel("update")
    ax.set_ylabel(y_label)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8, steps=[1, 2, 5, 10]))


def can_draw(draw: Draw, updates: list[Row], evaluations: list[Row]) -> bool:
    figure, ax = plt.subplots()
    drawn = draw(ax, updates, evaluations) if updates or evaluations else False
    plt.close(figure)
    return drawn


def overview(
    panels: list[tuple[Draw, float]], updates: list[Row], evaluations: list[Row], heading: str
):
    lines = max(1, math.ceil(len(panels) / 2))
    figure, axes = plt.subplots(
        lines, 2, figsize=(11, 0.6 + 2.9 * lines), squeeze=False, layout="constrained"
    )
    for ax, (draw, _) in zip(axes.flat, panels, strict=False):
        draw(ax, updates, evaluations)
    for ax in axes.flat[len(panels) :]:
        ax.set_axis_off()
    figure.suptitle(heading, fontsize=15, fontweight="bold", x=0.01, ha="left")
    return figure


def to_png(draw: Draw, height: float, updates: list[Row], evaluations: list[Row]) -> str:
    """One panel as an <img> that carries its PNG; narrow, so that its letters stay readable on a
    phone.
    """
    figure, ax = plt.subplots(figsize=(5.4, height), layout="constrained")
    draw(ax, updates, evaluations)
    file = io.BytesIO()
    figure.savefig(file, dpi=170)
    data = base64.b64encode(file.getvalue()).decode()
    return f'<img alt="{escape(ax.get_title(loc="left"))}" src="data:image/png;base64,{data}">'


# ---- the page


def title(run_dir: Path, config: Row) -> str:
    return config.get("run_name") or run_dir.resolve().name


def lead(config: Row) -> str:
    def short(name: str) -> str:
        value = config.get(name)
        return f"<b>{escape(Path(str(value)).name)}</b>" if value else ""

    parts = [
        short("model_name_or_path") and f"student {short('model_name_or_path')}",
        short("teacher_model_name_or_path") and f"teacher {short('teacher_model_name_or_path')}",
        short("dataset_name") and f"data {short('dataset_name')}",
        *(
            f"{letter} {config[name]:g}"
            for letter, name in (("λ", "lmbda"), ("β", "beta"))
            if name in config
        ),
    ]
    return " · ".join(part for part in parts if part) or "on-policy distillation"


def tiles(updates: list[Row], evaluations: list[Row]) -> str:
    """The few numbers somebody looks for first."""
    facts = []
    for name in divergence_names(evaluations):
        _, values = series(evaluations, name)
        if len(values) > 1:
            change = f"{values[-1] / values[0] - 1:+.0%}" if values[0] else ""
            facts.append(
                (f"{values[0]:.3g} → {values[-1]:.3g}", f"divergence, {nice(name)}", change)
            )
    if updates:
        seconds, tokens = (
            float(series(updates, name)[1].sum()) for name in ("perf/step_s", "completion_tokens")
        )
        facts.append((str(updates[-1]["step"]), "updates", duration(seconds) if seconds else ""))
        if seconds:
            facts.append(
                (f"{tokens / seconds:,.0f}", "completion tokens/s", f"{tokens:,.0f} tokens")
            )
    cells = "".join(
        f'<div class="tile"><div class="big">{escape(big)}</div><div>{escape(label)}</div>'
        f'<div class="small">{escape(small)}</div></div>'
        for big, label, small in facts
    )
    return f'<div class="tiles">{cells}</div>'


def evaluation_table(evaluations: list[Row]) -> str:
    if not evaluations:
        return ""
    first, last = evaluations[0], evaluations[-1]
    divergences = divergence_names(evaluations)
    others = {name for row in evaluations for name in row if name.startswith("eval/")} - set(
        divergences
    )
    lines = []
    for name in [*divergences, *sorted(others)]:
        _, values = series(evaluations, name)
        if not len(values):
            continue
        compares = len(values) > 1 and name not in ("eval/samples", "eval/runtime")
        before = f"{values[0]:.4g}" if compares else ""
        change = f"{values[-1] / values[0] - 1:+.1%}" if compares and values[0] else ""
        cells = "".join(f"<td class=n>{cell}" for cell in (before, f"{values[-1]:.4g}", change))
        lines.append(f"<tr><td>{escape(nice(name))}{cells}")
    head = f"<th class=n>update {first['step']}<th class=n>update {last['step']}<th class=n>change"
    return (
        f"<h2>Evaluation</h2><div class=scroll><table><tr><th>held-out data{head}{''.join(lines)}</table></div>"
        "<p class=small>Divergences and entropies are nats per token, lengths tokens; the runtime is in seconds. "
        "The student's own completions are those it samples for held-out prompts.</p>"
    )


def answers_section(answers: Row | None) -> str:
    if not answers:
        return ""
    who = [(key, label) for key, label in (("before", "student before"), ("after", "student after"),
                                           ("teacher", "teacher")) if answers.get(key)]  # fmt: skip
    cards = []
    for number, prompt in enumerate(answers["prompts"]):
        columns = "".join(
            f'<div class="answer {key}"><div class="who">{label}</div>{text_block(answers[key][number])}</div>'
            for key, label in who
        )
        cards.append(f'<div class="card"><div class="prompt">{text_block(prompt)}</div>'
                     f'<div class="answers">{columns}</div></div>')  # fmt: skip
    return "<h2>Answers to the same prompts</h2>" + "".join(cards)


def rollouts_section(rollouts: list[Row]) -> str:
    """A few rollouts spread over the run, each beside what both models think of it."""
    if not rollouts:
        return ""
    chosen = sorted(
        {
            round(index)
            for index in np.linspace(0, len(rollouts) - 1, min(MOST_ROLLOUTS, len(rollouts)))
        }
    )
    cards = []
    for row in (rollouts[index] for index in chosen):
        colour, label = SOURCES.get(row["source"], (GREY, row["source"]))
        facts = [
            f'<span class="chip" style="background:{colour}">{escape(label)}</span>',
            f"update {row['step']}",
        ]
        for name, who in (("teacher_logprob", "teacher"), ("student_logprob", "student")):
            if isinstance(row.get(name), (int, float)):
                facts.append(f"{who} <b>{math.exp(row[name]):.1%}</b> per token")
        if isinstance(row.get("divergence"), (int, float)):
            facts.append(f"divergence <b>{row['divergence']:.3g}</b>")
        texts = (
            f'<div class="prompt">{text_block(row["prompt"])}</div>{text_block(row["completion"])}'
        )
        cards.append(f'<div class="card"><div class="facts">{" · ".join(facts)}</div>{texts}</div>')
    return (
        "<h2>Sampled rollouts</h2><p class=small>Probability per token is the geometric mean over the completion.</p>"
        + "".join(cards)
    )


def config_section(config: Row) -> str:
    if not config:
        return ""
    lines = "".join(f"<tr><td>{escape(name)}<td>{escape(json.dumps(value))}" for name, value in sorted(config.items())
                    if value is not None)  # fmt: skip
    return f"<details><summary>Configuration</summary><div class=scroll><table>{lines}</table></div></details>"


def divergence_names(evaluations: list[Row]) -> list[str]:
    names = {
        name
        for row in evaluations
        for name in row
        if name.startswith("eval/") and name.endswith("loss")
    }
    return sorted(names, key=lambda name: (0 if "on_policy" in name else 1, name))


def nice(name: str) -> str:
    """eval/chats_on_policy_loss -> chats: student's own completions."""
    name = name.removeprefix("eval/")
    for ending, meaning in (
        ("on_policy_loss", "student's own completions"),
        ("loss", "reference completions"),
    ):
        if name.endswith(ending):
            rest = name.removesuffix(ending).strip("_")
            return f"{rest}: {meaning}" if rest else meaning
    return name.replace("_", " ").replace("on policy", "student's own:")


def duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {seconds:02} s"


def text_block(text: str) -> str:
    text = text.strip()
    shown = text if len(text) <= MOST_CHARACTERS else text[:MOST_CHARACTERS] + " […]"
    return f'<div class="text">{escape(shown) or "<i>(empty)</i>"}</div>'


def escape(text: object) -> str:
    return html.escape(
        str(text).encode(errors="replace").decode()
    )  # a lone surrogate cannot be written


PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
:root {{ color-scheme: light; --ink: #202124; --soft: #5f6368; --line: #dadce0; --paper: #f8f9fa; }}
* {{ box-sizing: border-box; }}
body {{ font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); margin: 0; }}
main {{ max-width: 70rem; margin: 0 auto; padding: 1rem; }}
h1 {{ margin: .5rem 0 0; font-size: 1.7rem; overflow-wrap: anywhere; }}
h2 {{ margin: 2.2rem 0 .6rem; font-size: 1.2rem; }}
.lead {{ margin: .2rem 0 1.2rem; color: var(--soft); }}
.small, .facts {{ color: var(--soft); font-size: .875rem; }}
.tiles {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(10rem, 1fr)); gap: .75rem; }}
.tile, .card, .plots img {{ background: #fff; border: 1px solid var(--line); border-radius: .6rem; }}
.tile {{ padding: .7rem .9rem; }}
.big {{ font-size: 1.4rem; font-weight: 700; white-space: nowrap; }}
.plots {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 27rem), 1fr)); gap: .75rem; }}
.plots img {{ width: 100%; padding: .4rem; }}
.card {{ padding: .8rem .9rem; margin: 0 0 .75rem; }}
.prompt {{ color: var(--soft); border-left: 3px solid var(--line); padding-left: .7rem; margin: .3rem 0 .6rem; }}
.answers {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(15rem, 1fr)); gap: .75rem; }}
.answer {{ border-top: 3px solid var(--line); padding-top: .3rem; }}
.answer.after {{ border-color: #0072B2; }} .answer.teacher {{ border-color: #D55E00; }}
.who {{ font-size: .8rem; font-weight: 700; color: var(--soft); }}
.text {{ white-space: pre-wrap; overflow-wrap: anywhere; }}
.chip {{ color: #fff; border-radius: 1rem; padding: .1rem .6rem; font-size: .8rem; }}
.scroll {{ overflow-x: auto; }}
table {{ border-collapse: collapse; background: #fff; width: 100%; }}
td, th {{ border-bottom: 1px solid var(--line); padding: .35rem .6rem; text-align: left; }}
td:nth-child(2) {{ overflow-wrap: anywhere; }}
.n {{ text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }}
details {{ margin-top: 2rem; }} summary {{ cursor: pointer; font-weight: 700; }}
</style>
<main>
{body}
</main>
</html>
"""

if __name__ == "__main__":
    main()

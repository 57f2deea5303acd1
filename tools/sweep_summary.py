#!/usr/bin/env python3
"""A table of the runs of one sweep: state, steps and the newest evaluation of each.

    python tools/sweep_summary.py runs/gkd-sweep-123 [--sort eval/loss]

Prints the table and writes it to `summary.txt` in the sweep's directory. Reads the `metrics.jsonl`
of every run below it; a run's directory is named after what varies, as in `lmbda=0.5,beta=0.1`. A
loss, also one of an evaluation, is measured with the run's own beta, and losses of different betas
have different scales: compare them within one beta.
"""

import argparse
import json
import os
import sys
from pathlib import Path

TAIL = 10  # updates over which the last loss is averaged


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sweep", type=Path)
    parser.add_argument(
        "--sort", help="the column to sort by, smallest first (default: in order of the grid)"
    )
    args = parser.parse_args()
    rows = [summary(run) for run in sorted(args.sweep.glob("*=*")) if run.is_dir()]
    if not rows:
        print(
            f"sweep_summary: {args.sweep} holds no run (a directory named like lmbda=0.5,beta=0.1)",
            file=sys.stderr,
        )
        return 2
    if args.sort and args.sort not in column_names(rows):
        print(
            f"sweep_summary: no run has {args.sort!r}, only {', '.join(column_names(rows))}",
            file=sys.stderr,
        )
        return 2
    if args.sort:
        rows.sort(key=lambda row: row.get(args.sort, float("inf")))
    text = f"{args.sweep}: {len(rows)} runs\n{table(rows)}\n"
    print(text, end="")
    # Array tasks end at any time: never let one read what another has half written.
    temporary = args.sweep / f".summary-{os.getpid()}"
    temporary.write_text(text)
    temporary.replace(args.sweep / "summary.txt")
    return 0


def summary(run: Path) -> dict[str, str | float | int]:
    """One run: what its name says, whether it has finished, its steps, its last loss, its newest
    evaluation.
    """
    row: dict[str, str | float | int] = dict(
        part.split("=", 1) for part in run.name.split(",") if "=" in part
    )
    updates, evaluation = read_metrics(run / "metrics.jsonl")
    row["state"] = (
        "finished" if (run / "FINISHED").exists() else "stopped" if updates else "no update"
    )
    row["steps"] = updates[-1]["step"] if updates else 0
    losses = [update["loss"] for update in updates[-TAIL:] if update["loss"] is not None]
    if losses:
        row["loss"] = sum(losses) / len(losses)
    return row | evaluation


def read_metrics(path: Path) -> tuple[list[dict], dict[str, float]]:
    """The rows of updates, and of the newest evaluation the numbers; empty where there is no file
    yet.
    """
    updates, evaluation = [], {}
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue  # the last line of a run that is writing it
        if "loss" in row:
            updates.append(row)
        evaluation |= {
            k: v for k, v in row.items() if k.startswith("eval/") and isinstance(v, (int, float))
        }
    return updates, evaluation


def column_names(rows: list[dict]) -> list[str]:
    """All columns, in order of first appearance."""
    return list(dict.fromkeys(name for row in rows for name in row))


def table(rows: list[dict]) -> str:
    """The rows as aligned text, numbers with four significant digits."""
    names = column_names(rows)
    cells = [names] + [[shown(row.get(name, "-")) for name in names] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join(
        "  ".join(c.rjust(w) for c, w in zip(line, widths, strict=True)) for line in cells
    )


def shown(value: str | float | int) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    sys.exit(main())

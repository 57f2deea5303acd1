"""The report as one Markdown table."""

from __future__ import annotations

from typing import Any


def markdown(report: dict[str, Any]) -> str:
    where, counts = report["machine"], {}
    for entry in report["checks"]:
        counts[entry["outcome"]] = counts.get(entry["outcome"], 0) + 1
    versions = ", ".join(
        f"{name} {version}" for name, version in where["versions"].items() if version
    )
    lines = [
        "# What ran on this machine's accelerator",
        "",
        f"{where['accelerator']} ({'; '.join(where['cards']) or 'no card'}), {where['cpus']} CPUs, "
        f"Python {where['python']}, CUDA {where['cuda']}, {versions}. "
        f"{', '.join(f'{number} {outcome}' for outcome, number in counts.items())}, in "
        f"{report['seconds']:.0f} s.",
        "",
        "| check | | what was found, or why it was skipped | s |",
        "|---|---|---|---|",
    ]
    for entry in report["checks"]:
        sentence = entry["sentence"].replace("|", "\\|").replace("\n", " ")
        outcome = entry["outcome"] if entry["outcome"] == "passed" else f"**{entry['outcome']}**"
        lines.append(
            f"| {entry['name']}: {entry['about']} | {outcome} | {sentence} | {entry['seconds']:.0f} |"
        )
    return "\n".join(lines) + "\n"

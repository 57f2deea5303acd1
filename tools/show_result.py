"""The result of a run in the terminal: divergence before and after, and the answers that
tools/answers.py collected.

    python tools/show_result.py runs/quickstart/run

Needs a run with evaluations at its start and its end. Ends with exit code 1 when the divergence on
the student's own samples did not fall to half of where it started.
"""

import json
import sys
import textwrap
from pathlib import Path

ROWS = {
    "eval/loss": "on reference completions",
    "eval/on_policy_loss": "on the student's own samples",
}
ENOUGH = 0.5


def evaluations(run_dir: Path) -> list[dict]:
    rows = [
        json.loads(line)
        for line in (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    found = [row for row in rows if "eval/on_policy_loss" in row]
    if len(found) < 2:
        raise SystemExit(
            f"{run_dir} has {len(found)} evaluations; before and after need two (eval_on_start: "
            "true)."
        )
    return found


def table(first: dict, last: dict) -> str:
    lines = [
        f"{'held-out divergence (nats per token)':38}{'before':>9}    "
        f"{'after':>7}{'after/before':>15}"
    ]
    for key, label in ROWS.items():
        before, after = first[key], last[key]
        lines.append(f"  {label:36}{before:9.3f} -> {after:7.3f}{after / before:15.2f}")
    return "\n".join(lines)


def conversation(answers: dict) -> str:
    lines = []
    for number, prompt in enumerate(answers["prompts"]):
        lines.append(f"\nPrompt: {prompt}")
        for key, label in (
            ("before", "student before"),
            ("after", "student after"),
            ("teacher", "teacher"),
        ):
            text = textwrap.wrap(answers[key][number], width=84) or [""]
            lines += [f"  {label:15} {text[0]}", *(f"{'':18}{line}" for line in text[1:])]
    return "\n".join(lines)


def main() -> int:
    run_dir = Path(sys.argv[1])
    rows = evaluations(run_dir)
    first, last = rows[0], rows[-1]
    print(f"After {last['step']} updates, {last['eval/samples']} held-out prompts:\n")
    print(table(first, last))
    answers = run_dir / "answers.json"
    if answers.is_file():
        print(conversation(json.loads(answers.read_text(encoding="utf-8"))))
    if last["eval/on_policy_loss"] > ENOUGH * first["eval/on_policy_loss"]:
        print(
            f"\nThe divergence on the student's own samples did not fall to {ENOUGH} of its start.",
            file=sys.stderr,
        )
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""The quickstart's text: short everyday prompts with an answer, as rows of `messages`.

    python tools/prepare_chatterbot.py --output runs/data/chatterbot

Writes `train.jsonl` and `test.jsonl` from the English part of the package `chatterbot-corpus`
(BSD-3-Clause). Of every conversation the first prompt and its first answer are used. No prompt is
in both files, whatever its case and punctuation, and none is in one file twice. The same seed gives
the same files.
"""

import argparse
import importlib.util
import json
import os
import random
import re
from pathlib import Path

import yaml

LONGEST_PROMPT = 120  # characters
LONGEST_ANSWER = 400
SKIPPED = {"coding"}  # code blocks: neither short nor everyday


def corpus_directory() -> Path:
    spec = importlib.util.find_spec("chatterbot_corpus")
    if spec is None:
        raise SystemExit(
            "The package chatterbot-corpus is not installed; run: bash tools/setup_env.sh"
        )
    return Path(spec.submodule_search_locations[0]) / "data" / "english"


def read_pairs() -> list[tuple[str, str]]:
    """(prompt, answer) of every conversation, white space tidied, in the order of the files."""
    pairs = []
    for path in sorted(corpus_directory().glob("*.yml")):
        if path.stem in SKIPPED:
            continue
        for conversation in yaml.safe_load(path.read_text(encoding="utf-8"))["conversations"]:
            # YAML reads an unquoted 42 or yes as something else than text; such turns are left out.
            if len(conversation) < 2 or not all(isinstance(turn, str) for turn in conversation[:2]):
                continue
            prompt, answer = (" ".join(turn.split()) for turn in conversation[:2])
            if 0 < len(prompt) <= LONGEST_PROMPT and 0 < len(answer) <= LONGEST_ANSWER:
                pairs.append((prompt, answer))
    return pairs


def first_of_each_prompt(pairs: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """One pair per prompt; prompts that differ only in case, spaces or punctuation count as one."""
    chosen: dict[str, tuple[str, str]] = {}
    for prompt, answer in pairs:
        chosen.setdefault(re.sub(r"[^a-z0-9]+", " ", prompt.lower()).strip(), (prompt, answer))
    return list(chosen.values())


def write_rows(path: Path, pairs: list[tuple[str, str]], system: str | None) -> None:
    start = [{"role": "system", "content": system}] if system else []
    partial = path.with_suffix(".partial")
    with partial.open("w", encoding="utf-8") as file:
        for prompt, answer in pairs:
            messages = [
                *start,
                {"role": "user", "content": prompt},
                {"role": "assistant", "content": answer},
            ]
            file.write(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")
    os.replace(partial, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--output", type=Path, required=True, help="directory for train.jsonl and test.jsonl"
    )
    parser.add_argument(
        "--system",
        help="a system message for every row (default: what the chat template puts there)",
    )
    parser.add_argument("--test-rows", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    pairs = first_of_each_prompt(read_pairs())
    random.Random(args.seed).shuffle(pairs)
    args.output.mkdir(parents=True, exist_ok=True)
    write_rows(args.output / "test.jsonl", pairs[: args.test_rows], args.system)
    write_rows(args.output / "train.jsonl", pairs[args.test_rows :], args.system)
    print(
        f"{args.output}: {len(pairs) - args.test_rows} rows to train on, {args.test_rows} held out"
    )


if __name__ == "__main__":
    main()

"""What student before, student after and teacher answer to the same prompts.

    python tools/answers.py --before runs/quickstart/models/student --after runs/quickstart/run \
        --teacher runs/quickstart/models/teacher --output runs/quickstart/run/answers.json

Writes {"prompts": [...], "before": [...], "after": [...], "teacher": [...]}, which tools/report.py
shows. Decoding is greedy, so the same models always answer the same.
"""

import argparse
import json
import os
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

# None of these is in the quickstart's training text.
PROMPTS = [
    "How are you feeling today?",
    "Why is the sky blue?",
    "My computer is very slow. What can I do?",
]


@torch.no_grad()
def answers(
    directory: Path, prompts: list[str], system: str | None, max_new_tokens: int
) -> list[str]:
    """Greedy answers of the model in `directory`, as text without special tokens."""
    tokenizer = AutoTokenizer.from_pretrained(directory, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(directory).eval()
    start = [{"role": "system", "content": system}] if system else []
    batch = tokenizer.apply_chat_template(
        [[*start, {"role": "user", "content": prompt}] for prompt in prompts],
        add_generation_prompt=True,
        padding=True,
        return_tensors="pt",
        return_dict=True,
    )
    output_ids = model.generate(**batch, do_sample=False, max_new_tokens=max_new_tokens)
    completions = tokenizer.batch_decode(
        output_ids[:, batch["input_ids"].shape[1] :], skip_special_tokens=True
    )
    return [" ".join(completion.split()) for completion in completions]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("before", "after", "teacher"):
        parser.add_argument(
            f"--{name}", type=Path, required=True, help="directory of a model and its tokenizer"
        )
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--prompts", nargs="+", default=PROMPTS)
    parser.add_argument("--system", help="a system message before every prompt")
    parser.add_argument("--max-new-tokens", type=int, default=48)
    args = parser.parse_args()

    result = {"prompts": args.prompts}
    for name in ("before", "after", "teacher"):
        result[name] = answers(getattr(args, name), args.prompts, args.system, args.max_new_tokens)
    partial = args.output.with_suffix(".partial")
    partial.write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(partial, args.output)


if __name__ == "__main__":
    main()

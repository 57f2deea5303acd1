"""Tiny models, a tokenizer and chat data for tests: real Hugging Face directories, made offline in
a second.

    PYTHONPATH=. python -m tests.tiny DIRECTORY        # writes student/, teacher/, train.jsonl and test.jsonl

The tokenizer is a byte-level BPE trained on `make_chat_rows`, with the ChatML template:
`<|im_end|>` ends a turn, and the pad token is its own. Calls with the same arguments give the same
bytes.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

SPECIAL_TOKENS = ["<|pad|>", "<|im_start|>", "<|im_end|>"]
FAMILIES = ["llama", "qwen2", "qwen3", "mistral", "gemma2", "gpt2", "opt", "gpt_neox", "phi3"]
MIXTURES = ["mixtral", "qwen3_moe"]  # of experts
# Layers that return tuples, and a cache that is more than keys and values.
UNUSUAL = ["bloom", "falcon", "qwen3_next"]
# Like the published ChatML templates: the newline after the end of a turn is not part of the
# completion.
CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

_COLOURS = ["red", "green", "blue", "black", "white", "yellow"]
_ANIMALS = ["cat", "dog", "owl", "fox", "hen", "horse", "mouse"]


def make_chat_rows(n: int, seed: int = 0) -> list[dict]:
    """`n` rows `{"messages": [...]}` of 20 to 90 tokens; some have a system turn, some two
    exchanges.
    """
    draw = random.Random(seed)
    return [{"messages": _conversation(draw)} for _ in range(n)]


def make_tokenizer(
    directory: str | Path | None = None, vocab_size: int = 384
) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of `vocab_size` (259 or more) tokens, saved to `directory` unless
    None.
    """
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    text = [
        message["content"] for row in make_chat_rows(400, seed=1) for message in row["messages"]
    ]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    raw.train_from_iterator(text + ["system", "user", "assistant"] * 20, trainer)
    assert raw.get_vocab_size() == vocab_size, (
        f"the corpus gives only {raw.get_vocab_size()} tokens"
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw,
        pad_token="<|pad|>",
        eos_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>"],
    )
    tokenizer.chat_template = CHATML
    if directory is not None:
        tokenizer.save_pretrained(directory)
    return tokenizer


def make_model(
    family: str,
    directory: str | Path | None = None,
    *,
    layers: int = 2,
    hidden: int = 64,
    seed: int = 0,
    vocab_size: int | None = None,
    tie_word_embeddings: bool = True,
    tokenizer: PreTrainedTokenizerFast | None = None,
    dtype: torch.dtype = torch.float32,
    init_range: float = 0.2,
) -> PreTrainedModel:
    """A random model of `family` (of FAMILIES, MIXTURES or UNUSUAL), saved with its tokenizer to
    `directory` unless None.

    `vocab_size` is the number of embedding rows (default: the tokenizer's; more means padding rows
    without a token). `hidden` must be a multiple of 16: there are four heads, two key/value heads
    where the family has them. `init_range` is the standard deviation of the initial weights: ten
    times the usual one, so that the distributions differ visibly from uniform ones.
    """
    known = FAMILIES + MIXTURES + UNUSUAL
    assert family in known, f"family {family!r} is none of {known}"
    tokenizer = tokenizer or make_tokenizer()
    rows = vocab_size or len(tokenizer)
    assert rows >= len(tokenizer), f"{rows} embedding rows cannot hold {len(tokenizer)} tokens"
    settings = {
        "vocab_size": rows,
        "max_position_embeddings": 512,
        "initializer_range": init_range,
        "tie_word_embeddings": tie_word_embeddings,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        **_shape(family, layers, hidden),
    }
    torch_state = torch.random.get_rng_state()
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **settings), dtype=dtype)
    torch.random.set_rng_state(torch_state)
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, bos_token_id=None
    )
    model.eval()
    if directory is not None:
        model.save_pretrained(directory)
        tokenizer.save_pretrained(directory)
    return model


def make_jsonl(path: str | Path, n: int, seed: int = 0) -> Path:
    """Write `make_chat_rows(n, seed)` to `path`, one JSON object a line."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in make_chat_rows(n, seed)))
    return path


def make_everything(
    directory: str | Path, family: str = "llama", rows: int = 64, hidden: int = 64
) -> Path:
    """`student/`, `teacher/` (2 and 3 layers, one tokenizer), `train.jsonl`, `test.jsonl` in
    `directory`.
    """
    directory = Path(directory)
    tokenizer = make_tokenizer()
    make_model(family, directory / "student", seed=1, hidden=hidden, tokenizer=tokenizer)
    make_model(family, directory / "teacher", seed=2, hidden=hidden, layers=3, tokenizer=tokenizer)
    make_jsonl(directory / "train.jsonl", rows, seed=3)
    make_jsonl(directory / "test.jsonl", max(8, rows // 8), seed=4)
    return directory


def _shape(family: str, layers: int, hidden: int) -> dict:
    """The config fields that set depth and width; families disagree about their names."""
    if family == "gpt2":
        return {"n_layer": layers, "n_embd": hidden, "n_head": 4}
    if family == "bloom":
        return {"n_layer": layers, "hidden_size": hidden, "n_head": 4}
    common = {"num_hidden_layers": layers, "hidden_size": hidden, "num_attention_heads": 4}
    if family == "falcon":
        return common
    if family == "opt":
        return {**common, "ffn_dim": 2 * hidden, "word_embed_proj_dim": hidden}
    common["intermediate_size"] = 2 * hidden
    if family == "gpt_neox":
        return common
    common["num_key_value_heads"] = 2
    if family in MIXTURES:
        common |= {"num_experts_per_tok": 2, "moe_intermediate_size": hidden}
        common["num_local_experts" if family == "mixtral" else "num_experts"] = 4
    if family in ("qwen3", "qwen3_moe", "gemma2"):
        common["head_dim"] = hidden // 4
    if family == "qwen3_next":
        common |= {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": hidden}
        common |= {"shared_expert_intermediate_size": hidden, "head_dim": hidden // 4}
        common |= {"layer_types": ["linear_attention"] * (layers - 1) + ["full_attention"]}
        common |= {"linear_num_key_heads": 2, "linear_num_value_heads": 4}
        common |= {"linear_key_head_dim": hidden // 4, "linear_value_head_dim": hidden // 4}
    if family == "gemma2":
        common |= {"query_pre_attn_scalar": hidden // 4, "sliding_window": 64}
    return common


def _conversation(draw: random.Random) -> list[dict]:
    turns = [{"role": "system", "content": "Answer in few words."}] if draw.random() < 0.3 else []
    for _ in range(1 + (draw.random() < 0.2)):
        question, answer = _sum(draw) if draw.random() < 0.5 else _colour(draw)
        turns += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return turns


def _sum(draw: random.Random) -> tuple[str, str]:
    a, b = draw.randint(0, 99), draw.randint(0, 99)
    return f"What is {a} plus {b}?", f"{a} plus {b} is {a + b}."


def _colour(draw: random.Random) -> tuple[str, str]:
    colour, animal, other = draw.choice(_COLOURS), draw.choice(_ANIMALS), draw.choice(_ANIMALS)
    return (
        f"The {animal} is {colour} and so is the {other}. What colour is the {animal}?",
        f"The {animal} is {colour}, just like the {other}.",
    )


if __name__ == "__main__":
    print(make_everything(sys.argv[1]))

"""The work that every side of the benchmark does: two random models, a tokenizer, prompts,
completion lengths.

Real Hugging Face directories, so that each trainer loads them as it would load anything else. The
numbers are those of the project's measurements: a student of 4 layers x 256 and a teacher of 8
layers x 512 (Llama), 50 prompt tokens.

Lengths are forced in a way that costs no side anything. The weights are made so that the end token
is never drawn (`_never_end`): completions are then as long as the budget. In the ragged case each
sample has a length of its own, known by its prompt; the peers get it as a stopping criterion of
transformers, gkd_ds as the limit of a sample.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SPECIAL = ["<end>", "<user>", "<assistant>"]
END = 0  # ends a completion, and pads
TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ '<user> ' + m['content'] + ' ' }}"
    "{% else %}{{ '<assistant> ' + m['content'] + ' <end>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant> ' }}{% endif %}"
)
SHAPES = {
    "student": {
        "num_hidden_layers": 4,
        "hidden_size": 256,
        "intermediate_size": 704,
        "num_attention_heads": 4,
    },
    "teacher": {
        "num_hidden_layers": 8,
        "hidden_size": 512,
        "intermediate_size": 1408,
        "num_attention_heads": 8,
    },
}
PROMPT_TOKENS = 50


@dataclass(frozen=True)
class Workload:
    """One update of one rank: `micro_batches` x `rows` samples, at most `budget` sampled tokens
    each.
    """

    vocabulary: int
    rows: int = 4
    micro_batches: int = 2
    budget: int = 64
    ragged: bool = False

    @property
    def samples(self) -> int:
        return self.rows * self.micro_batches

    def lengths(self, window_samples: int, windows: int) -> list[int]:
        """Completion tokens of each sample in the order of the data; every window has the same
        lengths, shuffled.

        Ragged lengths are the quantiles of a log-normal distribution with a mean of about a third
        of the budget.
        """
        if not self.ragged:
            return [self.budget] * window_samples * windows
        sigma = 0.9
        mu = math.log(self.budget / 3) - sigma**2 / 2
        normal = NormalDist(mu, sigma)
        quantiles = [
            normal.inv_cdf((place + 0.5) / window_samples) for place in range(window_samples)
        ]
        of_window = [max(2, min(self.budget, round(math.exp(q)))) for q in quantiles]
        draw, lengths = random.Random(0), []
        for _ in range(windows):
            draw.shuffle(of_window)
            lengths += of_window
        return lengths


def make_models(directory: Path, vocabulary: int) -> None:
    """`student/` and `teacher/` with their tokenizer, unless they are there."""
    for role, seed in (("student", 1), ("teacher", 2)):
        place = directory / role
        if not (place / "tokenizer.json").exists():
            _model(role, vocabulary, seed).save_pretrained(place)
            make_tokenizer(vocabulary).save_pretrained(place)


def make_prompts(vocabulary: int, count: int, seed: int = 0) -> list[str]:
    """Texts of PROMPT_TOKENS - 2 tokens (the template adds two), all different."""
    draw = random.Random(seed)
    return [
        " ".join(f"w{draw.randrange(3, vocabulary)}" for _ in range(PROMPT_TOKENS - 2))
        for _ in range(count)
    ]


def prompt_ids(prompt: str) -> tuple[int, ...]:
    """What the tokenizer makes of a prompt with the template around it."""
    return (1, *(int(word[1:]) for word in prompt.split()), 2)


def _model(role: str, vocabulary: int, seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    shape = SHAPES[role]
    config = LlamaConfig(
        vocab_size=vocabulary,
        num_key_value_heads=shape["num_attention_heads"] // 2,
        max_position_embeddings=2048,
        initializer_range=0.05,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=END,
        pad_token_id=END,
        **shape,
    )
    model = LlamaForCausalLM(config)
    _never_end(model)
    return model


@torch.no_grad()
def _never_end(model: LlamaForCausalLM) -> None:
    """Dimension 0 of the residual stream is 1 for every token, and the end token's logit is -60
    times what becomes of it: the end token is out of reach of sampling, at no cost to anybody.
    """
    model.model.embed_tokens.weight[:, 0] = 1.0
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight[0] = 0.0
        layer.mlp.down_proj.weight[0] = 0.0
    model.lm_head.weight[END] = 0.0
    model.lm_head.weight[END, 0] = -60.0


def make_tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    words = {token: index for index, token in enumerate(SPECIAL)}
    words |= {f"w{index}": index for index in range(len(SPECIAL), vocabulary)}
    raw = Tokenizer(models.WordLevel(words, unk_token=SPECIAL[0]))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<end>", pad_token="<end>")
    tokenizer.chat_template = TEMPLATE
    return tokenizer

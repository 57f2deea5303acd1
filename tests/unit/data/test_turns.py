"""What a chat template is given, what of it becomes the completion, and what is said of the rest."""

import json
import logging

import datasets
import pytest
import transformers

from gkd_ds.config.config import GKDConfig
from gkd_ds.data import examples as examples_module
from gkd_ds.data.examples import RowEncoder, tokenize
from gkd_ds.data.files import read_dataset
from gkd_ds.data.tokenizer import stop_token_ids
from gkd_ds.runtime.errors import InputError
from tests.unit.data.chats import (
    ANSWER,
    CHAT,
    LLAMA2,
    NO_END,
    QWEN2,
    THINKING,
    USER,
    byte_level_tokenizer,
    encoder_for,
    write_jsonl,
)

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "parameters": {"type": "object", "properties": {"town": {"type": "string"}}},
        },
    }
]
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"town": "Ulm"}}}
OTHER_CALL = {"type": "function", "function": {"name": "time", "arguments": {"zone": 1}}}
ANSWERED_CALL = [
    {"role": "user", "content": "Rain in Ulm?"},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "name": "weather", "content": "dry"},
    {"role": "assistant", "content": "No."},
]

# As Qwen and Llama write them: tools in front, calls as JSON; `in` and `is defined` tell a missing
# field from one that is null.
CALLING = (
    "{% if tools %}{{ 'TOOLS' + (tools | tojson) + '<|im_end|>\n' }}{% endif %}"
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' }}"
    "{% if message.name is defined %}{{ message.name + ': ' }}{% endif %}"
    "{% if 'content' in message %}{{ message.content }}{% endif %}"
    "{% if 'tool_calls' in message %}{% for call in message.tool_calls %}"
    "{{ '<call>' + (call.function | tojson) }}{% endfor %}{% endif %}"
    "{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# As Qwen3: thoughts are shown in the last turn alone; the prompt opens none, or an empty one.
QWEN3 = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' }}"
    "{% if message.role == 'assistant' and message.reasoning_content is defined and loop.last %}"
    "{{ '<think>\n' + message.reasoning_content + '\n</think>\n\n' }}{% endif %}"
    "{{ message.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is defined and not enable_thinking %}{{ '<think>\n\n</think>\n\n' }}"
    "{% endif %}{% endif %}"
)


def opens(opened: str, then: str = "", closing: str = "</think>") -> str:
    """A template whose prompt opens a thought, and which shows a finished turn as it was."""
    return (
        "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' }}"
        "{% if message.reasoning_content %}{{ '" + opened + then + "' + message.reasoning_content"
        " + '" + closing + "' }}{% endif %}{{ message.content + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n" + opened + "\n' }}{% endif %}"
    )


# Without a generation prompt: one that shows roles, and ones that show none.
NO_PROMPT = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' + message.content "
    "+ '<|im_end|>\n' }}{% endfor %}"
)


def texts(tokenizer, config, row) -> tuple[str, str]:
    encoder = encoder_for(tokenizer, config)
    return tuple(tokenizer.decode(ids) for ids in encoder.encode(row))


def as_jsonl(rows, tmp_path):
    return read_dataset(write_jsonl(tmp_path / "rows.jsonl", rows), "train")


def as_parquet(rows, tmp_path):
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "rows.parquet")
    return read_dataset(str(tmp_path / "rows.parquet"), "train")


READERS = {
    "list": lambda rows, tmp_path: rows,
    "dataset": lambda rows, tmp_path: datasets.Dataset.from_list(rows),
    "jsonl": as_jsonl,
    "parquet": as_parquet,
}


def tokens_of(rows, tokenizer, tmp_path, **fields):
    config = GKDConfig(output_dir=str(tmp_path / "run"), **fields)
    stops = stop_token_ids(tokenizer, None)
    return tokenize(rows, tokenizer, config, "my data", stops)


def said(caplog) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


# -- What reaches the template is what apply_chat_template would be given

GIVEN = {
    "tools": (CALLING, {"messages": CHAT, "tools": TOOLS}),
    "tools as text": (CALLING, {"messages": CHAT, "tools": json.dumps(TOOLS)}),
    "no tools": (CALLING, {"messages": CHAT, "tools": []}),
    "tools beside prompt and completion": (
        CALLING,
        {"prompt": CHAT[:-1], "completion": CHAT[-1:], "tools": TOOLS},
    ),
    "a call and its result": (CALLING, {"messages": ANSWERED_CALL, "tools": TOOLS}),
    "a call as the answer": (CALLING, {"messages": ANSWERED_CALL[:2], "tools": TOOLS}),
    "a call beside text": (
        CALLING,
        {"messages": [USER, {**ANSWER, "tool_calls": [CALL, OTHER_CALL]}], "tools": TOOLS},
    ),
    "thinking off": (QWEN3, {"messages": CHAT, "chat_template_kwargs": {"enable_thinking": False}}),
    "thinking off as text": (
        QWEN3,
        {"messages": CHAT, "chat_template_kwargs": '{"enable_thinking": false}'},
    ),
    "a thought": (QWEN3, {"messages": [USER, {**ANSWER, "reasoning_content": "Hm."}]}),
    "a thought under its other name": (QWEN3, {"messages": [USER, {**ANSWER, "thinking": "Hm."}]}),
    "thoughts that the history loses": (
        QWEN3,
        {"messages": [USER, {**ANSWER, "reasoning_content": "Hm."}, USER, ANSWER]},
    ),
    "a thought that the prompt opens": (
        opens("<think>", r"\n"),
        {"messages": [USER, {**ANSWER, "reasoning_content": "Hm."}]},
    ),
    "a thought opened by a word": (
        opens("w200", r"\n", closing="w201"),
        {"messages": [USER, {**ANSWER, "reasoning_content": "Hm."}]},
    ),
    "a name": (CALLING, {"messages": [{**USER, "name": "Ann"}, ANSWER]}),
}


def beside(case: str, row: dict) -> dict:
    """Another row, without what the case is about; a thought, where the prompt opens one."""
    thought = {"reasoning_content": "Aha."} if "opens" in case or "opened" in case else {}
    messages = [*CHAT[:-1], {**CHAT[-1], **thought}]
    if "messages" in row:
        return {"messages": messages}
    return {"prompt": messages[:-1], "completion": messages[-1:]}


@pytest.mark.parametrize("case", GIVEN)
@pytest.mark.parametrize("reader", READERS)
def test_the_prompt_and_the_completion_are_transformers_own(tmp_path, caplog, reader, case):
    """Arrow fills the fields that only one of two rows has with nulls: they change nothing."""
    template, row = GIVEN[case]
    tokenizer = byte_level_tokenizer(template)
    rows = READERS[reader]([row, beside(case, row)], tmp_path)
    examples = tokens_of(rows, tokenizer, tmp_path)
    given = {"tools": row.get("tools") or None, **loaded(row.get("chat_template_kwargs", {}))}
    given["tools"] = loaded(given["tools"])
    messages = row.get("messages") or row["prompt"] + row["completion"]
    prompt = tokenizer.apply_chat_template(
        messages[:-1], add_generation_prompt=True, tokenize=False, **given
    )
    whole = tokenizer.apply_chat_template(messages, tokenize=False, **given)
    header = prompt.removesuffix("<think>\n\n</think>\n\n")  # an empty thought, of the prompt
    assert whole.startswith(header)
    assert tokenizer.decode(examples.prompt_ids[0]) == prompt
    assert tokenizer.decode(examples.completion_ids[0]) + "\n" == whole[len(header) :]
    assert not said(caplog)


def loaded(value):
    return json.loads(value) if isinstance(value, str) else value


def test_a_template_for_tools_is_used_where_there_are_tools(config):
    tokenizer = byte_level_tokenizer({"default": QWEN2, "tool_use": CALLING})
    assert texts(tokenizer, config, {"messages": CHAT, "tools": TOOLS})[0].startswith("TOOLS")
    assert "helpful assistant" in texts(tokenizer, config, {"messages": CHAT})[0]


# -- Thoughts that the prompt opens

SPACED = opens("<think>", closing="</think>")  # no line break behind it in a finished turn


@pytest.mark.parametrize(
    "template, message, completion",
    [
        (SPACED, {"content": "Four", "reasoning_content": "It is 4."}, "It is 4.</think>Four"),
        (THINKING, {"content": "<think>\nIt is 4.</think>Four"}, "It is 4.</think>Four"),
        (THINKING, {"content": "It is 4.</think>Four"}, "It is 4.</think>Four"),
        (opens("[THINK]"), {"content": "It is 4.[/THINK]Four"}, "It is 4.[/THINK]Four"),
        (opens("w200"), {"content": "w200 It is 4. w201 Four"}, " It is 4. w201 Four"),
    ],
)
def test_an_opened_thought_is_in_the_completion(config, template, message, completion):
    tokenizer = byte_level_tokenizer(template)
    row = {"messages": [USER, {"role": "assistant", **message}]}
    assert texts(tokenizer, config, row)[1] == completion + "<|im_end|>"


@pytest.mark.parametrize(
    "template, message",
    [
        (THINKING, {"content": "Four"}),
        (THINKING, {"content": "Four", "reasoning_content": "It is 4."}),  # not shown by it
        (opens("<think>"), {"content": "Four"}),
        (opens("[THINK]"), {"content": "It is 4.</think>Four"}),
        (opens("w200"), {"content": "Four"}),
        (opens("w200"), {"content": "Four", "reasoning_content": ""}),
    ],
)
def test_an_answer_inside_an_opened_thought_is_refused(config, template, message):
    """The student would learn to answer where it is to think."""
    encoder = encoder_for(byte_level_tokenizer(template), config)
    with pytest.raises(InputError, match="prompt ends in .*does not show this answer behind it"):
        encoder.encode({"messages": [USER, {"role": "assistant", **message}]})


@pytest.mark.parametrize("template", [THINKING, opens("<think>"), opens("w200")])
def test_an_answer_that_nobody_learns_may_be_any(config, caplog, template):
    """On-policy throughout, only the prompt counts: thinking students are trained on plain chats."""
    tokenizer = byte_level_tokenizer(template)
    stops = stop_token_ids(tokenizer, None)
    examples = tokenize(
        [{"messages": CHAT}], tokenizer, config, "my data", stops, are_learned=False
    )
    expected = tokenizer.apply_chat_template(CHAT[:-1], add_generation_prompt=True, tokenize=False)
    assert tokenizer.decode(examples.prompt_ids[0]) == expected
    assert "answers that do not continue it are poor references" in said(caplog)[0]


# -- Templates that show a prompt and its answer in other ways


def test_a_header_that_differs_in_spaces_alone_belongs_to_neither(config):
    template = NO_END.replace("### assistant\n", "### assistant\n\n")
    prompt, completion = texts(byte_level_tokenizer(template), config, {"messages": CHAT})
    assert prompt.endswith("### assistant\n\n") and completion.startswith("The quick brown fox")


def test_a_template_without_a_generation_prompt_is_said(tmp_path, caplog):
    tokenizer = byte_level_tokenizer(NO_PROMPT)
    examples = tokens_of([{"messages": CHAT}] * 2, tokenizer, tmp_path)
    assert tokenizer.decode(examples.completion_ids[0]).startswith("<|im_start|>assistant\nThe")
    (sentence,) = said(caplog)
    assert "no generation prompt, so '<|im_start|>assistant' is part of what" in sentence


def test_a_template_that_shows_no_header_at_all_needs_no_generation_prompt(tmp_path, caplog):
    tokenizer = byte_level_tokenizer(LLAMA2, bos_token="<|im_start|>")
    examples = tokens_of([{"messages": CHAT}], tokenizer, tmp_path)
    assert tokenizer.decode(examples.completion_ids[0]).startswith(" The quick")
    assert not said(caplog)


def test_an_answer_that_the_template_shortens_is_said(tmp_path, caplog):
    template = THINKING.replace(" <think>\n", " ")
    row = {"messages": [USER, {**ANSWER, "content": "It is 4.</think>Four"}]}
    tokens_of([row], byte_level_tokenizer(template), tmp_path)
    assert said(caplog) == ["my data: of some answers the chat template prints only a part"]


# -- What has no effect is said, once

UNREAD = {
    "columns": (QWEN2, {"messages": CHAT, "id": 7, "prompt": "Hi"}, ["columns", "'id', 'prompt'"]),
    "tools beside strings": (
        CALLING,
        {"prompt": "Hi", "completion": "Ho", "tools": TOOLS},
        ["columns", "'tools'"],
    ),
    "tools": (QWEN2, {"messages": CHAT, "tools": TOOLS}, ["does not read: 'tools'"]),
    "variables": (
        QWEN2,
        {"messages": CHAT, "chat_template_kwargs": {"enable_thinking": True}},
        ["does not read: 'enable_thinking'"],
    ),
    "fields": (
        QWEN2,
        {"messages": [{**USER, "weight": 1}, {**ANSWER, "reasoning_content": "Hm."}]},
        ["does not read: 'reasoning_content', 'weight'"],
    ),
}


@pytest.mark.parametrize("case", UNREAD)
@pytest.mark.parametrize("reader", READERS)
def test_what_has_no_effect_is_said_once(tmp_path, caplog, reader, case):
    template, row, parts = UNREAD[case]
    rows = READERS[reader]([row] * 3, tmp_path)
    examples = tokens_of(rows, byte_level_tokenizer(template), tmp_path)
    (sentence,) = said(caplog)
    assert sentence.startswith("my data: ") and all(part in sentence for part in parts)
    known = {name: row[name] for name in ("messages", "prompt", "completion") if name in row}
    if "messages" in known:
        known = {
            "messages": [{"role": m["role"], "content": m["content"]} for m in row["messages"]]
        }
    plain = tokens_of([known] * 3, byte_level_tokenizer(template), tmp_path)
    assert examples.fingerprint == plain.fingerprint


@pytest.mark.parametrize("workers", [1, 2])
def test_it_is_said_whatever_the_number_of_processes(tmp_path, caplog, monkeypatch, workers):
    monkeypatch.setattr(examples_module, "PARALLEL_ROWS", 4)
    rows = [{"messages": CHAT, f"column {index % 2}": 1} for index in range(6)]
    dataset = as_jsonl(rows, tmp_path)
    tokens_of(dataset, byte_level_tokenizer(QWEN2), tmp_path, dataset_num_proc=workers)
    assert said(caplog) == ["my data: these columns have no effect: 'column 0', 'column 1'"]


def test_only_the_first_rank_says_it(tmp_path, caplog, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    tokens_of([{"messages": CHAT, "id": 1}], byte_level_tokenizer(QWEN2), tmp_path)
    assert not said(caplog)


@pytest.mark.parametrize("place", [1, 3])
def test_calls_that_the_template_does_not_print_are_refused(config, place):
    messages = [{**message} for message in CHAT]
    messages[place]["tool_calls"] = [CALL]
    with pytest.raises(InputError, match="'tool_calls', which the chat template does not print"):
        encoder_for(byte_level_tokenizer(QWEN2), config).encode({"messages": messages})


def test_a_stop_token_inside_a_thought_or_a_call_is_refused(config):
    encoder = encoder_for(byte_level_tokenizer(CALLING), config)
    call = {"function": {"name": "f", "arguments": {"text": "a<|im_end|>b"}}}
    with pytest.raises(InputError, match="stop token '<|im_end|>'"):
        encoder.encode({"messages": [USER, {**ANSWER, "tool_calls": [call]}]})


# -- Stop tokens that are words


def test_a_word_that_is_a_stop_token_does_not_cut_an_answer(tmp_path, caplog):
    tokenizer = byte_level_tokenizer(QWEN2)
    (word,) = tokenizer.encode(" fox")[-1:]
    assert tokenizer.decode([word]).strip(), "an ordinary piece of text"
    stops = [*stop_token_ids(tokenizer, None), word]
    config = GKDConfig(output_dir=str(tmp_path))
    row = {"messages": [USER, {**ANSWER, "content": "The fox is lazy"}]}
    examples = tokenize([row], tokenizer, config, "my data", stops)
    expected = tokenize([row], tokenizer, config, "my data", stop_token_ids(tokenizer, None))
    assert examples.fingerprint == expected.fingerprint
    assert "answers go on behind stop tokens that are words" in said(caplog)[0]
    template = QWEN2.replace("'<|im_end|>'", "' fox<|im_end|>'")  # it ends the turn, too
    tokenizer.chat_template = template
    encoder = RowEncoder.build(tokenizer, stops, GKDConfig(max_length=None))
    assert tokenizer.decode(encoder.encode({"messages": CHAT[:2]})[1]).endswith("today? fox")


def test_templates_and_rows_are_not_changed(config):
    row = {"messages": ANSWERED_CALL, "tools": TOOLS, "chat_template_kwargs": {"a": None}}
    before = json.dumps(row)
    texts(byte_level_tokenizer(CALLING), config, row)
    assert json.dumps(row) == before
    assert transformers  # the oracle above is its apply_chat_template

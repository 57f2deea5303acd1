"""Any row gives a Row or one sentence."""

import pytest
from hypothesis import given, settings

from gkd_ds.data.rows import Row, parse_row
from gkd_ds.runtime.errors import InputError
from tests.unit.data.chats import ANSWER, CHAT, USER
from tests.unit.data.fuzz import ROW


def test_content_in_text_parts_is_joined():
    parts = [{"type": "text", "text": "Hello "}, {"type": "text", "text": "there", "image": None}]
    row = parse_row({"messages": [{"role": "user", "content": parts}, CHAT[1]]})
    assert row == Row([{"role": "user", "content": "Hello there"}], CHAT[1])


DEEP: list = []
for _ in range(60):
    DEEP = [DEEP]

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
    ({"messages": [USER, ANSWER], "tools": "no JSON"}, "'tools' is text that is not valid JSON"),
    ({"messages": [USER, ANSWER], "tools": {"name": "f"}}, "'tools' must be a list of .* not dict"),
    ({"messages": [USER, ANSWER], "tools": [{"name": "\0"}]}, "'tools' contains a NUL"),
    ({"messages": [USER, ANSWER], "chat_template_kwargs": [1]}, "must be an object .* not list"),
    (
        {"messages": [USER, ANSWER], "chat_template_kwargs": {"tokenize": True}},
        "sets 'tokenize', which is no variable of the template",
    ),
    ({"messages": [USER, {**ANSWER, "extra": {"a": "\0"}}]}, "field 'extra', contains a NUL"),
    ({"messages": [USER, {**ANSWER, "extra": DEEP}]}, "nested more than 50 levels deep"),
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

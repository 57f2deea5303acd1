"""One row of a dataset, checked but not yet tokenised."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from gkd_ds.runtime.errors import InputError, name_list, quote, type_name

ROLES = ("system", "developer", "user", "assistant", "tool")
COLUMNS = ("messages", "prompt", "completion", "tools", "chat_template_kwargs")
# What apply_chat_template takes beside the template's own variables, and the variables that other
# columns fill.
NOT_FOR_TEMPLATES = frozenset(
    "conversation messages tools chat_template add_generation_prompt continue_final_message "
    "tokenize sanitize_control_tokens padding truncation max_length return_tensors return_dict "
    "return_assistant_tokens_mask tokenizer_kwargs".split()
)

DEEPEST = 50  # levels of what a message or a tool holds

Message = dict[str, Any]


@dataclass(frozen=True)
class Row:
    """A row that passed every check: messages and the assistant message that answers them, or two
    strings.

    `tools` and `template_kwargs` are what the chat template is given beside the messages. `unread`
    names the row's columns that have a value and no effect.
    """

    prompt: list[Message] | str
    completion: Message | str
    tools: list[dict] | None = None
    template_kwargs: dict[str, Any] = field(default_factory=dict)
    unread: tuple[str, ...] = ()


def parse_row(row: object) -> Row:
    """Check one row and split it into prompt and completion: its last turn.

    Raises InputError with a clause about the row ("messages[1] has ..."); the caller puts file and
    row in front.
    """
    return parse_turns(row, every_turn=False)[0]


def parse_turns(row: object, every_turn: bool) -> list[Row]:
    """Check one row and split it into prompts and completions: its last turn, or each that an
    assistant has, with all that comes before it as its prompt. Raises as parse_row does.
    """
    if not isinstance(row, Mapping):
        raise InputError(f"the row must be an object with fields, not {type_name(row)}")
    if row.get("messages") is not None:
        messages = _parse_messages(row["messages"], "messages")
        return _turns(row, messages, {"messages"}, 0 if every_turn else None)
    prompt, completion = row.get("prompt"), row.get("completion")
    if prompt is None or completion is None:
        filled = [name for name, value in row.items() if value is not None]
        raise InputError(
            "the row needs 'messages', or 'prompt' and 'completion'; its non-empty fields are: "
            f"{name_list(filled)}"
        )
    if isinstance(prompt, str) and isinstance(completion, str):
        for name, text in (("prompt", prompt), ("completion", completion)):
            if not text:
                raise InputError(f"'{name}' is empty")
            _check_text(text, f"'{name}'")
        return [Row(prompt, completion, unread=_unread(row, {"prompt", "completion"}))]
    if isinstance(prompt, list) and isinstance(completion, list):
        answer = _parse_messages(completion, "completion")
        if all(message["role"] != "assistant" for message in answer):
            raise InputError("'completion' has no message with the role 'assistant'")
        shown = _parse_messages(prompt, "prompt")
        first = len(shown) if every_turn else None
        return _turns(row, shown + answer, {"prompt", "completion"}, first)
    raise InputError(
        "'prompt' and 'completion' must be two strings or two lists of messages, "
        f"not {type_name(prompt)} and {type_name(completion)}"
    )


def _turns(row: Mapping, messages: list[Message], read: set[str], first: int | None) -> list[Row]:
    """Cut a conversation at its last assistant turn, or at each from message `first` on; what
    follows the last one has no answer and is dropped.
    """
    turns = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    if not turns:
        raise InputError("no message has the role 'assistant'")
    if turns[-1] == 0:
        raise InputError("the assistant's turn has no message before it")
    # A greeting that opens the conversation answers nothing.
    wanted = turns[-1:] if first is None else [turn for turn in turns if turn >= max(first, 1)]
    for turn in wanted:
        answer, which = messages[turn], "last " if turn == turns[-1] else ""
        if not answer.get("content", "").strip() and not answer.get("tool_calls"):
            raise InputError(f"the {which}assistant message is empty" + _place(turn, turns))
    tools, template_kwargs = _parse_tools(row.get("tools")), _parse_kwargs(row)
    unread = _unread(row, read | {"tools", "chat_template_kwargs"})
    return [Row(messages[:turn], messages[turn], tools, template_kwargs, unread) for turn in wanted]


def _place(turn: int, turns: list[int]) -> str:
    return "" if turn == turns[-1] else f" (messages[{turn}])"


def _unread(row: Mapping, read: set[str]) -> tuple[str, ...]:
    return tuple(str(name) for name, value in row.items() if name not in read and value is not None)


def _parse_tools(value: object) -> list[dict] | None:
    """The tools of a conversation: JSON schemas, or their JSON text; None if there are none."""
    tools = _plain(_decoded(value, "tools"), "'tools'")
    if not tools:
        return None
    if not isinstance(tools, list):
        raise InputError(
            f"'tools' must be a list of JSON schemas, or their JSON text, not {type_name(value)}"
        )
    return tools


def _parse_kwargs(row: Mapping) -> dict[str, Any]:
    """Further variables of the chat template, such as enable_thinking."""
    given = _decoded(row.get("chat_template_kwargs"), "chat_template_kwargs")
    kwargs = _plain(given, "'chat_template_kwargs'") or {}
    if not isinstance(kwargs, dict):
        raise InputError(
            f"'chat_template_kwargs' must be an object of names and values, not {type_name(given)}"
        )
    for name in kwargs:
        if name in NOT_FOR_TEMPLATES:
            raise InputError(
                f"'chat_template_kwargs' sets {quote(name)}, which is no variable of the template; "
                "remove it"
            )
    return kwargs


def _decoded(value: object, column: str) -> object:
    """A column of nested values may hold their JSON text, as rows of one Arrow type must."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value) if value.strip() else None
    except (ValueError, RecursionError) as error:
        raise InputError(f"'{column}' is text that is not valid JSON") from error


def _parse_messages(messages: object, field: str) -> list[Message]:
    if not isinstance(messages, list):
        raise InputError(f"'{field}' must be a list of messages, not {type_name(messages)}")
    if not messages:
        raise InputError(f"'{field}' is an empty list")
    return [_parse_message(message, f"{field}[{index}]") for index, message in enumerate(messages)]


def _parse_message(message: object, place: str) -> Message:
    """Role, content and whatever else the message says, for the template to print or not.

    Nulls are left out, as transformers leaves them out: Arrow writes them where another row has a
    field.
    """
    if not isinstance(message, Mapping):
        raise InputError(
            f"{place} must be an object with 'role' and 'content', not {type_name(message)}"
        )
    role = message.get("role")
    if not isinstance(role, str):
        raise InputError(f"{place} needs a 'role' that is text, not {type_name(role)}")
    if role not in ROLES:
        raise InputError(
            f"{place} has the unknown role {quote(role)}; known are {', '.join(ROLES)}"
        )
    parsed = {key: value for key, value in message.items() if isinstance(key, str)}
    may_be_empty = bool(message.get("tool_calls"))
    parsed["content"] = _parse_content(message.get("content"), place, may_be_empty)
    return {
        key: _plain(value, f"{place}, field {quote(key)},")
        for key, value in parsed.items()
        if value is not None
    }


def _plain(value: Any, place: str, depth: int = 0) -> Any:
    """`value` without nulls inside and with its text checked; `place` begins the sentence of a
    refusal.
    """
    if depth > DEEPEST:
        raise InputError(f"{place} is nested more than {DEEPEST} levels deep")
    if isinstance(value, Mapping):
        return {
            _plain(name, place): _plain(inner, place, depth + 1)
            for name, inner in value.items()
            if inner is not None
        }
    if isinstance(value, list):
        return [_plain(inner, place, depth + 1) for inner in value]
    if isinstance(value, str):
        _check_text(value, place)
    return value


def _parse_content(content: object, place: str, may_be_empty: bool) -> str | None:
    """The text of a message, its parts joined; None where there is none and need not be."""
    if isinstance(content, str) or (content is None and may_be_empty):
        return content
    if not isinstance(content, list):
        raise InputError(f"{place} needs a 'content' that is text, not {type_name(content)}")
    texts = []
    for part in content:
        if (
            not isinstance(part, Mapping)
            or part.get("type") != "text"
            or not isinstance(part.get("text"), str)
        ):
            raise InputError(
                f"{place} has a content part that is not {{'type': 'text', 'text': ...}}"
            )
        texts.append(part["text"])
    return "".join(texts)


def _check_text(text: str, place: str) -> None:
    if "\x00" in text:
        raise InputError(f"{place} contains a NUL character at position {text.index(chr(0))}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{place} contains a lone surrogate at position {error.start}") from error

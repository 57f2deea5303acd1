"""One row of a dataset, checked but not yet tokenised."""

from collections.abc import Mapping
from dataclasses import dataclass

from gkd_ds.runtime.errors import InputError, name_list, quote, type_name

ROLES = ("system", "developer", "user", "assistant", "tool")
COLUMNS = ("messages", "prompt", "completion")


@dataclass(frozen=True)
class Row:
    """A row that passed every check: messages and the assistant message that answers them, or two
    strings.
    """

    prompt: list[dict[str, str]] | str
    completion: dict[str, str] | str


def parse_row(row: object) -> Row:
    """Check one row and split it into prompt and completion.

    Raises InputError with a clause about the row ("messages[1] has ..."); the caller puts file and
    row in front.
    """
    if not isinstance(row, Mapping):
        raise InputError(f"the row must be an object with fields, not {type_name(row)}")
    if row.get("messages") is not None:
        return _split(_parse_messages(row["messages"], "messages"))
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
        return Row(prompt, completion)
    if isinstance(prompt, list) and isinstance(completion, list):
        answer = _parse_messages(completion, "completion")
        if all(message["role"] != "assistant" for message in answer):
            raise InputError("'completion' has no message with the role 'assistant'")
        return _split(_parse_messages(prompt, "prompt") + answer)
    raise InputError(
        "'prompt' and 'completion' must be two strings or two lists of messages, "
        f"not {type_name(prompt)} and {type_name(completion)}"
    )


def _split(messages: list[dict[str, str]]) -> Row:
    """Cut a conversation at its last assistant turn; what follows it has no answer and is
    dropped.
    """
    turns = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    if not turns:
        raise InputError("no message has the role 'assistant'")
    last = turns[-1]
    if last == 0:
        raise InputError("the assistant's turn has no message before it")
    if not messages[last]["content"].strip():
        raise InputError("the last assistant message is empty")
    return Row(messages[:last], messages[last])


def _parse_messages(messages: object, field: str) -> list[dict[str, str]]:
    if not isinstance(messages, list):
        raise InputError(f"'{field}' must be a list of messages, not {type_name(messages)}")
    if not messages:
        raise InputError(f"'{field}' is an empty list")
    return [_parse_message(message, f"{field}[{index}]") for index, message in enumerate(messages)]


def _parse_message(message: object, place: str) -> dict[str, str]:
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
    if message.get("tool_calls"):
        raise InputError(f"{place} has 'tool_calls'; write the call into 'content' as text")
    # Templates know further text fields (name, reasoning_content, ...); what is not text is not for
    # them.
    texts = {
        key: value
        for key, value in message.items()
        if isinstance(key, str) and isinstance(value, str)
    }
    texts["content"] = _parse_content(message.get("content"), place)
    for key, text in texts.items():
        _check_text(text, f"{place}, field {quote(key)},")
    return texts


def _parse_content(content: object, place: str) -> str:
    if isinstance(content, str):
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

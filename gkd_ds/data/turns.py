"""The last turn of a conversation: what the model is shown, and what it is to write then.

    prompt, completion, follows = Turns.of(tokenizer).texts(parse_row(row))

The chat template writes the conversation twice: without the answer and with its generation prompt,
which is the prompt, and with the answer. The completion is what the second has after the first.
Where the second does not begin with the first, the template shows a finished turn otherwise than
one that is being written; then what it shows is used as far as it is what the model would write.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from gkd_ds.data.rows import Message, Row
from gkd_ds.data.tokenizer import end_of_turn_token, render
from gkd_ds.data.unread import Unread
from gkd_ds.runtime.errors import InputError

# transformers gives a thought to the template under all of its names.
THOUGHTS = frozenset({"reasoning_content", "thinking", "reasoning"})
QUESTION = {"role": "user", "content": "A question"}
# Answers that differ from their first letter to their last.
ANSWERS = ("first", "other")
# Marks such as <think> and [INST], words, spaces: what a template has as a whole or not at all.
PIECES = re.compile(r"<[^<>\s]*>|\[[^\[\]\s]*\]|\w+|\s+|.", re.DOTALL)


@dataclass(frozen=True)
class Turns:
    """The chat template of a tokenizer, and what is known of it. Worker processes can be sent it.

    `header` is what the template prints between a prompt and its answer, where it has no generation
    prompt to print it. `words` are the names that occur in the template.
    """

    tokenizer: PreTrainedTokenizerBase
    end_of_turn: str
    header: str
    words: frozenset[str]

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> Turns:
        """Raises InputError with a clause about a template that cannot be used."""
        templates = tokenizer.chat_template
        source = templates if isinstance(templates, str) else "\n".join((templates or {}).values())
        end_of_turn = end_of_turn_token(tokenizer) or ""
        words = frozenset(re.findall(r"\w+", source))
        turns = cls(tokenizer, end_of_turn, "", words)
        return dataclasses.replace(turns, header=turns._header()) if source else turns

    def texts(self, row: Row) -> tuple[str, str, bool]:
        """Prompt and completion of a conversation, and whether the one follows the other: an answer
        alone does not follow a prompt that opens a thought.

        The completion ends as the template ends it, which may be behind the end of the turn. Raises
        InputError with a clause about the row.
        """
        calls = any(message.get("tool_calls") for message in [*row.prompt, row.completion])
        if calls and "tool_calls" not in self.words:
            raise InputError(
                "a message has 'tool_calls', which the chat template does not print; write the "
                "call into 'content' as text, or use a template for tools"
            )
        prompt = self._render(row, row.prompt, generation_prompt=True)
        whole = self._render(row, [*row.prompt, row.completion])
        if whole.startswith(prompt):
            return prompt, whole[len(prompt) :], True
        return prompt, *self._otherwise(row, prompt, whole)

    def _otherwise(self, row: Row, prompt: str, whole: str) -> tuple[str, bool]:
        """The same where the template shows a finished turn in another way.

        R1's template opens <think> for the model, and deletes the thought afterwards.
        """
        unanswered, shown = self._render(row, row.prompt), self._until_answer(row)
        added = _beyond(prompt, unanswered)
        opened, closing = _opened(added, shown)
        if added and whole.startswith(shown):
            rest = whole[len(shown) :]
            if not opened:
                return rest, True
            if rest.lstrip().startswith(opened):
                return rest.lstrip().removeprefix(opened).removeprefix("\n"), True
        # The turn is what the row says that the model wrote: thought, answer, end of turn.
        answer = row.completion.get("content", "").lstrip()
        is_told = answer.startswith(opened) or closing in answer
        is_lost = not added or row.completion.keys() & {"tool_calls", *THOUGHTS}
        text = answer.removeprefix(opened).removeprefix("\n") + self.end_of_turn
        return text, is_told and not is_lost

    def notes(self, row: Row, completion: str) -> Iterator[str]:
        """What of a conversation has no effect, or another one than it seems (unread.py)."""
        names = {"tools", *row.template_kwargs} if row.tools else {*row.template_kwargs}
        for message in [*row.prompt, row.completion]:
            names |= message.keys() - {"role", "content"}
        for name in names:
            if not self.words & (THOUGHTS if name in THOUGHTS else {name}):
                yield Unread.FIELD.note(name)
        if "".join(row.completion.get("content", "").split()) not in "".join(completion.split()):
            yield Unread.PART.note()
        if self.header:
            yield Unread.HEADER.note(self.header)

    def _header(self) -> str:
        probe = Row([QUESTION], {})
        prompt = self._render(probe, probe.prompt, generation_prompt=True)
        if prompt != self._render(probe, probe.prompt):
            return ""
        return self._until_answer(probe).removeprefix(prompt).strip()

    def _until_answer(self, row: Row) -> str:
        """The conversation with an answer, as far as it does not depend on the answer's text."""
        return os.path.commonprefix(
            [
                self._render(row, [*row.prompt, {"role": "assistant", "content": text}])
                for text in ANSWERS
            ]
        )

    def _render(self, row: Row, messages: list[Message], generation_prompt: bool = False) -> str:
        return render(self.tokenizer, messages, generation_prompt, row.tools, row.template_kwargs)


def texts_in(value: Any) -> Iterator[str]:
    """Every text in a message, however deep."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from texts_in(inner)


def _opened(added: list[str], shown: str) -> tuple[str, str]:
    """What a generation prompt opens beyond the header that a finished turn is shown with, and what
    would close it: ("<think>", "</think>"), ("[THINK]", "[/THINK]").

    Two empty texts where it opens nothing, or closes it itself: Qwen3's, with thinking off.
    """
    pieces = PIECES.findall(shown)[-2 * len(added) :]
    header = max(_common(added, pieces[start:]) for start in range(len(pieces) + 1))
    opened = "".join(added[header:]).strip()
    word = opened.partition("\n")[0].strip()
    closing = f"{word[:1]}/{word[1:]}"
    closed = not opened or word[1:2] == "/" or closing in opened
    return ("", "") if closed else (opened, closing)


def _beyond(text: str, other: str) -> list[str]:
    """The pieces of a text from where it differs from another."""
    pieces = PIECES.findall(text)
    return pieces[_common(pieces, PIECES.findall(other)) :]


def _common(pieces: list[str], others: list[str]) -> int:
    return len(os.path.commonprefix([pieces, others]))

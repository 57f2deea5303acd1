"""Where a completion of the data ends: at its first stop token, unless that is a word of it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from gkd_ds.runtime.errors import InputError, quote


@dataclass(frozen=True)
class Stops:
    """The stop tokens of a run by what they look like in text.

    `marks` are tokens that nothing else is written with, such as <|im_end|>; `words` are pieces of
    ordinary text that a model's configuration lists as stop tokens, too.
    """

    marks: dict[int, str]
    words: dict[int, str]
    eos_id: int

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, stop_ids: Iterable[int]) -> Stops:
        """Ids beyond the tokenizer, of a padded vocabulary, are in no text and left out."""
        ids = [token_id for token_id in sorted(stop_ids) if token_id < len(tokenizer)]
        unsplit = {*tokenizer.added_tokens_decoder, tokenizer.eos_token_id}
        marks = {i: tokenizer.convert_ids_to_tokens(i) for i in ids if i in unsplit}
        words = {i: tokenizer.decode([i]).strip() or "\n" for i in ids if i not in unsplit}
        return cls(marks, words, tokenizer.eos_token_id)

    def inside(self, texts: Iterable[str]) -> set[int]:
        """Those of the words that stand in the text of an answer, where they end nothing.

        Raises InputError for a mark inside, which would silently cut the answer there.
        """
        found = set()
        for text in texts:
            for stop in self.marks.values():
                if stop in text.strip().removesuffix(stop):
                    raise InputError(
                        f"the assistant's text has the stop token {quote(stop)} before its end"
                    )
            found |= {i for i, stop in self.words.items() if stop in text.strip()}
        return found

    def cut(self, completion_ids: list[int], inside: set[int]) -> list[int]:
        """Through the first stop token; what the template prints after it is never generated."""
        ends = (self.marks.keys() | self.words.keys()) - inside
        for position, token in enumerate(completion_ids):
            if token in ends:
                return completion_ids[: position + 1]
        return [*completion_ids, self.eos_id]

"""Chat rows become prompt and completion tokens.

    rows = read_dataset("train.jsonl", "train")      # a file, a directory or a hub name
    examples = tokenize(rows, tokenizer, config, "train.jsonl", stop_ids)
    examples.prompt_ids[0], examples.completion_ids[0]               # two list[int]

A row has `messages` (a list of {role, content}), or `prompt` and `completion` (both strings, or
both lists of messages). The prompt is every message before the last assistant turn, rendered with
the tokenizer's chat template and its generation prompt; the completion is that turn up to and
including its end-of-turn token (turns.py). `tools` (JSON schemas) and `chat_template_kwargs` (an
object) are given to the template, too, as apply_chat_template's arguments. Strings are not
rendered: the prompt gets the special tokens the tokenizer puts in front of text, the completion an
end-of-sequence token. A warning names what has no effect: other columns, and fields of messages
that the template does not know.
"""

import hashlib
import logging
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np
from transformers import PreTrainedTokenizerBase

from gkd_ds.data.files import JSON_COLUMN, PLACE_COLUMN, decode_json
from gkd_ds.data.rows import COLUMNS, Row, parse_row
from gkd_ds.data.stops import Stops
from gkd_ds.data.tokenizer import (
    continuation_ids,
    leading_ids,
    prepare_tokenizer,
    token_ids,
)
from gkd_ds.data.turns import Turns, texts_in
from gkd_ds.data.unread import Unread, sentence
from gkd_ds.runtime.errors import InputError, name_list, quote, type_name

logger = logging.getLogger(__name__)


class TokenLists(Sequence):
    """Many lists of token ids in two flat arrays (4 bytes per token instead of 36); item i is a
    list[int].
    """

    def __init__(self) -> None:
        self.tokens = array("i")
        self.ends = array("q")

    def append(self, ids: Sequence[int]) -> None:
        self.tokens.extend(ids)
        self.ends.append(len(self.tokens))

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        position = range(len(self))[index]
        start = self.ends[position - 1] if position else 0
        return self.tokens[start : self.ends[position]].tolist()


@dataclass
class Examples:
    """Tokenised samples, in the order of the dataset; a sample's id is its index here.

    prompt_ids, completion_ids: one list[int] per sample, neither ever empty. fingerprint: SHA-256
    over all ids in order, equal exactly where the data is. skipped: rows left out under
    row_errors="skip".
    """

    prompt_ids: TokenLists
    completion_ids: TokenLists
    fingerprint: str
    skipped: int = 0

    def __len__(self) -> int:
        return len(self.prompt_ids)


@dataclass(frozen=True)
class RowEncoder:
    """Turns one row into (prompt_ids, completion_ids); holds only what worker processes can be
    sent.
    """

    turns: Turns
    stops: Stops
    max_length: int | None
    leading_ids: list[int]
    are_learned: bool = True  # the completions; where not, they may be any

    @classmethod
    def build(
        cls,
        tokenizer: PreTrainedTokenizerBase,
        stop_ids: Iterable[int],
        max_length: int | None,
        are_learned: bool = True,
    ):
        stops = Stops.of(tokenizer, stop_ids)
        return cls(Turns.of(tokenizer), stops, max_length, leading_ids(tokenizer), are_learned)

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self.turns.tokenizer

    @property
    def stop_ids(self) -> frozenset[int]:
        return frozenset(self.stops.marks | self.stops.words)

    def encode(self, row: object) -> tuple[list[int], list[int]]:
        """Raises InputError with a clause about the row, as parse_row does."""
        return self._encode(parse_row(row))[:2]

    def _encode(self, row: Row) -> tuple[list[int], list[int], list[str]]:
        """The tokens of a row, and notes about what of it has no effect on them (unread.py)."""
        notes = [Unread.COLUMN.note(name) for name in row.unread]
        if isinstance(row.prompt, str):
            prompt_text, completion_text = row.prompt, row.completion
            leading = self.leading_ids
        else:
            prompt_text, completion_text, follows = self.turns.texts(row)
            leading = []  # a template writes its own
            notes += self.turns.notes(row, completion_text)
            if not follows and self.are_learned:
                raise InputError(
                    f"the chat template's prompt ends in {quote(prompt_text[-30:])}, and it does "
                    "not show this answer behind it; give the answer the thought that the prompt "
                    "opens (as 'reasoning_content', or in 'content' up to its end), use another "
                    "template, or learn on-policy alone (lmbda: 1)"
                )
            notes += [] if follows else [Unread.ALONE.note()]
        prompt_ids = token_ids(self.tokenizer, prompt_text)
        if prompt_ids[: len(leading)] != leading:
            prompt_ids = leading + prompt_ids
        completion_ids = continuation_ids(self.tokenizer, prompt_text, completion_text)
        inside = self.stops.inside(texts_in(row.completion)) & set(completion_ids)
        notes += [Unread.STOP.note(self.stops.words[stop]) for stop in inside]
        return *self._fit(prompt_ids, self.stops.cut(completion_ids, inside)), notes

    def _fit(self, prompt_ids: list[int], completion_ids: list[int]) -> tuple[list[int], list[int]]:
        if not prompt_ids:
            raise InputError("the prompt has no tokens")
        if self.max_length is None:
            return prompt_ids, completion_ids
        room = self.max_length - len(prompt_ids)
        if room <= 0:
            raise InputError(
                f"the prompt has {len(prompt_ids)} tokens, which leaves no room for a completion "
                "within "
                f"max_length={self.max_length}; raise max_length or remove the row"
            )
        return prompt_ids, completion_ids[:room]

    def encode_batch(self, columns: dict[str, list]) -> dict[str, list]:
        """The same for `datasets.map`. `problem` has the sentence of each row that cannot be used,
        and None for the others; `notes` those about what has no effect.
        """
        result: dict[str, list] = {name: [] for name in ENCODED_FEATURES}
        for row in _rows(columns):
            try:
                values = (*self._encode(parse_row(decode_json(row))), None)
            except InputError as error:
                values = ([], [], [], str(error))
            for column, value in zip(result.values(), values, strict=True):
                column.append(value)
        return result


BATCH_ROWS = 1000
PARALLEL_ROWS = 10_000  # below this, starting worker processes takes longer than it saves
TOKEN_LIST = datasets.Sequence(datasets.Value("int32"))
ENCODED_FEATURES = datasets.Features(
    {
        "prompt_ids": TOKEN_LIST,
        "completion_ids": TOKEN_LIST,
        "notes": datasets.Sequence(datasets.Value("string")),
        "problem": datasets.Value("string"),
    }
)


def tokenize(
    dataset: datasets.Dataset | Sequence[Mapping],
    tokenizer: PreTrainedTokenizerBase,
    config: Any,
    where: str,
    stop_ids: Iterable[int],
    are_learned: bool = True,
) -> Examples:
    """Tokenise a whole dataset. `where` names it in error messages; `stop_ids` as stop_token_ids()
    gives them; `are_learned` says whether the run learns the completions: one that is on-policy
    throughout uses the prompts alone, and an evaluation only measures.

    A row that cannot be used ends the run (config.row_errors="strict") or is left out and counted
    ("skip", up to config.max_skipped_rows). The tokenizer is prepared in place (prepare_tokenizer).
    Uses config.max_length and config.dataset_num_proc; the result does not depend on the latter.
    Raises InputError.
    """
    prepare_tokenizer(tokenizer, config)
    dataset, places, notes = _check_dataset(dataset, where)
    encoder = RowEncoder.build(tokenizer, stop_ids, config.max_length, are_learned)
    prompts, completions, problems = TokenLists(), TokenLists(), []
    for index, (prompt_ids, completion_ids, noted, problem) in enumerate(
        _encode_all(dataset, encoder, config)
    ):
        notes.update(noted)
        if problem is None:
            prompts.append(prompt_ids)
            completions.append(completion_ids)
            continue
        problems.append(f"{where}, {places[index] if places else f'row index {index}'}: {problem}")
        if config.row_errors == "strict":
            raise InputError(problems[0])
        if len(problems) > config.max_skipped_rows:
            raise InputError(
                f"{where} has more than max_skipped_rows={config.max_skipped_rows} rows that "
                "cannot be used, "
                f"the first: {problems[0]}"
            )
    if notes and config.process_index == 0:
        logger.warning("%s: %s", where, sentence(notes))
    if problems:
        logger.warning(
            "%s: %d of %d rows skipped, the first: %s",
            where,
            len(problems),
            len(dataset),
            problems[0],
        )
    if not len(prompts):
        raise InputError(f"{where} has no row that can be used, the first: {problems[0]}")
    return Examples(prompts, completions, _fingerprint(prompts, completions), skipped=len(problems))


def _encode_all(
    dataset, encoder: RowEncoder, config: Any
) -> Iterator[tuple[list[int], list[int], list[str], str | None]]:
    """What `encode_batch` says of each row, in order."""
    workers = config.dataset_num_proc or 1
    if workers > 1 and isinstance(dataset, datasets.Dataset) and len(dataset) >= PARALLEL_ROWS:
        # In memory and under a name of its own: no cache file is written, none is picked up.
        dataset = dataset.map(
            encoder.encode_batch,
            batched=True,
            batch_size=BATCH_ROWS,
            num_proc=workers,
            keep_in_memory=True,
            load_from_cache_file=False,
            remove_columns=dataset.column_names,
            new_fingerprint="gkd_ds",
            features=ENCODED_FEATURES,
            desc="tokenizing",
        )
        for row in dataset:
            yield tuple(row[name] for name in ENCODED_FEATURES)
        return
    for start in range(0, len(dataset), BATCH_ROWS):
        encoded = encoder.encode_batch(dataset[start : start + BATCH_ROWS])
        yield from zip(*encoded.values(), strict=True)


def _check_dataset(dataset, where: str) -> tuple[Any, list[str] | None, set[str]]:
    """The dataset reduced to the columns we read, a place ("line 3") per row if the reader knew
    one, and notes about the columns that are left out.
    """
    if isinstance(dataset, datasets.DatasetDict):
        raise InputError(
            f"{where} is a set of splits; pass one of them: {name_list(list(dataset))}"
        )
    if isinstance(dataset, datasets.IterableDataset):
        raise InputError(
            f"{where} is a streaming dataset, which has no length; load it without streaming"
        )
    if not isinstance(dataset, (datasets.Dataset, list, tuple)):
        raise InputError(
            f"{where} must be a datasets.Dataset or a list of rows, not {type_name(dataset)}"
        )
    if not len(dataset):
        raise InputError(f"{where} has no rows; give at least one")
    if not isinstance(dataset, datasets.Dataset):
        return dataset, None, set()
    dataset = dataset.with_format(None)
    names = dataset.column_names
    if JSON_COLUMN in names:
        return dataset.select_columns([JSON_COLUMN]), dataset[PLACE_COLUMN][:], set()
    if "messages" in names or {"prompt", "completion"} <= {*names}:
        read = [name for name in COLUMNS if name in names]
        left_out = {Unread.COLUMN.note(name) for name in names if name not in COLUMNS}
        return dataset.select_columns(read), None, left_out
    raise InputError(
        f"{where} needs a column 'messages', or 'prompt' and 'completion'; "
        f"its columns are: {name_list(names)}"
    )


def _rows(batch: dict[str, list] | Sequence[object]) -> Iterator[object]:
    """The rows of a slice: of a Dataset it is a dict of columns, of a list it is a list."""
    if not isinstance(batch, Mapping):
        yield from batch
        return
    for values in zip(*batch.values(), strict=True):
        yield dict(zip(batch, values, strict=True))


def _fingerprint(*token_lists: TokenLists) -> str:
    digest = hashlib.sha256()
    for lists in token_lists:
        for values, dtype in ((lists.ends, "<i8"), (lists.tokens, "<i4")):
            digest.update(np.asarray(values).astype(dtype).tobytes())
    return digest.hexdigest()

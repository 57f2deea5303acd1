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
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np
from transformers import PreTrainedTokenizerBase

from gkd_ds.data.files import JSON_COLUMN, PLACE_COLUMN, decode_json
from gkd_ds.data.rows import COLUMNS, Row, parse_turns
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


Sample = tuple[list[int], list[int]]  # tokens of a prompt and of its completion


@dataclass(frozen=True)
class RowEncoder:
    """Turns one row into samples; holds only what worker processes can be sent.

    `format` is the caller's formatting_func: from a row as it was given to one that can be read.
    """

    turns: Turns
    stops: Stops
    leading_ids: list[int]
    max_length: int | None = None
    keep_end: bool = False
    every_turn: bool = False
    format: Callable[[Any], Any] | None = None
    are_learned: bool = True  # the completions; where not, they may be any

    @classmethod
    def build(
        cls,
        tokenizer: PreTrainedTokenizerBase,
        stop_ids: Iterable[int],
        config: Any,
        format: Callable[[Any], Any] | None = None,
        are_learned: bool = True,
    ):
        return cls(
            Turns.of(tokenizer),
            Stops.of(tokenizer, stop_ids),
            leading_ids(tokenizer),
            config.max_length,
            config.truncation_mode == "keep_end",
            config.train_on == "every_turn",
            format,
            are_learned,
        )

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self.turns.tokenizer

    @property
    def stop_ids(self) -> frozenset[int]:
        return frozenset(self.stops.marks | self.stops.words)

    def encode(self, row: object) -> Sample:
        """A row's last sample. Raises InputError with a clause about the row, as parse_row does."""
        return self._encode_row(row)[0][-1]

    def _encode_row(self, row: object) -> tuple[list[Sample], list[str]]:
        """The samples of a row, and notes about what of it has no effect on them (unread.py)."""
        if self.format is not None:
            row = self.format(row)
            if not isinstance(row, Mapping):
                raise InputError(
                    f"formatting_func returned {type_name(row)}; it must return a row with "
                    "'messages', or with 'prompt' and 'completion', since text alone does not say "
                    "what is to be distilled"
                )
        samples, notes = [], []
        for turn in parse_turns(row, self.every_turn):
            *sample, noted = self._encode(turn)
            samples.append(tuple(sample))
            notes += noted
        return samples, notes

    def _encode(self, row: Row) -> tuple[list[int], list[int], list[str]]:
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

    def _fit(self, prompt_ids: list[int], completion_ids: list[int]) -> Sample:
        """Both within `max_length`: the completion's end is cut, or the prompt's start
        (`keep_end`), which leaves a token of it at least.
        """
        if not prompt_ids:
            raise InputError("the prompt has no tokens")
        if self.max_length is None:
            return prompt_ids, completion_ids
        if self.keep_end:
            excess = max(0, len(prompt_ids) + len(completion_ids) - self.max_length)
            from_prompt = min(excess, len(prompt_ids) - 1)
            return prompt_ids[from_prompt:], completion_ids[excess - from_prompt :]
        room = self.max_length - len(prompt_ids)
        if room <= 0:
            raise InputError(
                f"the prompt has {len(prompt_ids)} tokens, which leaves no room for a completion "
                f"within max_length={self.max_length}; raise max_length, set truncation_mode: "
                "keep_end (it cuts the prompt's start), or leave such rows out with row_errors: "
                "skip"
            )
        return prompt_ids, completion_ids[:room]

    def encode_batch(self, columns: dict[str, list]) -> dict[str, list]:
        """The same for `datasets.map`. `problem` has the sentence of each row that cannot be used,
        and None for the others; `notes` those about what has no effect.
        """
        result: dict[str, list] = {name: [] for name in ENCODED_FEATURES}
        for row in _rows(columns):
            try:
                samples, notes = self._encode_row(decode_json(row))
                values = [ids for ids, _ in samples], [ids for _, ids in samples], notes, None
            except InputError as error:
                values = ([], [], [], str(error))
            for column, value in zip(result.values(), values, strict=True):
                column.append(value)
        return result


BATCH_ROWS = 1000
PARALLEL_ROWS = 10_000  # below this, starting worker processes takes longer than it saves
TOKEN_LISTS = datasets.Sequence(datasets.Sequence(datasets.Value("int32")))
ENCODED_FEATURES = datasets.Features(  # a row has as many samples as it has turns to train on
    {
        "prompts": TOKEN_LISTS,
        "completions": TOKEN_LISTS,
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
    formatting_func: Callable[[Any], Any] | None = None,
    stream_rows: int | None = None,
    are_learned: bool = True,
) -> Examples:
    """Tokenise a whole dataset. `where` names it in error messages; `stop_ids` as stop_token_ids()
    gives them; `formatting_func` makes of each row one that can be read; of a stream the first
    `stream_rows` are taken; `are_learned` says whether the run learns the completions: one that
    is on-policy throughout uses the prompts alone, and an evaluation only measures.

    A row that cannot be used ends the run (config.row_errors="strict") or is left out and counted
    ("skip", up to config.max_skipped_rows). The tokenizer is prepared in place (prepare_tokenizer).
    Uses config.max_length, truncation_mode, train_on, and dataset_num_proc, on which the result
    does not depend.
    Raises InputError.
    """
    prepare_tokenizer(tokenizer, config)
    dataset = without_stream(dataset, where, stream_rows)
    dataset, places, notes = _check_dataset(
        dataset, where, every_column=formatting_func is not None
    )
    encoder = RowEncoder.build(tokenizer, stop_ids, config, formatting_func, are_learned)
    prompts, completions, problems = TokenLists(), TokenLists(), []
    for index, (prompt_ids, completion_ids, noted, problem) in enumerate(
        _encode_all(dataset, encoder, config)
    ):
        notes.update(noted)
        if problem is None:
            for ids, answer_ids in zip(prompt_ids, completion_ids, strict=True):
                prompts.append(ids)
                completions.append(answer_ids)
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
    return Examples(prompts, completions, fingerprint(prompts, completions), skipped=len(problems))


def _encode_all(
    dataset, encoder: RowEncoder, config: Any
) -> Iterator[tuple[list[list[int]], list[list[int]], list[str], str | None]]:
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
        for row in dataset.with_format(None):
            yield tuple(row[name] for name in ENCODED_FEATURES)
        return
    for start in range(0, len(dataset), BATCH_ROWS):
        encoded = encoder.encode_batch(dataset[start : start + BATCH_ROWS])
        yield from zip(*encoded.values(), strict=True)


def without_stream(dataset: Any, where: str, rows: int | None) -> Any:
    """A stream's first rows in memory. What a step trains on depends on the step alone, also after
    a resume; a stream that came in another order then has another fingerprint, and is refused.
    """
    if not isinstance(dataset, datasets.IterableDataset):
        return dataset
    if rows is None:
        raise InputError(
            f"{where} is a streaming dataset, which has no length; set max_steps, so that as many "
            "rows are read as that takes, or make a copy with "
            "datasets.Dataset.from_list(list(stream.take(n)))"
        )
    return list(dataset.take(rows))


def _check_dataset(
    dataset, where: str, every_column: bool = False
) -> tuple[Any, list[str] | None, set[str]]:
    """The dataset reduced to the columns we read (`every_column` keeps all of them), a place
    ("line 3") per row if the reader knew one, and notes about the columns that are left out.
    """
    if isinstance(dataset, datasets.DatasetDict):
        raise InputError(
            f"{where} is a set of splits; pass one of them: {name_list(list(dataset))}"
        )
    if not isinstance(dataset, (datasets.Dataset, list, tuple)):
        raise InputError(
            f"{where} must be a datasets.Dataset or a list of rows, not {type_name(dataset)}"
        )
    if not len(dataset):
        raise InputError(f"{where} has no rows; give at least one")
    if not isinstance(dataset, datasets.Dataset):
        return dataset, None, set()
    if dataset.format["type"] == "custom":  # set_transform makes the columns, row by row
        return dataset, None, set()
    dataset = dataset.with_format(None)
    names = dataset.column_names
    if JSON_COLUMN in names:
        return dataset.select_columns([JSON_COLUMN]), dataset[PLACE_COLUMN][:], set()
    if every_column:
        return dataset, None, set()
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


def fingerprint(*token_lists: TokenLists) -> str:
    digest = hashlib.sha256()
    for lists in token_lists:
        for values, dtype in ((lists.ends, "<i8"), (lists.tokens, "<i4")):
            digest.update(np.asarray(values).astype(dtype).tobytes())
    return digest.hexdigest()

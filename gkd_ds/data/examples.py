"""Chat rows become prompt and completion tokens.

    rows = read_dataset("train.jsonl", "train")      # a file, a directory or a hub name
    examples = tokenize(rows, tokenizer, config, "train.jsonl", stop_ids)
    examples.prompt_ids[0], examples.completion_ids[0]               # two list[int]

A row has `messages` (a list of {role, content}), or `prompt` and `completion` (both strings, or
both lists of messages). The prompt is every message before the last assistant turn, rendered with
the tokenizer's chat template and its generation prompt; the completion is that turn up to and
including its end-of-turn token. Strings are not rendered: the prompt gets the special tokens the
tokenizer puts in front of text, the completion an end-of-sequence token. Other columns are ignored.
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
from gkd_ds.data.rows import Row, parse_row
from gkd_ds.data.tokenizer import (
    continuation_ids,
    end_of_turn_token,
    leading_ids,
    prepare_tokenizer,
    render,
    token_ids,
)
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

    tokenizer: PreTrainedTokenizerBase
    stop_ids: frozenset[int]
    max_length: int | None
    leading_ids: list[int]
    end_of_turn: str

    @classmethod
    def build(
        cls, tokenizer: PreTrainedTokenizerBase, stop_ids: Iterable[int], max_length: int | None
    ):
        leading = leading_ids(tokenizer)
        return cls(
            tokenizer, frozenset(stop_ids), max_length, leading, end_of_turn_token(tokenizer) or ""
        )

    def encode(self, row: object) -> tuple[list[int], list[int]]:
        """Raises InputError with a clause about the row, as parse_row does."""
        parsed = parse_row(row)
        if isinstance(parsed.prompt, str):
            prompt_text, completion_text = parsed.prompt, parsed.completion
            leading = self.leading_ids
            self._check_stops(parsed.completion)
        else:
            prompt_text, completion_text = self._render_turn(parsed)
            leading = []  # a template writes its own
            self._check_stops(parsed.completion["content"])
        prompt_ids = token_ids(self.tokenizer, prompt_text)
        if prompt_ids[: len(leading)] != leading:
            prompt_ids = leading + prompt_ids
        completion_ids = continuation_ids(self.tokenizer, prompt_text, completion_text)
        return self._fit(prompt_ids, self._end(completion_ids))

    def _render_turn(self, row: Row) -> tuple[str, str]:
        prompt = render(self.tokenizer, row.prompt, generation_prompt=True)
        whole = render(self.tokenizer, [*row.prompt, row.completion], generation_prompt=False)
        if whole.startswith(prompt):
            return prompt, whole[len(prompt) :]
        # The template shows a finished turn differently from one being written: R1's opens <think>
        # for the model and deletes the thinking afterwards. Then the turn is what the model would
        # write: text, end of turn.
        content = row.completion["content"]
        if prompt.rstrip().endswith("<think>"):
            content = content.lstrip().removeprefix("<think>").removeprefix("\n")
        return prompt, content + self.end_of_turn

    def _check_stops(self, content: str) -> None:
        """A stop token written inside the answer would silently cut it there."""
        known = [token_id for token_id in sorted(self.stop_ids) if token_id < len(self.tokenizer)]
        for stop in self.tokenizer.convert_ids_to_tokens(known):
            if stop in content.strip().removesuffix(stop):
                raise InputError(
                    f"the assistant's text has the stop token {quote(stop)} before its end"
                )

    def _end(self, completion_ids: list[int]) -> list[int]:
        """Through the first stop token; what the template prints after it is never generated."""
        for position, token in enumerate(completion_ids):
            if token in self.stop_ids:
                return completion_ids[: position + 1]
        return [*completion_ids, self.tokenizer.eos_token_id]

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
        and None for the others.
        """
        result: dict[str, list] = {"prompt_ids": [], "completion_ids": [], "problem": []}
        for row in _rows(columns):
            prompt_ids, completion_ids, problem = [], [], None
            try:
                prompt_ids, completion_ids = self.encode(decode_json(row))
            except InputError as error:
                problem = str(error)
            result["prompt_ids"].append(prompt_ids)
            result["completion_ids"].append(completion_ids)
            result["problem"].append(problem)
        return result


BATCH_ROWS = 1000
PARALLEL_ROWS = 10_000  # below this, starting worker processes takes longer than it saves
TOKEN_LIST = datasets.Sequence(datasets.Value("int32"))
ENCODED_FEATURES = datasets.Features(
    {"prompt_ids": TOKEN_LIST, "completion_ids": TOKEN_LIST, "problem": datasets.Value("string")}
)


def tokenize(
    dataset: datasets.Dataset | Sequence[Mapping],
    tokenizer: PreTrainedTokenizerBase,
    config: Any,
    where: str,
    stop_ids: Iterable[int],
) -> Examples:
    """Tokenise a whole dataset. `where` names it in error messages; `stop_ids` as stop_token_ids()
    gives them.

    A row that cannot be used ends the run (config.row_errors="strict") or is left out and counted
    ("skip", up to config.max_skipped_rows). The tokenizer is prepared in place (prepare_tokenizer).
    Uses config.max_length and config.dataset_num_proc; the result does not depend on the latter.
    Raises InputError.
    """
    prepare_tokenizer(tokenizer, config)
    dataset, places = _check_dataset(dataset, where)
    encoder = RowEncoder.build(tokenizer, stop_ids, config.max_length)
    prompts, completions, problems = TokenLists(), TokenLists(), []
    for index, (prompt_ids, completion_ids, problem) in enumerate(
        _encode_all(dataset, encoder, config)
    ):
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
) -> Iterator[tuple[list[int], list[int], str | None]]:
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
            yield row["prompt_ids"], row["completion_ids"], row["problem"]
        return
    for start in range(0, len(dataset), BATCH_ROWS):
        encoded = encoder.encode_batch(dataset[start : start + BATCH_ROWS])
        yield from zip(
            encoded["prompt_ids"], encoded["completion_ids"], encoded["problem"], strict=True
        )


def _check_dataset(dataset, where: str) -> tuple[Any, list[str] | None]:
    """The dataset reduced to the columns we read, and a place ("line 3") per row if the reader knew
    one.
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
        return dataset, None
    dataset = dataset.with_format(None)
    if JSON_COLUMN in dataset.column_names:
        return dataset.select_columns([JSON_COLUMN]), dataset[PLACE_COLUMN][:]
    if "messages" in dataset.column_names:
        return dataset.select_columns(["messages"]), None
    if "prompt" in dataset.column_names and "completion" in dataset.column_names:
        return dataset.select_columns(["prompt", "completion"]), None
    raise InputError(
        f"{where} needs a column 'messages', or 'prompt' and 'completion'; "
        f"its columns are: {name_list(dataset.column_names)}"
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

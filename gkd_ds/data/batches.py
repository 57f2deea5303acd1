"""TRL's batches: what its data collators make of rows, written for those who look at the data, and
read where a trainer is given a collator of the caller's.

    input_ids, attention_mask, labels   [B, T]   prompt and completion; labels are -100 but on the
                                                 completion
    prompts, prompt_attention_mask      [B, P]   the prompt alone

All of them are padded on the left.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import datasets
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from gkd_ds.data.examples import Examples, TokenLists, fingerprint
from gkd_ds.data.files import decode_json
from gkd_ds.runtime.errors import InputError, first_line

IGNORED = -100
Collator = Callable[[list[Mapping]], Mapping[str, Any]]


class _Rows(Sequence):
    """(prompt ids, completion ids) of every row."""

    def __init__(self, examples: Examples):
        self.examples = examples

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, row: int) -> tuple[list[int], list[int]]:
        return self.examples.prompt_ids[row], self.examples.completion_ids[row]


def loader(examples: Examples, batches: Sequence[Sequence[int]], pad_id: int) -> DataLoader:
    """The rows that `batches` names, batch by batch."""
    return DataLoader(
        _Rows(examples), batch_sampler=batches, collate_fn=lambda rows: collate(rows, pad_id)
    )


def collate(rows: Sequence[tuple[list[int], list[int]]], pad_id: int) -> dict[str, Tensor]:
    """(prompt ids, completion ids) of some rows as one batch."""
    prompts = [prompt for prompt, _ in rows]
    whole = [prompt + completion for prompt, completion in rows]
    labels = [[IGNORED] * len(prompt) + completion for prompt, completion in rows]
    return {
        "input_ids": _padded(whole, pad_id),
        "attention_mask": _padded([[1] * len(ids) for ids in whole], 0),
        "labels": _padded(labels, IGNORED),
        "prompts": _padded(prompts, pad_id),
        "prompt_attention_mask": _padded([[1] * len(ids) for ids in prompts], 0),
    }


def _padded(sequences: list[list[int]], value: int) -> Tensor:
    width = max(map(len, sequences))
    return torch.tensor([[value] * (width - len(ids)) + ids for ids in sequences])


# -- reading ----------------------------------------------------------------------------------


def collated(
    dataset: Any, collator: Collator, where: str, max_length: int | None = None
) -> Examples:
    """Tokens as `collator` makes them of one row at a time: once, before training. Completions end
    at `max_length`.

    Raises InputError where a row's batch is no prompt that is followed by its completion.
    """
    if not isinstance(dataset, (datasets.Dataset, list, tuple)) or not len(dataset):
        raise InputError(
            f"{where} must be a datasets.Dataset or a list, with at least one row, where "
            "data_collator is given"
        )
    prompts, completions = TokenLists(), TokenLists()
    for index, row in enumerate(dataset):
        try:
            prompt, completion = _read(collator([decode_json(row)]))
            if max_length is not None and len(prompt) >= max_length:
                raise InputError(
                    f"the prompt has {len(prompt)} tokens, which leaves no room within "
                    f"max_length={max_length}; raise max_length or remove the row"
                )
        except InputError as error:
            raise InputError(f"{where}, row index {index}: {error}") from error
        except Exception as error:  # it is the caller's, and may raise anything
            raise InputError(
                f"data_collator fails on row index {index} of {where} ({type(error).__name__}: "
                f"{first_line(error)}); mend it, or the row"
            ) from error
        prompts.append(prompt)
        completions.append(completion[: max_length and max_length - len(prompt)])
    return Examples(prompts, completions, fingerprint(prompts, completions))


def _read(batch: Mapping[str, Any]) -> tuple[list[int], list[int]]:
    """The prompt's and the completion's ids of a batch of one row. Raises InputError with a clause
    about the row.
    """
    for name in ("input_ids", "labels"):
        if name not in batch:
            raise InputError(f"data_collator gives no {name!r} (it gives: {', '.join(batch)})")
    ids, labels = _tokens(batch, "input_ids"), _tokens(batch, "labels")
    if len(ids) != len(labels):
        raise InputError(f"data_collator gives {len(ids)} input_ids but {len(labels)} labels")
    if "attention_mask" in batch:
        mask = _tokens(batch, "attention_mask")
        ids, labels = ([one for one, seen in zip(many, mask) if seen] for many in (ids, labels))
    first = next((place for place, label in enumerate(labels) if label != IGNORED), len(labels))
    prompt, completion = ids[:first], ids[first:]
    if not completion:
        raise InputError("data_collator leaves no label, so there is no completion to learn")
    if labels[first:] != completion:
        raise InputError(
            "data_collator's labels are not the last tokens of input_ids, but a completion follows "
            "its prompt without a gap here"
        )
    if "prompts" in batch:
        alone = _tokens(batch, "prompts")
        if "prompt_attention_mask" in batch:
            mask = _tokens(batch, "prompt_attention_mask")
            alone = [one for one, seen in zip(alone, mask) if seen]
        if alone != prompt:
            raise InputError(
                "data_collator's prompts are not the tokens before the first label, but both "
                "sources complete the same prompt here"
            )
    if not prompt:
        raise InputError("data_collator leaves no prompt")
    return prompt, completion


def _tokens(batch: Mapping[str, Any], name: str) -> list[int]:
    """One row of a batch as plain numbers."""
    rows = torch.as_tensor(batch[name])
    if rows.dim() != 2 or len(rows) != 1:
        raise InputError(f"data_collator gives {name!r} of shape {list(rows.shape)} for one row")
    return rows[0].tolist()

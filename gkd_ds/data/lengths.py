"""How long the rows of a run can become, known before any model is there.

lengths = RowLengths.of(config, train, evaluation)
lengths.longest                                    # a row of prompt and completion, in tokens
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from gkd_ds.config.config import GKDConfig
from gkd_ds.data.examples import Examples, TokenLists
from gkd_ds.records import Source


@dataclass(frozen=True)
class Span:
    """The rows of one set that `source` completes: from `shortest` to `longest` tokens.

    A row that is sampled grows: from the shortest prompt to the longest that it may become.
    """

    source: Source
    shortest: int
    longest: int


@dataclass(frozen=True)
class RowLengths:
    """The rows of a run, set by set and source by source."""

    spans: tuple[Span, ...]

    @classmethod
    def of(
        cls, config: GKDConfig, train: Examples | None, evaluation: dict[str, Examples]
    ) -> RowLengths:
        """Those that `config` can make of these examples."""
        spans = []
        if train is not None and config.lmbda > 0:
            spans.append(_span(Source.STUDENT, train, None, config))
        if train is not None and config.lmbda < 1:
            source = Source.TEACHER if config.seq_kd else Source.DATA
            spans.append(_span(source, train, None, config))
        for examples in evaluation.values():
            sources = [Source.DATA, Source.STUDENT] if config.eval_on_policy else [Source.DATA]
            count = config.eval_max_samples
            spans += [_span(source, examples, count, config) for source in sources]
        return cls(tuple(spans))

    def with_sets(self, config: GKDConfig, evaluation: dict[str, Examples]) -> RowLengths:
        """These, and those of further evaluation sets."""
        return RowLengths(self.spans + RowLengths.of(config, None, evaluation).spans)

    @property
    def shortest(self) -> int:
        return min((span.shortest for span in self.spans), default=1)

    @property
    def longest(self) -> int:
        return max((span.longest for span in self.spans), default=1)


def _span(source: Source, examples: Examples, count: int | None, config: GKDConfig) -> Span:
    prompts = _lengths(examples.prompt_ids)[:count]
    if source is Source.DATA:
        rows = prompts + _lengths(examples.completion_ids)[:count]
        return Span(source, int(rows.min()), int(rows.max()))
    rows = prompts + config.max_new_tokens
    if config.max_length is not None:
        rows = np.minimum(rows, config.max_length)
    return Span(source, int(prompts.min()), int(rows.max()))


def _lengths(lists: TokenLists) -> np.ndarray:
    return np.diff(np.asarray(lists.ends), prepend=0)

"""Which rollouts are shown, and in which order; numbers as files take them."""

from __future__ import annotations

import json

import numpy as np
import torch

from gkd_ds.monitor.metrics import python_numbers, rollout_records
from gkd_ds.pipeline import Learned
from gkd_ds.records import Rollout, Source
from tests.tiny import make_tokenizer


def test_what_the_student_sampled_is_shown_first() -> None:
    sources = (Source.DATA, Source.TEACHER, Source.STUDENT, Source.DATA, Source.STUDENT)
    rollouts = [Rollout(row, source, [5, 6], [7], False) for row, source in enumerate(sources)]
    per_rollout = [[float(row) for row in range(5)]] * 4
    learned = Learned(*per_rollout, micro_batches=1, padded_tokens=0)
    tokenizer = make_tokenizer(vocab_size=300)
    records = rollout_records(rollouts, learned, tokenizer, 4)
    assert [(record["sample_id"], record["source"]) for record in records] == [
        (2, "student"),
        (4, "student"),
        (1, "teacher"),
        (0, "data"),
    ]
    assert [record["divergence"] for record in records] == [2.0, 4.0, 1.0, 0.0]
    named = rollout_records(rollouts, learned, tokenizer, 4, indices=[3, 2])
    assert [record["sample_id"] for record in named] == [3, 2], (
        "those that were asked for, as they were asked for"
    )


def test_numbers_of_other_libraries_become_python_s():
    """Metrics and logs of the caller's go into JSON."""
    given = {
        "a": np.float32(1.5),
        "b": [np.array(2.0), torch.tensor([3, 4])],
        "c": "text",
        "d": None,
    }
    assert (
        json.dumps(python_numbers(given))
        == '{"a": 1.5, "b": [2.0, [3, 4]], "c": "text", "d": null}'
    )

"""From what the user gave to the trainer to what a run works on, checked before any weight is
loaded.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from gkd_ds.config.config import GKDConfig
from gkd_ds.data.examples import Examples, tokenize
from gkd_ds.data.tokenizer import stop_token_ids
from gkd_ds.engine import loading
from gkd_ds.runtime import ranks
from gkd_ds.runtime.provenance import library_versions


@dataclass(frozen=True)
class Inputs:
    """`student` and `teacher` are names or models. `evaluation` holds the evaluation sets by name;
    a single one has the empty name. `vocabulary` is the number of token ids that both models score.
    """

    config: GKDConfig
    student: loading.Model
    teacher: loading.Model
    tokenizer: PreTrainedTokenizerBase
    stop_ids: list[int]
    train: Examples | None
    evaluation: dict[str, Examples]
    vocabulary: int

    @classmethod
    def read(
        cls,
        config: GKDConfig,
        model: Any,
        teacher_model: Any,
        train_dataset: Any,
        eval_dataset: Any,
        processing_class: Any,
    ) -> Inputs:
        """Tokenize the data and check what can be checked. Raises InputError."""
        student = model if model is not None else config.model_name_or_path
        teacher = teacher_model if teacher_model is not None else config.teacher_model_name_or_path
        _check_models(config, student, teacher)
        tokenizer = loading.load_tokenizer(student, processing_class, config)
        # Only whether it can be read.
        loading.generation_config(teacher, config.teacher_model_init_kwargs)
        own = loading.generation_config(student, config.model_init_kwargs)
        stop_ids = stop_token_ids(tokenizer, own)
        where = config.dataset_name or "the training data"
        train = None
        if train_dataset is not None:
            are_learned = config.lmbda < 1 and not config.seq_kd
            train = tokenize(train_dataset, tokenizer, config, where, stop_ids, are_learned)
        evaluation = _tokenize_sets(eval_dataset, tokenizer, config, stop_ids)
        vocabulary = loading.shared_vocabulary(student, teacher, tokenizer, config)
        for examples in (train, *evaluation.values()):
            loading.require_known_tokens(examples, vocabulary)
        return cls(config, student, teacher, tokenizer, stop_ids, train, evaluation, vocabulary)

    @property
    def pad_id(self) -> int:
        """Padding is told by position, so any token will do where the models have none for it."""
        pad_id = self.tokenizer.pad_token_id
        return pad_id if pad_id < self.vocabulary else 0

    def tokenize_evaluation(self, dataset: Any) -> dict[str, Examples]:
        """Another evaluation set than the trainer's, as `evaluation` has it. Raises InputError."""
        return _tokenize_sets(dataset, self.tokenizer, self.config, self.stop_ids)

    def refuse_different_ranks(self) -> None:
        """Raise InputError, on all ranks, where they were started differently. A collective."""
        config = self.config
        fields = {name: repr(v) for name, v in config.to_dict().items() if name != "local_rank"}
        ranks.refuse_differences(fields, "configuration")
        files = zip(("deepspeed", "teacher_deepspeed"), config.read_deepspeed_files())
        digests = {
            f"what {name} holds": hashlib.sha256(repr(file).encode()).hexdigest()
            for name, file in files
        }
        ranks.refuse_differences(digests, "DeepSpeed files")
        ranks.refuse_differences(library_versions(), "library versions")
        data = {"training data": self.train, **self.evaluation}
        ranks.refuse_differences(
            {name: rows.fingerprint for name, rows in data.items() if rows is not None}, "data"
        )


def _check_models(config: GKDConfig, student: Any, teacher: Any) -> None:
    loading.require_causal_lm(student, "student")
    loading.require_causal_lm(teacher, "teacher")
    loading.refuse_ignored(
        student, "student", model_init_kwargs=config.model_init_kwargs, dtype=config.dtype
    )
    loading.refuse_ignored(
        teacher, "teacher", teacher_model_init_kwargs=config.teacher_model_init_kwargs
    )
    config.validate_files()
    loading.require_safetensors(student, config.model_init_kwargs)
    loading.require_safetensors(teacher, config.teacher_model_init_kwargs)


def _tokenize_sets(
    dataset: Any, tokenizer: PreTrainedTokenizerBase, config: GKDConfig, stop_ids: list[int]
) -> dict[str, Examples]:
    """Evaluation sets by name; a single one has the empty name. Raises InputError."""
    if dataset is None:
        return {}
    is_named = isinstance(dataset, dict) and "messages" not in dataset
    sets = dataset if is_named else {"": dataset}
    return {
        name: tokenize(
            rows,
            tokenizer,
            config,
            f"the evaluation data {name}".rstrip(),
            stop_ids,
            are_learned=False,
        )
        for name, rows in sets.items()
    }

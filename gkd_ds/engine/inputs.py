"""From what the user gave to the trainer to what a run works on, checked before any weight is
loaded.
"""

from __future__ import annotations

import dataclasses
import hashlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from gkd_ds.config.config import GKDConfig
from gkd_ds.data.batches import Collator, collated
from gkd_ds.data.examples import Examples, tokenize, without_stream
from gkd_ds.data.lengths import RowLengths
from gkd_ds.data.tokenizer import stop_token_ids
from gkd_ds.engine import adapters, loading, sources
from gkd_ds.engine.adapters import Adapter
from gkd_ds.engine.positions import check_positions
from gkd_ds.runtime import ranks
from gkd_ds.runtime.errors import InputError
from gkd_ds.runtime.provenance import library_versions


@dataclass(frozen=True)
class Inputs:
    """`student` and `teacher` are names or models; of one with an adapter, its base. `evaluation`
    holds the evaluation sets by name; a single one has the empty name. `vocabulary` is the number
    of token ids that both models score.
    """

    config: GKDConfig
    student: sources.Model
    teacher: sources.Model
    tokenizer: PreTrainedTokenizerBase
    stop_ids: list[int]
    train: Examples | None
    evaluation: dict[str, Examples]
    vocabulary: int
    student_adapter: Adapter | None = None
    teacher_adapter: Adapter | None = None
    data_collator: Collator | None = None
    formatting_func: Callable[[Any], Any] | None = None

    @classmethod
    def read(
        cls,
        config: GKDConfig,
        model: Any,
        teacher_model: Any,
        train_dataset: Any,
        eval_dataset: Any,
        processing_class: Any,
        data_collator: Collator | None = None,
        peft_config: Any = None,
        formatting_func: Callable[[Any], Any] | None = None,
    ) -> Inputs:
        """Tokenize the data (where there is a `data_collator`, through it) and check what can be
        checked. Raises InputError.
        """
        student = model if model is not None else config.model_name_or_path
        teacher = teacher_model if teacher_model is not None else config.teacher_model_name_or_path
        if peft_config is None:
            peft_config = adapters.of_fields(config)
        student, student_adapter = adapters.split(
            student, peft_config, "student", config.model_init_kwargs
        )
        teacher, teacher_adapter = adapters.split(
            teacher, None, "teacher", config.teacher_model_init_kwargs
        )
        _refuse_unread(config, student_adapter, data_collator, formatting_func)
        _check_models(config, student, teacher, may_share=student_adapter is not None)
        tokenizer = loading.load_tokenizer(student, processing_class, config)
        # Only whether it can be read.
        loading.generation_config(teacher, config.teacher_model_init_kwargs)
        own = loading.generation_config(student, config.model_init_kwargs)
        without_data = cls(
            config,
            student,
            teacher,
            tokenizer,
            stop_token_ids(tokenizer, own),
            train=None,
            evaluation={},
            vocabulary=loading.shared_vocabulary(student, teacher, tokenizer, config),
            student_adapter=student_adapter,
            teacher_adapter=teacher_adapter,
            data_collator=data_collator,
            formatting_func=formatting_func,
        )
        inputs = dataclasses.replace(
            without_data,
            train=without_data._train_tokens(train_dataset),
            evaluation=without_data._evaluation_tokens(eval_dataset),
        )
        inputs.check_rows()
        return inputs

    def with_train(self, dataset: Any) -> Inputs:
        """The same with another training set, or none. Raises InputError."""
        inputs = dataclasses.replace(self, train=self._train_tokens(dataset))
        inputs.check_rows()
        return inputs

    def with_evaluation(self, dataset: Any) -> Inputs:
        """The same with other evaluation sets, by name, with a single one, or with none. Raises
        InputError.
        """
        inputs = dataclasses.replace(self, evaluation=self._evaluation_tokens(dataset))
        inputs.check_rows()
        return inputs

    def tokenize_evaluation(self, dataset: Any) -> dict[str, Examples]:
        """Further evaluation sets, as `evaluation` has them. Raises InputError."""
        return self.with_evaluation(dataset).evaluation

    def _train_tokens(self, dataset: Any) -> Examples | None:
        if dataset is None:
            return None
        config = self.config
        per_rank = config.per_device_train_batch_size * config.gradient_accumulation_steps
        needed = config.max_steps * per_rank * config.world_size
        where = config.dataset_name or "the training data"
        are_learned = config.lmbda < 1 and not config.seq_kd
        return self._tokens(dataset, where, needed if config.max_steps > 0 else None, are_learned)

    def _evaluation_tokens(self, dataset: Any) -> dict[str, Examples]:
        if dataset is None:
            return {}
        is_named = isinstance(dataset, dict) and "messages" not in dataset
        # Of a stream all rows are read: an evaluation goes through its whole set anyway.
        most = self.config.eval_max_samples or sys.maxsize
        return {
            name: self._tokens(rows, f"the evaluation data {name}".rstrip(), most)
            for name, rows in (dataset if is_named else {"": dataset}).items()
        }

    def _tokens(
        self, dataset: Any, where: str, stream_rows: int | None, are_learned: bool = False
    ) -> Examples:
        config = self.config
        if self.data_collator is not None:
            dataset = without_stream(dataset, where, stream_rows)
            return collated(dataset, self.data_collator, where, config.max_length)
        return tokenize(
            dataset,
            self.tokenizer,
            config,
            where,
            self.stop_ids,
            self.formatting_func,
            stream_rows=stream_rows,
            are_learned=are_learned,
        )

    def check_rows(self) -> None:
        """Raise InputError for rows with unknown tokens, or longer than a model can be given."""
        for examples in (self.train, *self.evaluation.values()):
            loading.require_known_tokens(examples, self.vocabulary)
        config, longest = self.config, self.lengths.longest
        for model, role, init_kwargs in (
            (self.student, "student", config.model_init_kwargs),
            (self.teacher, "teacher", config.teacher_model_init_kwargs),
        ):
            check_positions(model, role, config, init_kwargs, longest)

    @property
    def lengths(self) -> RowLengths:
        """How long the rows of the run can become."""
        return RowLengths.of(self.config, self.train, self.evaluation)

    @property
    def pad_id(self) -> int:
        """Padding is told by position, so any token will do where the models have none for it."""
        pad_id = self.tokenizer.pad_token_id
        return pad_id if pad_id < self.vocabulary else 0

    @property
    def samples_from_student(self) -> bool:
        """Whether the run needs completions by the student, as far as it is known at its start."""
        in_training = self.train is not None and self.config.lmbda > 0
        return in_training or (bool(self.evaluation) and self.config.eval_on_policy)

    @property
    def samples_from_teacher(self) -> bool:
        """The same for the teacher."""
        return self.train is not None and self.config.seq_kd and self.config.lmbda < 1

    @property
    def teacher_is_base(self) -> bool:
        """Whether the teacher is what the student's adapter was put on: then one copy serves
        both.
        """
        return adapters.is_base(
            self.config, self.student, self.student_adapter, self.teacher, self.teacher_adapter
        )

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


def _refuse_unread(
    config: GKDConfig,
    student_adapter: Adapter | None,
    data_collator: Collator | None,
    formatting_func: Callable[[Any], Any] | None,
) -> None:
    """Raise InputError for what would have no effect beside the other arguments."""
    if config.merge_on_export and student_adapter is None:
        raise InputError("merge_on_export is for a student with an adapter; leave it out.")
    if data_collator is None:
        return
    unread = {
        "formatting_func": formatting_func is not None,
        "train_on=every_turn": config.train_on == "every_turn",
        "truncation_mode=keep_end": config.truncation_mode == "keep_end",
        "row_errors=skip": config.row_errors == "skip",
    }
    for name in [name for name, is_given in unread.items() if is_given]:
        raise InputError(
            f"{name} has no effect beside a data_collator, which makes the tokens of every row; "
            "leave out one of the two."
        )


def _check_models(config: GKDConfig, student: Any, teacher: Any, may_share: bool) -> None:
    """`may_share`: the student's base does not change, because an adapter does, so it may be the
    teacher, too.
    """
    sources.require_causal_lm(student, "student")
    sources.require_causal_lm(teacher, "teacher")
    if not may_share:
        sources.require_trainable(student)
    if not (may_share and student is teacher):
        sources.refuse_shared_weights(student, teacher)
    sources.refuse_ignored(
        student, "student", model_init_kwargs=config.model_init_kwargs, dtype=config.dtype
    )
    sources.refuse_ignored(
        teacher, "teacher", teacher_model_init_kwargs=config.teacher_model_init_kwargs
    )
    config.validate_files()
    for model, role, given in (
        (student, "student", config.model_init_kwargs),
        (teacher, "teacher", config.teacher_model_init_kwargs),
    ):
        sources.set_attention(model, role, config)
        sources.require_safetensors(model, given)
        sources.require_whole(model, role, config, given)

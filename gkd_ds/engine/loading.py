"""From what the user gave (names or objects) to tokenizers, token lists and models; everything
cheap comes first.
"""

from __future__ import annotations

import copy
import json
import logging
import os
import re
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from gkd_ds.config.config import GKDConfig
from gkd_ds.config.deepspeed import resolve_student, resolve_teacher
from gkd_ds.config.paths import HUB_NAME
from gkd_ds.data.examples import Examples
from gkd_ds.data.tokenizer import prepare_tokenizer
from gkd_ds.data.vocabulary import new_tokens, shared_vocabulary_size
from gkd_ds.engine import accelerator, models, sources, zero
from gkd_ds.engine.sources import Model
from gkd_ds.runtime import ranks
from gkd_ds.runtime.errors import InputError, name_list, reason

logger = logging.getLogger(__name__)

# A directory without any of these has no tokenizer; transformers would make up an empty one from
# the model's type.
TOKENIZER_FILES = ("tokenizer*", "vocab.*", "*.model", "tekken.json")


def load_tokenizer(model: Model, given: Any, config: GKDConfig) -> PreTrainedTokenizerBase:
    """The run's tokenizer, ready to use: a copy of `given` (processing_class) or the student's."""
    if given is not None and not isinstance(given, PreTrainedTokenizerBase):
        raise InputError(
            f"processing_class is a {type(given).__name__}; pass the student's tokenizer."
        )
    sources.model_config(
        model, config, config.model_init_kwargs
    )  # loading a tokenizer reads it: a bad one is blamed first
    tokenizer = (
        copy.deepcopy(given)  # the caller's stays as it is
        if given is not None
        else _tokenizer_of(sources.name_of(model), config, config.model_init_kwargs)
    )
    if tokenizer is None:
        raise InputError(
            f"the student {sources.name_of(model)!r} comes without a tokenizer; pass "
            "processing_class."
        )
    for template in tokenizer.chat_template if isinstance(tokenizer.chat_template, dict) else ():
        if not re.fullmatch(r"\w[\w.-]*", template):
            raise InputError(
                f"the tokenizer has a chat template named {template!r}; a template is saved as a "
                "file of its name, so "
                "give it one of letters, digits, '_', '.' and '-'."
            )
    prepare_tokenizer(tokenizer, config)
    tokenizer.padding_side = "left"
    return tokenizer


def generation_config(model: Model, init_kwargs: dict | None) -> GenerationConfig | None:
    """What the model says about its own generating: it may know more stop tokens than the
    tokenizer. Where it has no file about that, its configuration says it, as for transformers.

    None where nothing says it. Raises InputError for a file that says nothing intelligible.
    """
    if isinstance(model, PreTrainedModel):
        return model.generation_config
    # As from_pretrained does it.
    for file in ({}, {"config_file_name": "config.json", "_from_model_config": True}):
        try:
            return GenerationConfig.from_pretrained(model, **file, **sources.where(init_kwargs))
        except (OSError, TypeError) as error:
            is_damaged = isinstance(error, TypeError) or isinstance(
                error.__context__, json.JSONDecodeError | UnicodeDecodeError
            )
            if is_damaged:
                raise InputError(
                    f"the generation config of model {model!r} cannot be read "
                    f"({reason(error)}); get it again, or delete it."
                ) from error
    return None


def shared_vocabulary(
    student: Model, teacher: Model, tokenizer: PreTrainedTokenizerBase, config: GKDConfig
) -> int:
    """How many token ids both models score, after checking that they mean the same. No weights are
    loaded.

    A teacher whose directory or repository has no tokenizer is taken at its word: then only sizes
    can be checked. A token that the caller has added to the tokenizer is new to both of them: a
    warning names it.
    """
    sizes = [
        sources.model_config(model, config, init_kwargs).get_text_config().vocab_size
        for model, init_kwargs in (
            (student, config.model_init_kwargs),
            (teacher, config.teacher_model_init_kwargs),
        )
    ]
    teacher_tokenizer = _tokenizer_of(
        sources.name_of(teacher), config, config.teacher_model_init_kwargs
    )
    if teacher_tokenizer is None:
        logger.warning("the teacher comes without a tokenizer; it is taken to use the student's.")
        return shared_vocabulary_size(tokenizer, tokenizer, *sizes)
    own = _tokenizer_of(sources.name_of(student), config, config.model_init_kwargs)
    new = new_tokens(tokenizer, own)
    shared = shared_vocabulary_size(tokenizer, teacher_tokenizer, *sizes, new)
    known = teacher_tokenizer.get_vocab().values()
    names = [
        token for token_id, token in new.items() if token_id < shared and token_id not in known
    ]
    if names := [name for name in names if name != tokenizer.pad_token]:
        logger.warning(
            "the tokenizer has tokens that neither model comes with (%s): what the teacher says of "
            "them is as good as its rows for them.",
            name_list(names),
        )
    return shared


def require_known_tokens(examples: Examples | None, vocabulary: int) -> None:
    """Raise InputError where the data uses a token id that the models do not score."""
    for tokens in (examples.prompt_ids, examples.completion_ids) if examples is not None else ():
        largest = max(tokens.tokens)
        if largest >= vocabulary:
            raise InputError(
                f"the data uses token id {largest} but student and teacher score only the first "
                f"{vocabulary}; use the "
                "models' own tokenizer, or resize their embeddings."
            )


def student_ds_config(model: Model, config: GKDConfig) -> dict[str, Any]:
    """What the student is loaded for: its DeepSpeed file, resolved for this model and the ranks
    there are, with swap folders that are ours. Once per run.
    """
    ds_config = resolved_student(model, config)
    accelerator.refuse_missing_kernels(ds_config)
    zero.claim_swap_folders(ds_config)
    return ds_config


def resolved_student(model: Model, config: GKDConfig) -> dict[str, Any]:
    """The student's DeepSpeed file, resolved."""
    return resolve_student(
        config,
        world_size=ranks.world_size(),
        hidden_size=_hidden_size(model, config, config.model_init_kwargs),
        precision=accelerator.precision_name(config),
    )


def teacher_ds_config(model: Model, config: GKDConfig) -> dict[str, Any]:
    """The same for the teacher; for its NVMe buffers see teacher/loading.py."""
    ds_config = resolve_teacher(
        config,
        hidden_size=_hidden_size(model, config, config.teacher_model_init_kwargs),
        precision=accelerator.precision_name(config),
    )
    accelerator.refuse_missing_kernels(ds_config)
    zero.claim_swap_folders(ds_config)
    return ds_config


def load_student(model: Model, config: GKDConfig, ds_config: dict[str, Any]) -> PreTrainedModel:
    """The student's model; a name is loaded partitioned when `ds_config` is ZeRO-3. Collective."""
    return models.load(model, "student", config, config.model_init_kwargs, ds_config)


def load_teacher(model: Model, config: GKDConfig, ds_config: dict[str, Any]) -> PreTrainedModel:
    """The teacher's model; a name is loaded shard by shard, straight to where `ds_config` says.
    Collective.
    """
    return models.load(model, "teacher", config, config.teacher_model_init_kwargs, ds_config)


def shapes(model: Model, config: GKDConfig, init_kwargs: dict | None) -> PreTrainedModel:
    """The model without its weights: a name's model on the meta device."""
    if isinstance(model, PreTrainedModel):
        return model
    model_config = sources.model_config(model, config, init_kwargs)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(
            model_config, trust_remote_code=config.trust_remote_code
        )


def _tokenizer_of(
    name: str, config: GKDConfig, init_kwargs: dict | None
) -> PreTrainedTokenizerBase | None:
    """The tokenizer that comes with a model; None only where there is none, and InputError where
    there is a bad one.
    """
    where = sources.where(init_kwargs)
    if not os.path.isdir(name) and not HUB_NAME.fullmatch(name):
        return None  # an object that was never in a directory, or whose directory is gone
    try:
        if not _has_tokenizer(name, **where):
            return None
        return AutoTokenizer.from_pretrained(
            name, trust_remote_code=config.trust_remote_code, **where
        )
    except Exception as error:  # tokenizers raises plain ones; the hub and a model's own code, any
        raise InputError(
            f"the tokenizer of model {name!r} cannot be read ({reason(error)}); mend it."
        ) from error


def _has_tokenizer(
    name: str, subfolder: str = "", revision: str | None = None, token: Any = None
) -> bool:
    """Whether the directory, or the hub's repository, has a tokenizer's files. The hub's local
    cache is asked first.
    """

    def inside(place: str) -> bool:
        return any(any(Path(place, subfolder).glob(pattern)) for pattern in TOKENIZER_FILES)

    if os.path.isdir(name):
        return inside(name)
    try:
        if inside(snapshot_download(name, revision=revision, local_files_only=True)):
            return True
    except LocalEntryNotFoundError:
        pass  # nothing of it is in the cache
    files = HfApi(token=token).list_repo_files(name, revision=revision)
    return any(
        fnmatch(file, str(Path(subfolder, pattern)))
        for file in files
        for pattern in TOKENIZER_FILES
    )


def _hidden_size(model: Model, config: GKDConfig, init_kwargs: dict | None) -> int:
    text = sources.model_config(model, config, init_kwargs).get_text_config()
    if "hidden_size" not in {*text.to_dict(), *text.attribute_map}:
        raise InputError(
            f"the configuration of {sources.name_of(model)!r} ({text.model_type}) has no "
            "hidden_size, so it is no plain decoder; choose another model."
        )
    return text.hidden_size

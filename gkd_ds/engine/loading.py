"""From what the user gave (names or objects) to tokenizers, token lists and models; everything
cheap comes first.
"""

from __future__ import annotations

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
from safetensors import SafetensorError, safe_open
from transformers import (
    AutoConfig,
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
from gkd_ds.data.vocabulary import shared_vocabulary_size
from gkd_ds.engine import accelerator, zero
from gkd_ds.runtime import ranks
from gkd_ds.runtime.errors import InputError, first_line

logger = logging.getLogger(__name__)

Model = str | PreTrainedModel
# A directory without any of these has no tokenizer; transformers would make up an empty one from
# the model's type.
TOKENIZER_FILES = ("tokenizer*", "vocab.*", "*.model", "tekken.json")


def require_causal_lm(model: Any, role: str) -> Model:
    """`model` itself, if it is a name or a transformers model. Raises InputError otherwise."""
    if isinstance(model, str | PreTrainedModel):
        return model
    if model is None:
        raise InputError(
            f"no {role} is given; pass the {role}'s directory or hub name, or a transformers model."
        )
    raise InputError(
        f"the {role} is a {type(model).__name__}; pass a transformers causal language model or the "
        "name of one."
    )


def refuse_ignored(model: Model, role: str, **settings: Any) -> None:
    """Raise InputError for settings that say how to load a model that is loaded already."""
    for name, value in settings.items():
        if isinstance(model, PreTrainedModel) and value:
            raise InputError(f"{name} is set but the {role} is already a model; drop one of them.")


def require_safetensors(model: Model, init_kwargs: dict | None) -> None:
    """Raise InputError for a directory whose weights are pickles only (loading a pickle may run
    code) or damaged.

    Names on the hub are checked when they are loaded, by `use_safetensors`.
    """
    if isinstance(model, str) and not os.path.isdir(model) and not HUB_NAME.fullmatch(model):
        raise InputError(
            f"the model {model!r} is neither a directory nor a hub name such as org/name; check "
            "the path."
        )
    given = init_kwargs or {}
    if given.get("use_safetensors", True) is not True:
        raise InputError(
            "model init kwargs set use_safetensors, but only safetensors are loaded; leave it out."
        )
    if not isinstance(model, str) or not os.path.isdir(model) or "gguf_file" in given:
        return
    directory = Path(model, given.get("subfolder", ""))
    files = sorted(directory.glob("*.safetensors"))
    if not files:
        raise InputError(
            f"the directory {model!r} has no weights in safetensors; pickles (pytorch_model.bin) "
            "can run code and are "
            "not loaded: convert them with save_pretrained, where you trust them."
        )
    whole = directory / "model.safetensors"  # transformers prefers it to what an index lists
    for shard in () if whole in files else _shards(directory / "model.safetensors.index.json"):
        if directory / shard not in files:
            raise InputError(f"the weights {str(directory / shard)!r} are missing; copy them, too.")
    for file in files:
        try:
            with safe_open(
                file, framework="pt"
            ):  # reads the header, and compares it with the file's size
                pass
        except (OSError, SafetensorError) as error:
            raise InputError(
                f"the weights {str(file)!r} are damaged ({_reason(error)}); copy them again."
            ) from error


def _shards(index: Path) -> set[str]:
    """The files that hold a sharded model, by its index; none where there is no index."""
    if not index.exists():
        return set()
    try:
        return set(json.loads(index.read_text())["weight_map"].values())
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        reason = _reason(error)
        raise InputError(
            f"the weights' index {str(index)!r} cannot be read ({reason}); copy it again."
        ) from error


def load_tokenizer(model: Model, given: Any, config: GKDConfig) -> PreTrainedTokenizerBase:
    """The run's tokenizer, ready to use: `given` (processing_class), or the student's own."""
    if given is not None and not isinstance(given, PreTrainedTokenizerBase):
        raise InputError(
            f"processing_class is a {type(given).__name__}; pass the student's tokenizer."
        )
    _model_config(
        model, config, config.model_init_kwargs
    )  # loading a tokenizer reads it: a bad one is blamed first
    tokenizer = (
        given
        if given is not None
        else _tokenizer_of(name_of(model), config, config.model_init_kwargs)
    )
    if tokenizer is None:
        raise InputError(
            f"the student {name_of(model)!r} comes without a tokenizer; pass processing_class."
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
            return GenerationConfig.from_pretrained(model, **file, **_where(init_kwargs))
        except (OSError, TypeError) as error:
            is_damaged = isinstance(error, TypeError) or isinstance(
                error.__context__, json.JSONDecodeError | UnicodeDecodeError
            )
            if is_damaged:
                raise InputError(
                    f"the generation config of model {model!r} cannot be read ({_reason(error)}); "
                    "get it again, or delete it."
                ) from error
    return None


def shared_vocabulary(
    student: Model, teacher: Model, tokenizer: PreTrainedTokenizerBase, config: GKDConfig
) -> int:
    """How many token ids both models score, after checking that they mean the same. No weights are
    loaded.

    A teacher whose directory or repository has no tokenizer is taken at its word: then only sizes
    can be checked.
    """
    sizes = [
        _model_config(model, config, init_kwargs).get_text_config().vocab_size
        for model, init_kwargs in (
            (student, config.model_init_kwargs),
            (teacher, config.teacher_model_init_kwargs),
        )
    ]
    teacher_tokenizer = _tokenizer_of(name_of(teacher), config, config.teacher_model_init_kwargs)
    if teacher_tokenizer is None:
        logger.warning("the teacher comes without a tokenizer; it is taken to use the student's.")
        teacher_tokenizer = tokenizer
    return shared_vocabulary_size(tokenizer, teacher_tokenizer, *sizes)


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
    """What the student's engine is started with: its DeepSpeed file, resolved for this model and
    the ranks there are, with swap folders that are ours. Once per run.
    """
    ds_config = resolve_student(
        config,
        world_size=ranks.world_size(),
        hidden_size=_hidden_size(model, config, config.model_init_kwargs),
        precision=accelerator.precision_name(config),
    )
    accelerator.refuse_missing_kernels(ds_config)
    zero.claim_swap_folders(ds_config)
    return ds_config


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
    """The student's model; a name is loaded partitioned when `ds_config` is ZeRO-3."""
    if isinstance(model, PreTrainedModel):
        return model
    return zero.load(
        model,
        ds_config,
        _dtype(config.dtype, config),
        **_init_kwargs(config, config.model_init_kwargs),
    )


def load_teacher(model: Model, config: GKDConfig, ds_config: dict[str, Any]) -> PreTrainedModel:
    """The teacher's model; a name is loaded shard by shard, straight to where `ds_config` says."""
    if isinstance(model, PreTrainedModel):
        return model.to(accelerator.precision(config))
    return zero.load(
        model,
        ds_config,
        accelerator.precision(config),
        **_init_kwargs(config, config.teacher_model_init_kwargs),
    )


def teacher_shapes(model: Model, config: GKDConfig) -> PreTrainedModel:
    """The teacher without its weights: a name's model on the meta device."""
    if isinstance(model, PreTrainedModel):
        return model
    model_config = _model_config(model, config, config.teacher_model_init_kwargs)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(
            model_config, trust_remote_code=config.trust_remote_code
        )


def name_of(model: Model) -> str:
    """The directory or hub name of a model."""
    return model if isinstance(model, str) else model.config._name_or_path


def _tokenizer_of(
    name: str, config: GKDConfig, init_kwargs: dict | None
) -> PreTrainedTokenizerBase | None:
    """The tokenizer that comes with a model; None only where there is none, and InputError where
    there is a bad one.
    """
    where = _where(init_kwargs)
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
            f"the tokenizer of model {name!r} cannot be read ({_reason(error)}); mend it."
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


def _model_config(model: Model, config: GKDConfig, init_kwargs: dict | None):
    if isinstance(model, PreTrainedModel):
        return model.config
    try:
        return AutoConfig.from_pretrained(
            model, trust_remote_code=config.trust_remote_code, **_where(init_kwargs)
        )
    except (
        Exception
    ) as error:  # an architecture's configuration may stumble over wrong content in any way
        raise InputError(
            f"the configuration of model {model!r} cannot be read ({_reason(error)}); mend it."
        ) from error


def _hidden_size(model: Model, config: GKDConfig, init_kwargs: dict | None) -> int:
    return _model_config(model, config, init_kwargs).get_text_config().hidden_size


def _reason(error: Exception) -> str:
    """The first sentence of what a library says."""
    return first_line(error).split(". ")[0].rstrip(".:")


def _where(init_kwargs: dict | None) -> dict[str, Any]:
    """Those of the init kwargs that say where the model's files are."""
    return {
        key: value
        for key, value in (init_kwargs or {}).items()
        if key in ("revision", "token", "subfolder")
    }


def _init_kwargs(config: GKDConfig, given: dict | None) -> dict[str, Any]:
    kwargs: dict[str, Any] = {"trust_remote_code": config.trust_remote_code, **(given or {})}
    if "gguf_file" not in kwargs:
        kwargs["use_safetensors"] = True
    if config.attn_implementation:
        kwargs.setdefault("attn_implementation", config.attn_implementation)
    # TRL's name for it; a name such as "bfloat16" in either is a torch dtype.
    dtype = kwargs.pop("torch_dtype", None) or kwargs.pop("dtype", None)
    if dtype is not None:
        kwargs["dtype"] = (
            getattr(torch, dtype) if isinstance(dtype, str) and dtype != "auto" else dtype
        )
    # ZeRO-3 decides where weights are.
    kwargs.pop("device_map", None)
    kwargs.pop("use_cache", None)
    return kwargs


def _dtype(name: str | None, config: GKDConfig) -> torch.dtype | str:
    """DeepSpeed trains bf16 and fp16 models with fp32 master weights, made from what is loaded
    here.
    """
    if name in (None, "auto"):
        return accelerator.precision(config)
    return getattr(torch, name)

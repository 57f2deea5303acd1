"""What the user gave as a model, a name or an object, checked before any weight is loaded."""

from __future__ import annotations

import json
import logging
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES
from transformers.utils import find_adapter_config_file

from gkd_ds.config.config import GKDConfig
from gkd_ds.config.paths import ADAPTER_REMEDY, HUB_NAME
from gkd_ds.engine import accelerator
from gkd_ds.engine.loading_report import problem
from gkd_ds.engine.weights import Checkpoint
from gkd_ds.runtime.errors import InputError, reason, show

logger = logging.getLogger(__name__)

Model = str | PreTrainedModel


def require_causal_lm(model: Any, role: str) -> Model:
    """`model` itself, if it is a name or a transformers model that can take a role. Raises
    InputError otherwise.
    """
    if model is None:
        raise InputError(
            f"no {role} is given; pass the {role}'s directory or hub name, or a transformers model."
        )
    if isinstance(model, PreTrainedModel):
        _check_object(model, role)
    elif not isinstance(model, str):
        raise InputError(
            f"the {role} is a {type(model).__name__}; pass a transformers causal language model or "
            "the name of one."
        )
    return model


def _check_object(model: PreTrainedModel, role: str) -> None:
    kind = type(model).__name__
    _refuse_encoder(model.config, f"the {role} ({kind})")
    if model.get_output_embeddings() is None:
        raise InputError(
            f"the {role} is a {kind}, which has no language model head; load it with "
            "AutoModelForCausalLM, or pass its name."
        )
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_meta:
            raise InputError(
                f"the {role} has weights without numbers ({name!r} is on the meta device); load "
                "it whole, or pass its name."
            )


def require_trainable(student: Model) -> None:
    """Raise InputError for an object that could not be trained, or not be saved afterwards."""
    if not isinstance(student, PreTrainedModel):
        return
    if not any(weight.requires_grad for weight in student.parameters()):
        raise InputError(
            "all weights of the student are frozen, so there is nothing to train (as after "
            "merge_and_unload of an adapter); call requires_grad_(True) on it, or pass its name."
        )
    weights = dict(student.named_parameters(remove_duplicate=False))
    for name, source in student.all_tied_weights_keys.items():
        if weights[name] is not weights[source]:
            raise InputError(
                f"the configuration of the student ties {name!r} to {source!r}, but they are two "
                "weights, which cannot be saved as one; call tie_weights(), or set "
                "tie_word_embeddings to false in its configuration, save it and load it again."
            )


def refuse_shared_weights(student: Model, teacher: Model) -> None:
    """Raise InputError where student and teacher are one object, or share weights."""
    if not isinstance(student, PreTrainedModel) or not isinstance(teacher, PreTrainedModel):
        return
    places = {weight.untyped_storage().data_ptr(): name for name, weight in _held_by(student)}
    for name, weight in _held_by(teacher):
        if weight.untyped_storage().data_ptr() in places:
            raise InputError(
                f"student and teacher share weights ({name!r}), so that the teacher would change "
                "with the student; load the teacher for itself, or pass its name."
            )


def _held_by(model: PreTrainedModel):
    return ((name, weight) for name, weight in model.named_parameters() if weight.numel())


def refuse_ignored(model: Model, role: str, **settings: Any) -> None:
    """Raise InputError for settings that say how to load a model that is loaded already."""
    for name, value in settings.items():
        if isinstance(model, PreTrainedModel) and value:
            raise InputError(f"{name} is set but the {role} is already a model; drop one of them.")


def set_attention(model: Model, role: str, config: GKDConfig) -> None:
    """Give an object the attention that a name would be loaded with. Raises InputError where it is
    unknown or not installed.
    """
    if not isinstance(model, PreTrainedModel) or not config.attn_implementation:
        return
    try:
        model.set_attn_implementation(config.attn_implementation)
    except (ValueError, ImportError) as error:
        raise InputError(
            f"the {role} cannot have the attention that attn_implementation names "
            f"({reason(error)}); choose another one."
        ) from error


def adapter_config(model: str, role: str, given: dict | None) -> str | None:
    """The configuration file of the adapter that a directory or repository holds; None where there
    is none. Raises InputError for one beside whole weights: transformers would load both where peft
    is installed, and ignore the adapter elsewhere.
    """
    try:
        found = find_adapter_config_file(model, **where(given))
    except OSError:
        return None  # nothing there can be read, which is said more clearly elsewhere
    if found and os.path.isfile(os.path.join(os.path.dirname(found), "config.json")):
        raise InputError(
            f"the {role} {model!r} holds an adapter (adapter_config.json) beside a whole model; "
            f"{ADAPTER_REMEDY}."
        )
    return found


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
                f"the weights {str(file)!r} are damaged ({reason(error)}); copy them again."
            ) from error


def _shards(index: Path) -> set[str]:
    """The files that hold a sharded model, by its index; none where there is no index."""
    if not index.exists():
        return set()
    try:
        return set(json.loads(index.read_text())["weight_map"].values())
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise InputError(
            f"the weights' index {str(index)!r} cannot be read ({reason(error)}); copy it again."
        ) from error


def require_whole(model: Model, role: str, config: GKDConfig, given: dict | None) -> None:
    """Raise InputError unless `model` can be loaded here as a causal language model, and its files
    hold the weights of the one that its configuration describes. Reads no weights.

    Of an object nobody knows any more whether all of its weights came from a file.
    """
    if isinstance(model, PreTrainedModel):
        if role == "student":
            _require_savable(model)
        return
    _check_dtype(role, config, given)
    _refuse_encoder(model_config(model, config, given), f"the {role} {model!r}")
    try:
        checkpoint = Checkpoint(model, accelerator.precision(config), init_kwargs(config, given))
        shapes, report = checkpoint.look()
    except Exception as error:  # a library that is missing, a setting that is wrong, a model's code
        raise InputError(
            f"the {role} {model!r} cannot be loaded as a causal language model ({reason(error)}); "
            "mend that, or choose another model."
        ) from error
    refuse_incomplete(model, role, shapes, report, checkpoint.is_changed)
    if role == "student":
        _require_savable(shapes)


def _require_savable(student: PreTrainedModel) -> None:
    """Raise InputError where the student's configuration cannot be written: transformers would say
    so when the finished student is saved.
    """
    try:
        with tempfile.TemporaryDirectory() as directory:
            student.config.save_pretrained(directory)
    except Exception as error:  # its own checks, and those of an architecture's code
        raise InputError(
            f"the configuration of the student ({type(student).__name__}) could not be saved with "
            f"what is trained ({reason(error)}); mend it."
        ) from error


def refuse_incomplete(
    name: str,
    role: str,
    model: PreTrainedModel,
    report: dict[str, Any],
    is_changed: bool = False,
) -> None:
    """Raise InputError where transformers' `report` says that files are not those of `model`."""
    if fault := problem(model, report, is_changed):
        raise InputError(
            f"the weights of the {role} {name!r} are not those of the {type(model).__name__} that "
            f"its configuration describes: {fault}; mend the one or the other, and save what is "
            "meant with save_pretrained."
        )


def _refuse_encoder(config: PretrainedConfig, what: str) -> None:
    kind, is_decoder = config.model_type, config.to_dict().get("is_decoder", True)
    if config.is_encoder_decoder:
        raise InputError(
            f"{what} is an encoder-decoder ({kind}); choose a decoder-only causal language model."
        )
    if kind in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not is_decoder:
        raise InputError(
            f"{what} is an encoder ({kind} without is_decoder), where every token sees those after "
            "it; choose a decoder-only causal language model."
        )


def name_of(model: Model) -> str:
    """The directory or hub name of a model."""
    return model if isinstance(model, str) else model.config._name_or_path


def model_config(model: Model, config: GKDConfig, given: dict | None) -> PretrainedConfig:
    """The configuration of a model; InputError for one that cannot be read."""
    if isinstance(model, PreTrainedModel):
        return model.config
    try:
        return AutoConfig.from_pretrained(
            model, trust_remote_code=config.trust_remote_code, **where(given)
        )
    except (
        Exception
    ) as error:  # an architecture's configuration may stumble over wrong content in any way
        raise InputError(
            f"the configuration of model {model!r} cannot be read ({reason(error)}); mend it."
        ) from error


def where(given: dict | None) -> dict[str, Any]:
    """Those of the init kwargs that say where the model's files are."""
    return {
        key: value
        for key, value in (given or {}).items()
        if key in ("revision", "token", "subfolder")
    }


def init_kwargs(config: GKDConfig, given: dict | None) -> dict[str, Any]:
    """What `from_pretrained` is called with beside the name and the dtype: the user's init kwargs,
    and what the other fields say.

    The dtype is always the run's.
    """
    kwargs: dict[str, Any] = {"trust_remote_code": config.trust_remote_code, **(given or {})}
    if "gguf_file" not in kwargs:
        kwargs["use_safetensors"] = True
    if config.attn_implementation:
        kwargs.setdefault("attn_implementation", config.attn_implementation)
    # ZeRO-3 decides where weights are.
    for name in ("dtype", "torch_dtype", "device_map", "use_cache"):
        kwargs.pop(name, None)
    return kwargs


def _check_dtype(role: str, config: GKDConfig, given: dict | None) -> None:
    """Raise InputError for a dtype that torch does not have; say so where it is not the run's."""
    given = given or {}
    asked = given.get("torch_dtype") or given.get("dtype")  # TRL's name for it is the first
    if role == "student":
        asked = asked or config.dtype
    if asked in (None, "auto"):
        return
    dtype = getattr(torch, asked, None) if isinstance(asked, str) else asked
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise InputError(
            f"the {role}'s init kwargs set the dtype {show(asked)}, which torch does not have; "
            "write 'bfloat16', 'float16', 'float32' or 'auto'."
        )
    run = accelerator.precision(config)
    if dtype != run:
        logger.warning(
            "the %s is loaded in %s, the run's precision (bf16, fp16), and not in %s.",
            role,
            str(run).removeprefix("torch."),
            str(dtype).removeprefix("torch."),
        )

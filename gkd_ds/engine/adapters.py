"""LoRA adapters: a student of which only small matrices are trained, on a base that stays as it is.

    base, adapter = split(model, peft_config)     # what the user gave: a base, what is put on it
    wrapped = adapter.attach(loaded_base, trainable=True)
    with merged(loaded_base): ...                 # products of whole matrices, for sampling

peft puts its layers *into* the base, so everything that runs the model (streaming, decoding, the
chunked head) runs it as before. peft is an extra: it is imported where an adapter is used.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from gkd_ds.config.config import GKDConfig
from gkd_ds.engine import sources, zero
from gkd_ds.runtime.errors import InputError, reason

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel


@dataclass(frozen=True)
class Adapter:
    """What is put on a base: a saved adapter (`directory`), a new one (`config`), or one that is
    there already (`model`).
    """

    directory: str | None = None
    config: PeftConfig | None = None
    model: PeftModel | None = None

    def attach(self, base: PreTrainedModel, trainable: bool) -> PeftModel:
        """Put the adapter into `base`, which may be partitioned. Raises InputError where it does
        not fit.
        """
        wrapped = self.model if self.model is not None else self._inject(base, trainable)
        _check(wrapped, base)
        if trainable and not any(p.requires_grad for p in wrapped.parameters()):
            raise InputError(
                "the student's adapter is frozen, so there is nothing to train; load it with "
                "PeftModel.from_pretrained(..., is_trainable=True)."
            )
        # One gather for a matrix and what belongs to it: DoRA reads them together.
        zero.keep_together(base, {type(layer) for _, layer in layers(base)})
        return wrapped

    def _inject(self, base: PreTrainedModel, trainable: bool) -> PeftModel:
        peft = _peft()
        try:
            with zero.partitioning_known(base):
                if self.directory is None:
                    return peft.get_peft_model(base, self.config, autocast_adapter_dtype=False)
                wrapped = peft.PeftModel.from_pretrained(
                    base, self.directory, is_trainable=trainable, autocast_adapter_dtype=False
                )
                held = peft.utils.load_peft_weights(self.directory, device="cpu").keys()
        except (ValueError, TypeError, KeyError, RuntimeError, OSError) as error:
            raise InputError(
                f"the adapter does not fit {type(base).__name__} ({reason(error)}); check its "
                "target_modules, or train the adapter on this model."
            ) from error
        _require_complete(wrapped, held, self.directory)
        return wrapped


def of_fields(config: GKDConfig) -> PeftConfig | None:
    """The adapter that the fields ask for (TRL's flags); None where `use_peft` is false."""
    if not config.use_peft:
        return None
    modules = config.lora_target_modules
    return _peft().LoraConfig(
        task_type="CAUSAL_LM",
        r=config.lora_r,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        # As peft and TRL: a single name may be "all-linear" or a pattern.
        target_modules=modules[0] if isinstance(modules, list) and len(modules) == 1 else modules,
        target_parameters=config.lora_target_parameters,
        modules_to_save=config.lora_modules_to_save,
        use_rslora=config.use_rslora,
        use_dora=config.use_dora,
    )


def split(
    model: Any, peft_config: Any, role: str = "student", given: dict | None = None
) -> tuple[Any, Adapter | None]:
    """The base of what the user gave, and its adapter (None: it has none). No weights are loaded;
    `given` are a name's init kwargs.

    Raises InputError where two adapters are given, or the one there is is no LoRA.
    """
    if peft_config is not None and not isinstance(peft_config, _peft().PeftConfig):
        raise InputError(
            f"peft_config is a {type(peft_config).__name__}; pass one of peft's, such as "
            "LoraConfig()."
        )
    adapter = None
    if isinstance(model, str):
        if found := sources.adapter_config(model, role, given):
            _require_lora(_config_in(os.path.dirname(found)), role)
            model, adapter = _base_of(model, found), Adapter(directory=model)
    elif type(model).__module__.partition(".")[0] == "peft":
        _require_lora(model.active_peft_config, role)
        model, adapter = model.get_base_model(), Adapter(model=model)
    if peft_config is None:
        return model, adapter
    if adapter is not None:
        raise InputError(
            f"the {role} has an adapter already, and peft_config asks for another; merge the first "
            "into its base (merge_and_unload), or leave out peft_config."
        )
    _require_lora(peft_config, role)
    return model, Adapter(config=peft_config)


def _config_in(directory: str) -> PeftConfig:
    try:
        return _peft().PeftConfig.from_pretrained(directory)
    except (ValueError, TypeError, KeyError, AttributeError, OSError) as error:
        raise InputError(
            f"the configuration of the adapter {directory!r} cannot be read ({reason(error)}); "
            "mend it."
        ) from error


def is_base(
    config: GKDConfig,
    student: Any,
    student_adapter: Adapter | None,
    teacher: Any,
    teacher_adapter: Adapter | None,
) -> bool:
    """Whether the teacher is what the student's adapter is put on, loaded in the same way."""
    alike = student is teacher
    if isinstance(student, str):
        alike = (
            student == teacher
            and config.model_init_kwargs == config.teacher_model_init_kwargs
            and config.dtype in (None, "auto")
        )
    return (
        alike
        and student_adapter is not None
        and teacher_adapter is None
        and config.teacher_deepspeed is None
    )


def _base_of(name: str, file: str) -> str:
    base = json.loads(Path(file).read_text(encoding="utf-8")).get("base_model_name_or_path")
    if not base:
        raise InputError(
            f"the adapter {name!r} does not say what it was trained on; write "
            f"base_model_name_or_path into its {os.path.basename(file)}."
        )
    return base


def _require_lora(config: PeftConfig, role: str) -> None:
    if not isinstance(config, _peft().LoraConfig):
        raise InputError(
            f"the {role}'s adapter is {config.peft_type.value}, and only LoRA (with its forms DoRA "
            "and rsLoRA) is supported; use peft.LoraConfig."
        )


def _require_complete(wrapped: PeftModel, held: Collection[str], directory: str) -> None:
    """Raise InputError unless an adapter's files hold all that its configuration puts into its
    base, and nothing else: peft fills what is missing with random numbers.
    """
    expected = _peft().get_peft_model_state_dict(wrapped, save_embedding_layers=False)
    missing = sorted(expected.keys() - held)
    beyond = sorted(name for name in held - expected.keys() if ".lora_" in name)
    for names, fault in ((missing, "missing"), (beyond, "without a place")):
        if names:
            raise InputError(
                f"the weights of the adapter {directory!r} are not those that its configuration "
                f"puts into {type(wrapped.get_base_model()).__name__}: {len(names)} "
                f"{'is' if len(names) == 1 else 'are'} {fault} ({names[0]!r}); mend the one or the "
                "other, or give it the base that it was trained on."
            )


def _check(wrapped: PeftModel, base: PreTrainedModel) -> None:
    """Embeddings and output layer must be the base's own: the loss and the teacher's streaming read
    them as plain matrices.
    """
    for what, layer in (
        ("the output layer", base.get_output_embeddings()),
        ("the embeddings", base.get_input_embeddings()),
    ):
        if type(layer).__module__.startswith("peft"):
            raise InputError(
                f"the adapter changes {what}, which gkd_ds reads as a plain matrix; leave it out "
                "of target_modules and modules_to_save."
            )
    if len(wrapped.active_adapters) != 1:
        raise InputError(
            f"the adapters {', '.join(wrapped.active_adapters)} are active at once; activate one."
        )


# -- running with the adapter merged, or without it -------------------------------------------


def layers(model: nn.Module) -> list[tuple[str, Any]]:
    """The layers that peft has put into `model`, by name; none where it has no adapter."""
    # Without peft in the process there is nothing of it in a model.
    return [
        (name, module)
        for name, module in model.named_modules()
        if type(module).__module__.startswith("peft.tuners.") and _is_tuner_layer(module)
    ]


def _is_tuner_layer(module: nn.Module) -> bool:
    from peft.tuners.tuners_utils import BaseTunerLayer

    return isinstance(module, BaseTunerLayer)


@contextmanager
def merged(model: nn.Module) -> Iterator[None]:
    """Adapters added into the matrices they belong to; afterwards these are what they were, bit for
    bit.

    Subtracting what was added would not restore them, so the sums stand in tensors of their own.
    The parameters must be whole.
    """
    tuned = [layer for _, layer in layers(model)]
    plain = [(p, p.data) for layer in tuned for p in layer.get_base_layer().parameters()]
    try:
        with torch.no_grad():
            for parameter, data in plain:
                parameter.data = data.clone()
            for layer in tuned:
                layer.merge()
        yield
    finally:
        for parameter, data in plain:
            parameter.data = data
        for layer in tuned:
            layer.merged_adapters.clear()


@contextmanager
def without(wrapped: PeftModel) -> Iterator[None]:
    """The base alone."""
    trainable = [p for p in wrapped.parameters() if p.requires_grad]
    try:
        with wrapped.disable_adapter():
            yield
    finally:
        for parameter in trainable:  # peft asks again for what it trains, in its own way
            parameter.requires_grad_(True)


def settings(wrapped: PeftModel | None) -> dict[str, Any] | None:
    """What must be the same for an adapter to go on from its weights, as JSON has it; None for
    none.
    """
    if wrapped is None:
        return None
    known = wrapped.active_peft_config.to_dict()
    # Where it came from, and how it began, is past.
    for name in ("base_model_name_or_path", "inference_mode", "peft_version", "revision"):
        known.pop(name, None)
    return json.loads(json.dumps(known, default=lambda value: sorted(map(str, value))))


# -- writing ----------------------------------------------------------------------------------


def adapter_state_dict(wrapped: PeftModel) -> dict[str, Tensor] | None:
    """The adapter's whole tensors on the CPU of rank 0 (None on the others), under the names that
    `wrapped` gives them. A collective.
    """
    names = {id(p) for p in wrapped.parameters() if p.requires_grad}
    return zero.full_state_dict(wrapped, lambda parameter: id(parameter) in names)


def merged_state_dict(model: PreTrainedModel) -> dict[str, Tensor] | None:
    """The weights of a plain model that says what `model` says with its adapter; on rank 0, else
    None. A collective, one layer at a time.
    """
    tuned = dict(layers(model))
    state = zero.full_state_dict(model)
    for name, layer in tuned.items():
        with zero.gathered(list(layer.parameters())), merged(layer):
            if state is not None:
                weight = layer.get_base_layer().weight
                state[f"{name}.base_layer.weight"] = weight.detach().to("cpu", copy=True)
    return None if state is None else _plain_names(state)


def _plain_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names as the model had them before peft; adapters are left out."""
    plain: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if ".lora_" in name or ".original_module." in name:
            continue
        name = name.replace(".base_layer.", ".")
        before, saved, after = name.partition(".modules_to_save.")
        plain[f"{before}.{after.partition('.')[2]}" if saved else name] = tensor
    return plain


def plain_model(model: PreTrainedModel) -> PreTrainedModel:
    """A model of the same class and configuration without adapter and without memory."""
    with torch.device("meta"):
        return type(model)(model.config)


def _peft() -> Any:
    try:
        import peft
    except ImportError:
        raise InputError(
            "an adapter needs peft, which is not installed; pip install 'gkd_ds[peft]'."
        ) from None
    return peft

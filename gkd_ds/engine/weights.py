"""What a model's files hold: whether that is the model which its configuration describes, and the
fingerprint of every weight.

transformers itself reads the files, by its plain path: the one that checkpoints are made for. What
differs is that a weight becomes a mere shape again as soon as the model is given it
(`_keep_shapes`), so that nobody holds more than one. `look` reads no more than the files' headers;
`read` goes over all of them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.quantizers import AutoHfQuantizer
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file
from transformers.utils import logging as transformers_logging
from transformers.utils.hub import get_checkpoint_shard_files

from gkd_ds.engine.fingerprint import fingerprint, is_same

# Those of the init kwargs that say where the model's files are.
PLACES = ("revision", "token", "subfolder", "cache_dir", "force_download", "local_files_only")


class Checkpoint:
    """The safetensors of the model `source` (a directory or a hub name), and the class and
    configuration of the model they are for.

    `dtype` and `init_kwargs` are those of `from_pretrained`. The files of a quantized model, and
    GGUF, are not comparable. Raises whatever transformers does.
    """

    def __init__(self, source: str, dtype: torch.dtype, init_kwargs: dict[str, Any]):
        given = dict(init_kwargs)
        # AutoModelForCausalLM keeps it from its configuration, too: the file's own wins.
        quantization = given.pop("quantization_config", None)
        config, rest = AutoConfig.from_pretrained(source, return_unused_kwargs=True, **given)
        is_gguf = rest.pop("gguf_file", None) is not None
        if quantization:
            rest["quantization_config"] = quantization
        with torch.device("meta"):
            shapes = AutoModelForCausalLM.from_config(
                config, trust_remote_code=given.get("trust_remote_code")
            )
        self.source, self.dtype, self.init_kwargs = source, dtype, rest
        self.model_class, self.config = type(shapes), shapes.config
        self.for_all_tokens = for_all_tokens(shapes)
        self.tied: dict[str, str] = dict(shapes.all_tied_weights_keys)
        self.is_changed = not config.to_dict().keys().isdisjoint(given)
        self.files = [] if is_gguf else _files(source, given)
        self.is_comparable = bool(self.files) and not _is_quantized(
            quantization or config.to_dict().get("quantization_config")
        )

    def look(self) -> tuple[PreTrainedModel, dict[str, Any]]:
        """The model without weights, and transformers' report of how the files fit it; in its
        "missing_keys" are also those weights that the model's class would let pass.

        Where the files are not comparable it only shows whether such a model can be loaded here.
        """
        with ExitStack() as files:
            weights = self._weights(files) if self.is_comparable else {}
            headers = {name: _Header(weight) for name, weight in weights.items()}
            model, report = self._load(headers, take=lambda weight: None)
        if not self.is_comparable:
            return model, {**report, "missing_keys": set()}
        other = {name for name, *_ in report["mismatched_keys"]}
        made_up = {name for name, _ in _taken(model)} - other
        return model, {**report, "missing_keys": report["missing_keys"] | made_up}

    def read(self, rank: int, ranks: int, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """Read all weights, one after the other. Returns the fingerprints of those that are
        `rank`'s, of `ranks` that share the work, by the model's names for them: each weight as it
        is in `dtype`, or in its own.
        """
        assigned = [0] * ranks  # elements

        def take(weight: nn.Parameter) -> Tensor | None:
            owner = assigned.index(min(assigned))
            assigned[owner] += weight.numel()
            return fingerprint(weight.to(dtype or weight.dtype)) if owner == rank else None

        with ExitStack() as files:
            model, _ = self._load(self._weights(files), take)
        buffers = {name: buffer for name, buffer in model.named_buffers() if not buffer.is_meta}
        saved = buffers.keys() & model.state_dict().keys() if rank == 0 else ()
        weights = {name: taken for name, taken in _taken(model) if taken is not None}
        return weights | {name: fingerprint(buffers[name]) for name in saved}

    def untied(self, prints: dict[str, Tensor]) -> list[str]:
        """The names that the configuration ties to another weight although the files, whose
        fingerprints these are, hold both, and they differ.
        """
        return [
            name
            for name, source in self.tied.items()
            if name in prints and source in prints and not is_same(prints[name], prints[source])
        ]

    def _weights(self, files: ExitStack) -> dict[str, Any]:
        """The slices of safetensors that stand for the weights in all files, by name."""
        weights = {}
        for file in self.files:
            opened = files.enter_context(safe_open(file, framework="pt"))
            weights |= {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
        return weights

    def _load(
        self, weights: dict[str, Any], take: Callable[[nn.Parameter], Any]
    ) -> tuple[PreTrainedModel, dict[str, Any]]:
        given = {**self.init_kwargs, "ignore_mismatched_sizes": True}  # they are in the report
        with _quiet(), _one_at_a_time(), _keep_shapes(take):
            return self.model_class.from_pretrained(
                None,
                config=self.config,
                state_dict=weights,
                dtype=self.dtype,
                output_loading_info=True,
                **given,
            )


def for_all_tokens(model: PreTrainedModel) -> set[str]:
    """The names of the weights that have a part in every result: all but an embedding that is no
    output layer, of which a forward reads the rows of its tokens, and the output layer's bias,
    which may be -inf for tokens that are ruled out.
    """
    head = model.get_output_embeddings()
    single = {id(weight) for weight in model.get_input_embeddings().parameters()}
    for name, weight in head.named_parameters() if head is not None else ():
        single = single | {id(weight)} if name == "bias" else single - {id(weight)}
    weights = model.named_parameters(remove_duplicate=False)
    return {name for name, weight in weights if id(weight) not in single}


class _Header:
    """A weight as its file's header describes it; transformers takes it for safetensors' slice."""

    def __init__(self, weight: Any):
        self.get_shape, self.get_dtype = weight.get_shape, weight.get_dtype

    def __getitem__(self, whole: Any) -> _Header:
        return self

    def to(self, device: Any, dtype: torch.dtype) -> Tensor:
        return torch.empty(self.get_shape(), dtype=dtype, device="meta")


def _taken(model: PreTrainedModel) -> Iterator[tuple[str, Any]]:
    """The names of the weights that were taken from `model`, with what became of them."""
    for name, shape in model.named_parameters(remove_duplicate=False):
        if "taken" in vars(shape):
            yield name, shape.taken


def _is_quantized(settings: Any) -> bool:
    """Whether transformers quantizes by these settings; it ignores those it does not know."""
    if isinstance(settings, dict):
        return AutoHfQuantizer.supports_quant_method(settings)
    return settings is not None


def _files(source: str, init_kwargs: dict[str, Any]) -> list[str]:
    """The safetensors of a model, fetched from the hub where they are not here."""
    places = {name: init_kwargs[name] for name in PLACES if name in init_kwargs}
    variant = init_kwargs.get("variant")
    for name in (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME):
        if variant:
            name = name.replace(".safetensors", f".{variant}.safetensors")
        file = cached_file(source, name, _raise_exceptions_for_missing_entries=False, **places)
        if file and name.endswith(".json"):
            return get_checkpoint_shard_files(source, file, **places)[0]
        if file:
            return [file]
    return []


@contextmanager
def _keep_shapes(take: Callable[[nn.Parameter], Any]) -> Iterator[None]:
    """Inside, any module that is given a weight gets its shape in its place, and the weight goes to
    `take`: what that returns is kept with the shape.
    """

    def replace(module: nn.Module, name: str, weight: nn.Parameter) -> nn.Parameter | None:
        # What a constructor fills by itself, in spite of the meta device, is of no file.
        if weight.is_meta or torch.get_default_device().type == "meta":
            return None
        shape = nn.Parameter(torch.empty_like(weight, device="meta"), requires_grad=False)
        shape._is_hf_initialized = True  # transformers shall not fill it
        shape.taken = take(weight)
        return shape

    handle = register_module_parameter_registration_hook(replace)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _one_at_a_time() -> Iterator[None]:
    """Keep transformers from reading ahead of what the model is given: that may be the whole."""
    name = "HF_DEACTIVATE_ASYNC_LOAD"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        del os.environ[name]
        if before is not None:
            os.environ[name] = before


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' messages and bars: it will have its say when the model is loaded."""
    level = transformers_logging.get_verbosity()
    has_bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity(transformers_logging.CRITICAL)
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if has_bars:
            transformers_logging.enable_progress_bar()

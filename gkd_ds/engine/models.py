"""Models with the weights that their files hold, in the precision of the run."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from gkd_ds.config.config import GKDConfig
from gkd_ds.engine import accelerator, sources, zero
from gkd_ds.engine.fingerprint import fingerprints, forget_pattern, is_same
from gkd_ds.engine.sources import Model
from gkd_ds.engine.weights import Checkpoint, for_all_tokens
from gkd_ds.runtime import ranks
from gkd_ds.runtime.errors import InputError, name_list, reason


def load(
    model: Model, role: str, config: GKDConfig, given: dict | None, ds_config: dict[str, Any]
) -> PreTrainedModel:
    """`model` in the run's precision: DeepSpeed makes the fp32 master weights of a student in 16
    bits of what this gives.

    A name is loaded with the init kwargs `given`, to where `ds_config` says, and its weights are
    compared with those of its files by their fingerprints. Raises InputError on all ranks where
    they differ. Collective.
    """
    dtype = accelerator.precision(config)
    if isinstance(model, PreTrainedModel):
        loaded = _in_precision(model, dtype)
        prints = fingerprints(loaded)
        _require_finite(type(model).__name__, role, dtype, prints, for_all_tokens(loaded))
        forget_pattern()
        return loaded
    kwargs = sources.init_kwargs(config, given)
    checkpoint = Checkpoint(model, dtype, kwargs)
    held = _fingerprints_of(checkpoint, ds_config) if checkpoint.is_comparable else {}
    _require_finite(repr(model), role, dtype, held, checkpoint.for_all_tokens)
    if untied := checkpoint.untied(held):
        # transformers' plain path then loads both weights, but ZeRO-3's would drop one of them.
        _require_all_untied(model, role, checkpoint, untied)
        kwargs["tie_word_embeddings"] = False
    loaded, report = zero.load(model, ds_config, dtype=dtype, **kwargs)
    sources.refuse_incomplete(model, role, loaded, report, checkpoint.is_changed)
    if held:
        _require_same(model, role, fingerprints(loaded), held)
    forget_pattern()
    return loaded


def _in_precision(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """An object as its name would have been loaded: weights in `dtype`, tables of fp32."""
    for weight in model.parameters():
        if weight.is_floating_point():
            weight.data = weight.data.to(dtype)
    rounded = [b for b in model.buffers() if b.is_floating_point() and b.itemsize < 4]
    for buffer in rounded:
        buffer.data = buffer.data.float()
    if rounded:
        _compute_tables(model)
    return model


def _compute_tables(model: PreTrainedModel) -> None:
    """Compute anew what no file holds (rotary frequencies), after a cast of the whole model has
    rounded it. As in `from_pretrained`, whatever a file holds is marked, and stays as it is.
    """
    for module in model.modules():
        module._is_hf_initialized = False
    for tensor in model.state_dict(keep_vars=True).values():
        tensor._is_hf_initialized = True
    model.initialize_weights()


def _fingerprints_of(checkpoint: Checkpoint, ds_config: dict[str, Any]) -> dict[str, Tensor]:
    """Of all that the files hold, by the model's names; every rank reads its share."""
    is_zero3 = ds_config["zero_optimization"].get("stage") == 3
    dtype = checkpoint.dtype if is_zero3 else None  # one for all weights, whatever the model wants

    def read() -> dict[str, Tensor]:
        with accelerator.loading():
            return checkpoint.read(ranks.rank(), ranks.world_size(), dtype)

    def failure(rank: int, error: Exception) -> InputError:
        return InputError(
            f"rank {rank} cannot read the weights of {checkpoint.source!r} "
            f"({reason(error)}); get them again."
        )

    held: dict[str, Tensor] = {}
    for share in ranks.run_on_all_ranks(read, failure):
        held |= share
    return held


def _require_finite(
    what: str, role: str, dtype: torch.dtype, prints: dict[str, Tensor], weights: set[str]
) -> None:
    """Raise InputError where `weights`, which have a part in every result, are no numbers, or too
    large for the run's precision. (What a single token's row makes of an update is seen, and the
    update skipped.) A collective.
    """
    broken = sorted(name for name in weights & prints.keys() if not prints[name].isfinite().all())
    for names in ranks.gather(broken):
        if names:
            raise InputError(
                f"the {role} {what} has weights that are not finite numbers in "
                f"{str(dtype).removeprefix('torch.')} ({name_list(names, 3)}); get it again, or "
                "train in another precision (bf16, fp16)."
            )


def _require_all_untied(model: str, role: str, checkpoint: Checkpoint, untied: list[str]) -> None:
    if set(untied) != set(checkpoint.tied):
        raise InputError(
            f"the configuration of the {role} {model!r} ties weights (tie_word_embeddings) for "
            f"which its files hold others ({name_list(untied, 3)}), but not all of them; mend the "
            "one or the other."
        )


def _require_same(
    model: str, role: str, loaded: dict[str, Tensor], held: dict[str, Tensor]
) -> None:
    other = sorted(name for name, theirs in held.items() if not is_same(loaded[name], theirs))
    for rank, names in enumerate(ranks.gather(other)):
        if names:
            raise InputError(
                f"the {role} {model!r} was loaded with other weights than its files hold: "
                f"{len(names)} of {len(held)} on rank {rank} ({name_list(names, 3)}); see that "
                "nothing writes to the files, and where nothing does, report it."
            )

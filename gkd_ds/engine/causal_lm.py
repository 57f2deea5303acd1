"""What gkd_ds assumes about a transformers causal language model: a body, an output layer, a list
of decoder layers.

Assumptions are checked at start-up (`check_head`, rollout/ways.py, teacher/streamed.py), so that an
architecture that breaks one is refused with a sentence instead of being trained on wrong logits.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from gkd_ds.runtime.errors import InputError, first_line


@dataclass(frozen=True)
class LogitTransform:
    """What some architectures do to the head's output: multiply it (Cohere, Granite), then squash
    it (Gemma 2).
    """

    scale: float = 1.0
    softcap: float | None = None

    @classmethod
    def of(cls, model_config) -> LogitTransform:
        """Read the transform from a transformers config; `check_head` compares it with the
        model.
        """
        known = model_config.get_text_config().to_dict()
        scale = known.get("logit_scale") or 1.0
        if known.get("logits_scaling"):
            scale /= known["logits_scaling"]
        return cls(scale=scale, softcap=known.get("final_logit_softcapping"))

    def apply_(self, logits: Tensor) -> Tensor:
        if self.scale != 1.0:
            logits = logits.mul_(self.scale)
        if self.softcap is not None:
            logits = logits.div_(self.softcap).tanh_().mul_(self.softcap)
        return logits

    def pull_back_(self, gradient: Tensor, logits: Tensor | None) -> Tensor:
        """Gradient with respect to the head's raw output, given the transformed `logits` where they
        are needed.
        """
        if self.softcap is not None:
            gradient = gradient.mul_(1 - (logits / self.softcap).square_())
        return gradient if self.scale == 1.0 else gradient.mul_(self.scale)


def body(model: PreTrainedModel) -> nn.Module:
    """The part between token ids and the output layer: the child that holds the input embedding.

    (transformers' `base_model` goes by a prefix, which for some architectures names no attribute.)
    """
    embedding = model.get_input_embeddings()
    return next(child for child in model.children() if _holds(child, embedding))


def body_forward(model: PreTrainedModel, input_ids_BT: Tensor) -> Tensor:
    """Last hidden states `[B, T, D]` (after the final norm) of right-padded sequences."""
    return body(model)(input_ids=input_ids_BT, use_cache=False).last_hidden_state


def logits(model: PreTrainedModel, input_ids_BT: Tensor) -> Tensor:
    """The model's logits `[B, T, W]`, by way of body, output layer and transform."""
    hidden_BTD = body_forward(model, input_ids_BT)
    return LogitTransform.of(model.config).apply_(model.get_output_embeddings()(hidden_BTD))


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """The list of decoder layers: beside the input embedding, and as long as the model is deep.

    A model may have other lists: the towers of other modalities, which stand further away; small
    modules, one per layer. Where lengths do not decide, the list with the most modules inside does.
    Raises InputError where there is none.
    """
    embedding = model.get_input_embeddings()
    around = [m for m in body(model).modules() if m is not embedding and _holds(m, embedding)]
    for module in reversed(around):  # the innermost first
        if lists := list(_outermost_lists(module)):
            depth = getattr(model.config.get_text_config(), "num_hidden_layers", None)
            return max(lists, key=lambda found: (len(found) == depth, len(list(found.modules()))))
    raise InputError(
        f"{type(model).__name__} has no list of decoder layers, which gkd_ds needs to stream a "
        "teacher layer by layer; choose a decoder-only architecture."
    )


def _holds(module: nn.Module, wanted: nn.Module) -> bool:
    return any(inside is wanted for inside in module.modules())


def _outermost_lists(module: nn.Module) -> Iterator[nn.ModuleList]:
    for child in module.children():
        if isinstance(child, nn.ModuleList):
            yield child
        else:
            yield from _outermost_lists(child)


def disable_dropout(model: nn.Module) -> None:
    """Set every rate to 0: those of dropout modules, and those a module keeps for `F.dropout` (OPT)
    or attention.
    """
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in list(vars(module).items()):
            if "drop" in name and isinstance(value, float):
                setattr(module, name, 0.0)


@contextmanager
def refusing(problem: str, remedy: str) -> Iterator[None]:
    """Around a start-up check: whatever an architecture's own code raises becomes an InputError.

    A lack of memory and a dead rank are no fault of the architecture.
    """
    try:
        yield
    except (InputError, torch.OutOfMemoryError, torch.distributed.DistError):
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {first_line(error)}".rstrip(".: ")
        raise InputError(f"{problem} ({reason}); {remedy}.") from error


@torch.no_grad()
def check_head(model: PreTrainedModel, role: str, device: torch.device) -> None:
    """Raise InputError unless transform(output layer(body(ids))) are the model's own logits.

    Some architectures do more to their logits than a scale and a soft cap, or feed the output layer
    something other than the body's last hidden state. Collective where parameters are partitioned:
    call inside the engine's root.
    """
    problem = (
        f"the {role} ({type(model).__name__}) computes its logits in a way gkd_ds does not know, "
        "so its divergence would be wrong"
    )
    remedy = "use a model whose logits are its output layer, scaled or soft-capped"
    vocabulary = model.config.get_text_config().vocab_size
    ids_BT = torch.arange(1, 9, device=device).remainder(vocabulary)[None]
    with refusing(problem, remedy):
        theirs = model(input_ids=ids_BT, use_cache=False).logits.float()
        ours = logits(model, ids_BT).float()
        scale = theirs.abs().max().clamp(min=1.0)
        if theirs.shape != ours.shape or (theirs - ours).abs().max() > 0.02 * scale:
            raise InputError(f"{problem}; {remedy}.")

"""What gkd_ds assumes about a transformers causal language model: a body, an output layer, a list
of decoder layers.

Assumptions are checked at start-up (`check_head`, rollout/decoder.py, teacher/streamed.py), so that
an architecture that breaks one is refused with a sentence instead of being trained on wrong logits.

Shapes: B sequences, t new tokens of each, L positions so far with them, V the shared vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers.generation.utils import ALL_CACHE_NAMES

from gkd_ds.records import Rollout, SequenceBatch, Source, packed_batch
from gkd_ds.runtime.errors import InputError, first_line

# (ids [B, t], mask [B, L] or None, positions [B, t], cache) -> logits [B, V]
Forward = Callable[[Tensor, "Tensor | None", Tensor, DynamicCache], Tensor]
# (ids [B, t], positions [1, t], cache or None for the first) -> logits [B, V] and the cache with
# the new tokens
CachedForward = Callable[[Tensor, Tensor, Any], tuple[Tensor, Any]]


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


def body_forward(model: PreTrainedModel, input_ids_BT: Tensor, **extra: Tensor) -> Tensor:
    """Last hidden states `[B, T, D]` (after the final norm) of right-padded sequences. `extra` goes
    to the model.
    """
    return body(model)(input_ids=input_ids_BT, use_cache=False, **extra).last_hidden_state


def completion_hidden(model: PreTrainedModel, batch: SequenceBatch) -> Tensor:
    """The last hidden states `[N, D]` that predict the completions of `batch`, padded or packed."""
    hidden_BTD = body_forward(model, batch.input_ids_BT, **batch.extra)
    return hidden_BTD.flatten(0, 1).index_select(0, batch.index_N)


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


# -- decoding --------------------------------------------------------------------------------------


def decoding_forward(model: PreTrainedModel, vocabulary: int) -> Forward:
    """Over a key-value cache of ours, with padding on the left."""
    run, last_logits = body(model), _last_logits(model, vocabulary)
    name = _cache_name(inspect.signature(run.forward).parameters)

    def forward(
        ids_Bt: Tensor, mask_BL: Tensor | None, positions_Bt: Tensor, cache: DynamicCache
    ) -> Tensor:
        output = run(
            input_ids=ids_Bt,
            attention_mask=mask_BL,
            position_ids=positions_Bt,
            use_cache=True,
            **{name: cache},
        )
        return last_logits(output.last_hidden_state)

    return forward


def cached_forward(model: PreTrainedModel, vocabulary: int) -> CachedForward:
    """Over the model's own cache, whatever it is: the model makes it, and gets back what it
    returned. No padding.
    """
    run, last_logits = body(model), _last_logits(model, vocabulary)
    parameters = inspect.signature(run.forward).parameters
    name = _cache_name(parameters)

    def forward(ids_Bt: Tensor, positions_1t: Tensor, cache: Any) -> tuple[Tensor, Any]:
        past = {} if cache is None else {name: cache}
        if "position_ids" in parameters:
            past["position_ids"] = positions_1t.expand(ids_Bt.shape)
        output = run(input_ids=ids_Bt, use_cache=True, **past)
        return last_logits(output.last_hidden_state), output[name]

    return forward


@dataclass
class Tokens:
    """The cache of a model that is used without one: all tokens so far."""

    ids_BL: Tensor

    def reorder_cache(self, rows_B: Tensor) -> None:
        """Keep these rows. (The name is transformers'.)"""
        self.ids_BL = self.ids_BL[rows_B]


def whole_forward(model: PreTrainedModel, vocabulary: int) -> CachedForward:
    """Without any cache: the whole sequences again, for every token."""
    run, last_logits = body(model), _last_logits(model, vocabulary)

    def forward(
        ids_Bt: Tensor, positions_1t: Tensor, cache: Tokens | None
    ) -> tuple[Tensor, Tokens]:
        cache = Tokens(ids_Bt if cache is None else torch.cat([cache.ids_BL, ids_Bt], 1))
        output = run(input_ids=cache.ids_BL, use_cache=False)
        return last_logits(output.last_hidden_state), cache

    return forward


def _cache_name(names: Iterable[str]) -> str:
    """The argument that takes the cache: transformers' name for it, which 5.24 changed, unless the
    model has another one.
    """
    known = (*ALL_CACHE_NAMES, "past_key_values")
    return next((name for name in known if name in names), ALL_CACHE_NAMES[0])


def _last_logits(model: PreTrainedModel, vocabulary: int) -> Callable[[Tensor], Tensor]:
    """Hidden states `[B, t, D]` -> logits of the last position `[B, V]`."""
    head: nn.Module = model.get_output_embeddings()
    transform = LogitTransform.of(model.config)
    return lambda hidden_BtD: transform.apply_(head(hidden_BtD[:, -1]))[:, :vocabulary]


# -- training --------------------------------------------------------------------------------------


def set_learning_mode(model: nn.Module, dropout: bool) -> None:
    """Training mode where there is dropout; otherwise evaluation mode, so that what learns is what
    samples: without a router's noise, or whatever else only training mode has.

    Gradient checkpointing happens in training mode only: a layer that does it is in it by itself,
    without the modules inside.
    """
    model.train(dropout)
    for module in model.modules():
        module.training |= getattr(module, "gradient_checkpointing", False)


def disable_dropout(model: nn.Module) -> None:
    """Set every rate to 0: those of dropout modules, and those a module keeps for `F.dropout` (OPT)
    or attention.
    """
    for module in model.modules():
        for name in _dropout_rates(module):
            setattr(module, name, 0.0)


@contextmanager
def without_dropout(model: nn.Module) -> Iterator[None]:
    """Inside, every rate is 0, also those that modules read from their configuration (Falcon)."""
    owners = [*model.modules()]
    owners += {id(m.config): m.config for m in owners if "config" in vars(m)}.values()
    rates = [
        (owner, name, value) for owner in owners for name, value in _dropout_rates(owner).items()
    ]
    for owner, name, _ in rates:
        setattr(owner, name, 0.0)
    try:
        yield
    finally:
        for owner, name, value in rates:
            setattr(owner, name, value)


def _dropout_rates(owner: object) -> dict[str, float]:
    return {
        name: value
        for name, value in vars(owner).items()
        if isinstance(value, float)
        and ("drop" in name or (name == "p" and isinstance(owner, nn.Dropout)))
    }


# -- checks ----------------------------------------------------------------------------------------


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
    problem, remedy = _head_problem(model, role)
    vocabulary = model.config.get_text_config().vocab_size
    ids_BT = torch.arange(1, 9, device=device).remainder(vocabulary)[None]
    with refusing(problem, remedy):
        theirs = model(input_ids=ids_BT, use_cache=False).logits
        theirs_dtype, theirs = theirs.dtype, theirs.float()
        ours = logits(model, ids_BT).float()
        scale = theirs.abs().max().clamp(min=1.0)
        # The same products in both: what differs is a transform, but for half precision's rounding.
        tolerance = 2e-4 if theirs_dtype == torch.float32 else 0.02
        if theirs.shape != ours.shape or (theirs - ours).abs().max() > tolerance * scale:
            again = model(input_ids=ids_BT, use_cache=False).logits.float()
            if (again - theirs).abs().max() > tolerance * scale:
                raise InputError(
                    f"the {role} ({type(model).__name__}) computes other logits each time, with "
                    "random numbers that are no dropout known by its name; use another model."
                )
            raise InputError(f"{problem}; {remedy}.")


def require_plain_head(model: PreTrainedModel, role: str) -> None:
    """Raise InputError unless the output layer is a matrix and perhaps a bias, which is all of it
    that the loss reads.
    """
    head = model.get_output_embeddings()
    if head is None or type(head).forward is not nn.Linear.forward:
        problem, remedy = _head_problem(model, role)
        raise InputError(f"{problem}; {remedy}.")


def _head_problem(model: PreTrainedModel, role: str) -> tuple[str, str]:
    return (
        f"the {role} ({type(model).__name__}) computes its logits in a way gkd_ds does not know, "
        "so its divergence would be wrong",
        "use a model whose logits are its output layer, scaled or soft-capped",
    )


@torch.no_grad()
def check_packing(model: PreTrainedModel, device: torch.device) -> None:
    """Raise InputError where a sequence behind another one, without padding, is not as if alone.

    An architecture may take positions from elsewhere, or carry a state from token to token.
    Collective as check_head.
    """
    tokens = [t % model.config.get_text_config().vocab_size for t in range(1, 10)]
    rollouts = [
        Rollout(0, Source.DATA, tokens[:3], tokens[3:5], True),
        Rollout(1, Source.DATA, tokens[4:6], tokens[6:9], True),
    ]
    packed_ND = completion_hidden(model, packed_batch(rollouts, 0, device))
    alone = [completion_hidden(model, packed_batch([one], 0, device)) for one in rollouts]
    alone_ND = torch.cat(alone)
    if (packed_ND - alone_ND).abs().max() > 0.02 * alone_ND.abs().max().clamp(min=1.0):
        raise InputError(
            f"padding_free is not possible for {type(model).__name__}, whose sequences do not stay "
            "apart in one line; set padding_free and packing to false."
        )

"""What gkd_ds assumes about a transformers causal language model: a body, an output layer, a list
of decoder layers.

Assumptions are checked once at start-up (`check_head`), so that an architecture that breaks one is
refused with a sentence instead of being trained on wrong logits.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from gkd_ds.records import Rollout, SequenceBatch, Source, packed_batch
from gkd_ds.runtime.errors import InputError

# (ids [B, t], mask [B, L + t] or None, positions [B, t], cache) -> logits of the last position [B,
# V]
Forward = Callable[[Tensor, "Tensor | None", Tensor, DynamicCache], Tensor]


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


def body_forward(model: PreTrainedModel, input_ids_BT: Tensor | None = None, **kwargs) -> Tensor:
    """Last hidden states `[B, T, D]` (after the final norm) of right-padded sequences."""
    return model.base_model(input_ids=input_ids_BT, use_cache=False, **kwargs).last_hidden_state


def batch_forward(model: PreTrainedModel, batch: SequenceBatch) -> Tensor:
    """`body_forward` of a batch, padded or packed."""
    if batch.positions_BT is None:
        return body_forward(model, batch.input_ids_BT)
    return body_forward(model, batch.input_ids_BT, position_ids=batch.positions_BT)


def decoding_forward(model: PreTrainedModel, vocabulary: int) -> Forward:
    """The decode loop's view of `model`: logits of the last position, over the shared vocabulary,
    `[B, V]`.
    """
    body, head, transform = (
        model.base_model,
        model.get_output_embeddings(),
        LogitTransform.of(model.config),
    )
    # transformers 5.24 renamed the argument; models from the hub that bring their own code may have
    # the old name.
    cache_name = (
        "cache" if "cache" in inspect.signature(body.forward).parameters else "past_key_values"
    )

    def forward(
        ids_Bt: Tensor, mask_BL: Tensor | None, positions_Bt: Tensor, cache: DynamicCache
    ) -> Tensor:
        hidden_BtD = body(
            input_ids=ids_Bt,
            attention_mask=mask_BL,
            position_ids=positions_Bt,
            use_cache=True,
            **{cache_name: cache},
        ).last_hidden_state
        return transform.apply_(head(hidden_BtD[:, -1]))[:, :vocabulary]

    return forward


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """The list of decoder layers inside the body.

    Raises InputError where there is not exactly one.
    """
    depth = model.config.get_text_config().num_hidden_layers
    lists = [
        m for m in model.base_model.modules() if isinstance(m, nn.ModuleList) and len(m) == depth
    ]
    if not lists:
        raise InputError(
            f"{type(model).__name__} has no list of its {depth} decoder layers, which gkd_ds needs "
            "to stream a teacher "
            "layer by layer; choose a decoder-only architecture."
        )
    return lists[0]


def kv_elements_per_token(model: PreTrainedModel) -> int:
    """Numbers in the keys and values of one token of one sequence, in all layers."""
    text = model.config.get_text_config()
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return 2 * text.num_hidden_layers * heads * head_dim


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


@torch.no_grad()
def check_head(model: PreTrainedModel, role: str, device: torch.device) -> None:
    """Raise InputError unless transform(output layer(body(ids))) are the model's own logits.

    Some architectures do more to their logits than a scale and a soft cap, or feed the output layer
    something other than the body's last hidden state. Collective where parameters are partitioned:
    call inside the engine's root.
    """
    ids_BT = torch.arange(1, 9, device=device).remainder(model.config.get_text_config().vocab_size)[
        None
    ]
    theirs = model(input_ids=ids_BT, use_cache=False).logits.float()
    head, transform = model.get_output_embeddings(), LogitTransform.of(model.config)
    ours = transform.apply_(head(body_forward(model, ids_BT))).float()
    scale = theirs.abs().max().clamp(min=1.0)
    if theirs.shape != ours.shape or (theirs - ours).abs().max() > 0.02 * scale:
        raise InputError(
            f"the {role} ({type(model).__name__}) computes its logits in a way gkd_ds does not "
            "know, so its divergence "
            "would be wrong; use a model whose logits are its output layer, scaled or soft-capped."
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
    packed_SD = batch_forward(model, packed_batch(rollouts, 0, device))[0]
    alone = [batch_forward(model, packed_batch([one], 0, device))[0] for one in rollouts]
    alone_SD = torch.cat(alone)
    if (packed_SD - alone_SD).abs().max() > 0.02 * alone_SD.abs().max().clamp(min=1.0):
        raise InputError(
            f"padding_free is not possible for {type(model).__name__}, whose sequences do not stay "
            "apart in one line; set padding_free and packing to false."
        )

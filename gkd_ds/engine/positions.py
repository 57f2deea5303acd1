"""The length of rows against the positions that a model has: learned ones are a limit, all others
are what it was trained for.
"""

from __future__ import annotations

import logging

from torch import nn
from transformers import PreTrainedModel

from gkd_ds.config.config import GKDConfig
from gkd_ds.engine import loading, sources
from gkd_ds.runtime import ranks
from gkd_ds.runtime.errors import InputError

logger = logging.getLogger(__name__)

# Rows that a table of positions may have beside one for each: OPT and BART skip the first two.
SPARE_ROWS = 2


def check_positions(
    model: loading.Model, role: str, config: GKDConfig, init_kwargs: dict | None, longest: int
) -> None:
    """Raise InputError where rows of `longest` tokens do not fit a table of learned positions;
    warn where they are longer than what the model is made for. No weights are loaded.

    What limits rows in another way (a table of rotations, say) shows when the longest row is tried
    (startup_checks.py).
    """
    text = sources.model_config(model, config, init_kwargs).get_text_config()
    positions = getattr(text, "max_position_embeddings", None)
    if positions is None or longest <= positions:
        return
    if _are_learned(loading.shapes(model, config, init_kwargs), positions):
        raise InputError(
            f"max_length allows rows of {longest} tokens, but the {role} has {positions} learned "
            f"positions; set max_length to {positions} or less."
        )
    if ranks.rank() == 0:
        logger.warning(
            "rows can have %d tokens, but the %s is made for %d: expect little of what comes after "
            "them, or set max_length to that.",
            longest,
            role,
            positions,
        )


def _are_learned(model: PreTrainedModel, positions: int) -> bool:
    """Whether the model looks its positions up in a table, as it does its tokens."""
    tokens = model.get_input_embeddings()
    return any(
        isinstance(module, nn.Embedding)
        and module is not tokens
        and 0 <= module.num_embeddings - positions <= SPARE_ROWS
        for module in model.modules()
    )

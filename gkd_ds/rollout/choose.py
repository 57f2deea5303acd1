"""The one place that knows all rollout engines."""

from __future__ import annotations

import logging

from transformers import PreTrainedModel

from gkd_ds.config.config import GKDConfig
from gkd_ds.rollout import hybrid
from gkd_ds.rollout.engine import RolloutEngine
from gkd_ds.rollout.gathered import Gathered
from gkd_ds.rollout.hybrid import Hybrid
from gkd_ds.rollout.sharded import Sharded
from gkd_ds.runtime import ranks
from gkd_ds.runtime.errors import InputError

logger = logging.getLogger(__name__)


def rollout_engine_class(config: GKDConfig, model: PreTrainedModel) -> type[RolloutEngine]:
    """The engine that `rollout_engine` asks for. Raises InputError where it is not possible.

    `auto` gathers: no architecture has yet been seen to write the plain model's tokens with
    DeepSpeed's kernels injected.
    """
    wanted, reason = config.rollout_engine, hybrid.obstacle(model)
    if wanted == "hybrid" and reason:
        raise InputError(
            f"rollout_engine 'hybrid' is not possible here: {reason}; use 'gather' or 'auto'."
        )
    if wanted == "auto" and ranks.rank() == 0:
        name = type(model).__name__
        reason = reason or f"DeepSpeed has no kernels for {name}, or they are not verified"
        logger.warning(
            "rollout_engine auto: the student is gathered once per window, because %s.", reason
        )
    return {"auto": Gathered, "gather": Gathered, "sharded": Sharded, "hybrid": Hybrid}[wanted]

"""The teacher's weights, loaded to where its DeepSpeed file wants them."""

from __future__ import annotations

import copy
from typing import Any

from transformers import PreTrainedModel

from gkd_ds.config.config import GKDConfig
from gkd_ds.engine import accelerator, loading, sources
from gkd_ds.teacher import nvme


def load(model: sources.Model, config: GKDConfig) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The teacher's model and the DeepSpeed configuration for its engine. Collective.

    The read buffers of a teacher on NVMe are made while it is loaded, so they are fitted before.
    """
    ds_config = loading.teacher_ds_config(model, config)
    while_loading = copy.deepcopy(ds_config)
    if nvme.is_used(ds_config):
        element_size = accelerator.precision(config).itemsize
        shapes = loading.shapes(model, config, config.teacher_model_init_kwargs)
        nvme.fit_buffers(while_loading, shapes, element_size)
    loaded = loading.load_teacher(model, config, while_loading)
    # The init kwargs may have asked for another dtype than the run's.
    nvme.fit_buffers(ds_config, loaded, loaded.get_output_embeddings().weight.dtype.itemsize)
    return loaded, ds_config

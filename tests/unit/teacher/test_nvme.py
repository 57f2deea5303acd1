"""The read buffers of a teacher on NVMe: resolved from its shapes, or refused where they are too
small.
"""

import pytest
import torch

from gkd_ds.runtime.errors import InputError
from gkd_ds.teacher.nvme import fit_buffers
from tests.tiny import make_model


def offload(**numbers) -> dict:
    block = {"device": "nvme", "nvme_path": "anywhere", **numbers}
    return {"zero_optimization": {"stage": 3, "offload_param": block}}


@pytest.fixture(scope="module")
def teacher():
    """All seven matrices of a layer have 2 MiB or more in fp32; the norms have less."""
    with torch.device("meta"):
        return make_model("llama", hidden=1024, tie_word_embeddings=False)


@pytest.mark.parametrize("given", [{}, {"buffer_count": "auto", "buffer_size": "auto"}])
def test_auto_takes_two_layers(teacher, given):
    config = offload(**given)
    fit_buffers(config, teacher, 4)
    block = config["zero_optimization"]["offload_param"]
    assert block["buffer_count"] == 2 * 7
    assert block["buffer_size"] == max(p.numel() for p in teacher.parameters())


@pytest.mark.parametrize("name, value", [("buffer_count", 4), ("buffer_size", 1000)])
def test_too_small_numbers_are_refused(teacher, name, value):
    with pytest.raises(
        InputError, match=f"offload_param.{name} to {value}, but this teacher needs"
    ):
        fit_buffers(offload(**{name: value}), teacher, 4)


def test_larger_numbers_and_other_devices_are_left_alone(teacher):
    for config in (
        offload(buffer_count=99, buffer_size=10**9),
        {"zero_optimization": {"stage": 3}},
    ):
        before = repr(config)
        fit_buffers(config, teacher, 4)
        assert repr(config) == before

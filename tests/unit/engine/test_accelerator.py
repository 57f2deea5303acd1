"""What is asked of the accelerator; its kernels are tested where they are used."""

import pytest
from deepspeed.accelerator import get_accelerator

from gkd_ds.config.config import GKDConfig
from gkd_ds.engine import accelerator, process
from gkd_ds.runtime.errors import InputError
from tests.refusals import assert_one_sentence


@pytest.mark.parametrize(
    ("fields", "name"),
    [({}, "float32"), ({"bf16": True}, "bfloat16"), ({"fp16": True}, "float16")],
)
def test_precision_on_the_cpu_is_fp32_unless_it_is_set(fields, name):
    assert accelerator.precision_name(GKDConfig(**fields)) == name


@pytest.mark.parametrize("name", ["zero_quantized_weights", "zero_quantized_gradients"])
def test_zeropp_s_quantization_is_refused_on_the_cpu(name):
    with pytest.raises(InputError, match=f"{name} needs kernels that DeepSpeed has for GPUs only"):
        accelerator.refuse_missing_kernels({"zero_optimization": {"stage": 3, name: True}})


def test_a_precision_that_this_machine_does_not_have_is_refused_before_anything_starts(monkeypatch):
    kind = type(get_accelerator())
    accelerator.refuse_missing_precision(GKDConfig(bf16=True))
    monkeypatch.setattr(kind, "is_fp16_supported", lambda self: False)
    with pytest.raises(InputError) as caught:
        process.start(GKDConfig(fp16=True))
    assert_one_sentence(str(caught.value), "'fp16'", "cpu has no fp16", "use bf16")
    monkeypatch.setattr(kind, "is_bf16_supported", lambda self: False)
    with pytest.raises(InputError) as caught:
        process.start(GKDConfig(bf16=True))
    assert_one_sentence(str(caught.value), "'bf16'", "cpu has no bf16", "switch it off")


@pytest.mark.parametrize(("every", "calls"), [(1, 6), (2, 3), (4, 1), (None, 0)])
def test_the_cache_is_emptied_every_so_many_updates(every, calls, monkeypatch):
    emptied = []
    monkeypatch.setattr(get_accelerator(), "empty_cache", lambda: emptied.append(1))
    for step in range(1, 7):
        accelerator.empty_cache_every(every, step)
    assert len(emptied) == calls

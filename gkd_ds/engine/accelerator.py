"""The accelerator: the only file that asks which one this is, and what is special to one kind.

Beside the answers, everything here is an optimisation that leaves results alone: remove it and the
same numbers come out slower.
"""

from __future__ import annotations

import ctypes
import os
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from deepspeed.accelerator import get_accelerator
from torch import Tensor, nn

from gkd_ds.config.config import GKDConfig
from gkd_ds.config.deepspeed import Precision
from gkd_ds.runtime.errors import InputError

# The elementwise part of the loss makes about ten passes over a tile: 2^20 fp32 entries (4 MiB)
# stay in a CPU's last-level cache.
_CPU_TILE_ENTRIES = 1 << 20

# Rows of an output matrix to multiply by at a time, so that they stay in a core's second-level
# cache.
_CPU_HEAD_ROWS = 1024
# Entries left free between rows of logits: a power of two apart, they would fall into the same
# places of the caches.
CPU_ROW_GAP = 64

# Matrices of this many weights or more are packed for oneDNN while decoding.
_ONEDNN_WEIGHTS = 1 << 20

# Names of mallopt(3), from glibc's malloc.h.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3


def on_cpu() -> bool:
    return get_accelerator().device_name() == "cpu"


def device() -> torch.device:
    return torch.device(get_accelerator().current_device_name())


def precision(config: GKDConfig) -> torch.dtype:
    """bf16 and fp16 as configured; by default bf16 on an asynchronous accelerator (a GPU) that has
    it, else fp32.
    """
    if config.fp16:
        return torch.float16
    default = (
        not get_accelerator().is_synchronized_device() and get_accelerator().is_bf16_supported()
    )
    return torch.bfloat16 if (default if config.bf16 is None else config.bf16) else torch.float32


def precision_name(config: GKDConfig) -> Precision:
    """`precision` as text: float32, bfloat16 or float16."""
    return str(precision(config)).removeprefix("torch.")


def refuse_missing_precision(config: GKDConfig) -> None:
    """Raise InputError where `config` asks for a precision that this accelerator does not have."""
    here = get_accelerator()
    supported = {"fp16": here.is_fp16_supported, "bf16": here.is_bf16_supported}
    for name, is_supported in supported.items():
        if getattr(config, name) and not is_supported():
            raise InputError(
                f"GKDConfig field '{name}' is set, and this machine's {here.device_name()} has no "
                f"{name}; switch it off"
                + (", or use bf16." if name == "fp16" and here.is_bf16_supported() else ".")
            )


def empty_cache_every(steps: int | None, step: int) -> None:
    """Give unused memory back after every so many updates; never for None."""
    if steps and step % steps == 0:
        get_accelerator().empty_cache()


def refuse_missing_kernels(ds_config: dict[str, Any]) -> None:
    """Raise InputError where `ds_config` asks for kernels that this accelerator does not have."""
    for name in (
        "zero_quantized_weights",
        "zero_quantized_gradients",
        "zero_quantized_nontrainable_weights",
    ):
        if ds_config["zero_optimization"].get(name) and on_cpu():
            raise InputError(
                f"{name} needs kernels that DeepSpeed has for GPUs only; remove it to run on the "
                "CPU."
            )


def elementwise_tile_rows(logits_nV: Tensor) -> int:
    """Rows of a logits chunk to treat at a time: a cache-sized tile on a CPU, the whole chunk
    elsewhere.
    """
    rows, vocabulary = logits_nV.shape
    if logits_nV.device.type != "cpu":
        return max(rows, 1)
    return max(4, _CPU_TILE_ENTRIES // vocabulary)


def logits(hidden_nD: Tensor, weight_VD: Tensor, bias_V: Tensor | None) -> Tensor:
    """`hidden_nD @ weight_VD.T + bias_V`, without gradients: `[n, V]`, on the CPU with gaps between
    its rows.

    There it is made in blocks of the vocabulary, since MKL is up to a quarter slower at the whole
    of a tall matrix.
    """
    if hidden_nD.device.type != "cpu" or hidden_nD.dtype != torch.float32:
        return F.linear(hidden_nD, weight_VD, bias_V)
    rows, vocabulary = hidden_nD.shape[0], weight_VD.shape[0]
    logits_nV = hidden_nD.new_empty(rows, vocabulary + CPU_ROW_GAP)[:, :vocabulary]
    for block_nv, weight_vD in zip(
        logits_nV.split(_CPU_HEAD_ROWS, 1), weight_VD.split(_CPU_HEAD_ROWS), strict=True
    ):
        torch.mm(hidden_nD, weight_vD.t(), out=block_nv)
    return logits_nV if bias_V is None else logits_nV.add_(bias_V)


@contextmanager
def loading() -> Iterator[None]:
    """Around the loading of weights: on the CPU, memory goes back as it is freed, and gloo's
    threads stay single.
    """
    if not on_cpu():
        yield
        return
    with _freed_at_once(), _single_threaded_collectives():
        yield


@contextmanager
def _single_threaded_collectives() -> Iterator[None]:
    """Keep the threads in which gloo runs collectives from having OpenMP workers of their own.

    A thread asks torch for its number of workers at its first copy, which for gloo's is while
    weights are loaded. Had they any, OpenMP would count more threads than cores and let all workers
    sleep after every operation: a decode step of small matrices then takes 15 % longer.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextmanager
def _freed_at_once() -> Iterator[None]:
    """Give large blocks of host memory back as soon as they are freed.

    On the CPU a parameter is whole in host memory before its shard is kept. glibc keeps the room of
    blocks of up to 32 MiB in its heap, in holes between the shards, until a rank has taken nearly
    the size of the whole model. Afterwards it is the other way round: every update takes what the
    last one has freed, and room that went back would cost a page fault per 4 KiB, up to 5 % of an
    update. A user's own settings stay.
    """
    own = {"GLIBC_TUNABLES", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"} & os.environ.keys()
    if platform.libc_ver()[0] != "glibc" or own:
        yield
        return
    mallopt = ctypes.CDLL(None).mallopt
    mallopt(_MMAP_THRESHOLD, 1 << 20)
    try:
        yield
    finally:
        mallopt(_MMAP_THRESHOLD, 32 << 20)  # the most that glibc takes
        mallopt(_TRIM_THRESHOLD, 1 << 30)


@contextmanager
def fast_decoding(model: nn.Module, linear: tuple[type, ...] = (nn.Linear,)) -> Iterator[None]:
    """Make `model` quick for products of few rows while its weights stay whole and unchanged.

    `linear` are the types of layers whose forward is exactly x @ weight.T + bias; subclasses may do
    more and are left alone.

    torch's inference mode saves bookkeeping in every operation: of a decode step's many small ones,
    7 % of the time on the CPU. There, every linear layer's weight is laid out anew, too, since MKL
    is slow at few rows times a row-major matrix. Elsewhere nothing more is done yet: a CUDA graph
    or `torch.compile` of the decode step would start here.
    """
    relaid = [
        module
        for module in model.modules()
        if on_cpu() and type(module) in linear and module.weight.dtype == torch.float32
    ]
    try:
        with torch.inference_mode():
            for module in relaid:
                # An instance attribute shadows the class's forward; deleting it restores the
                # module.
                module.forward = _relaid_forward(module.weight.detach(), module.bias)
            yield
    finally:
        for module in relaid:
            module.__dict__.pop("forward", None)
        _make_trainable(model)


def _make_trainable(model: nn.Module) -> None:
    """Replace what `model` made for itself in inference mode (grown rotary tables): autograd
    refuses such tensors.
    """
    for module in model.modules():
        for tensors in (module._buffers, vars(module)):
            for name, tensor in tensors.items():
                if isinstance(tensor, Tensor) and tensor.is_inference():
                    tensors[name] = tensor.clone()


def _relaid_forward(weight_OI: Tensor, bias_O: Tensor | None) -> Callable[[Tensor], Tensor]:
    """`F.linear` by a copy of the weight: column by column, or, where that takes long to make,
    packed for oneDNN.

    oneDNN needs 20 us more per call than a small product takes.
    """
    if weight_OI.numel() < _ONEDNN_WEIGHTS:
        return partial(F.linear, weight=weight_OI.t().contiguous().t(), bias=bias_O)
    packed = torch.ops.mkldnn._reorder_linear_weight(weight_OI, 32)
    return lambda hidden: torch.ops.mkldnn._linear_pointwise(hidden, packed, bias_O, "none", [], "")

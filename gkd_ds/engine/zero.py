"""Models under ZeRO: loading them partitioned, DeepSpeed's engines, gathering, ZeRO-3's hooks.

Whatever touches ZeRO-3's parameters and hooks is here, except what only one file needs, which
stands in that file (reading ahead from NVMe in teacher/nvme.py, the hybrid engine in
rollout/hybrid.py, DeepSpeed's checkpoint files in checkpoint/engine_files.py and resharding.py).
All of it relies on internals that were read in, and are tested against, deepspeed 0.19.8.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.zero.offload_config import OffloadDeviceEnum
from deepspeed.runtime.zero.parameter_offload import DeepSpeedZeRoOffload
from deepspeed.runtime.zero.partition_parameters import PartitionedParamStatus, ZeroParamStatus
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.integrations.deepspeed import set_hf_deepspeed_config, unset_hf_deepspeed_config

from gkd_ds.engine import accelerator
from gkd_ds.engine.counters import Counters
from gkd_ds.runtime import ranks
from gkd_ds.runtime.errors import InputError, reason
from gkd_ds.runtime.files import claim_folder


def claim_swap_folders(ds_config: dict[str, Any]) -> None:
    """Make and lock folders for what `ds_config` swaps to NVMe, and write their names into it: once
    per engine, before its model is loaded.

    DeepSpeed gives the files of every run the same names, so runs must not share a folder.
    """
    for name in ("offload_param", "offload_optimizer"):
        block = ds_config["zero_optimization"].get(name) or {}
        if block.get("device") == "nvme":
            block["nvme_path"] = claim_folder(block["nvme_path"], ranks.rank())


# What transformers raises of weights that engine/sources.py has found to be loadable: they are
# GGUF, or the architecture, or the way in which its files become its weights, looks into weights
# that are partitioned.
_NOT_BY_THIS_WAY = (AttributeError, ImportError, LookupError, TypeError, ValueError, RuntimeError)


class _Zero3Loading:
    """What transformers asks of its HfDeepSpeedConfig, which itself needs accelerate."""

    def __init__(self, config: dict[str, Any]):
        self.config = config

    def is_zero3(self) -> bool:
        return self.config["zero_optimization"].get("stage") == 3


def load(
    source: str, ds_config: dict[str, Any], **init_kwargs: Any
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """`from_pretrained` under `ds_config`, with its report of missing, other and unused weights: at
    ZeRO-3 every parameter is partitioned as soon as it exists.

    Rank 0 maps the checkpoint's files and hands the ranks one module after the other; nobody holds
    the whole model.
    """
    loading = _Zero3Loading(ds_config)
    set_hf_deepspeed_config(loading)
    try:
        with accelerator.loading():
            return AutoModelForCausalLM.from_pretrained(
                source, output_loading_info=True, **init_kwargs
            )
    except (OSError, SafetensorError) as error:
        raise InputError(
            f"the weights of {source!r} cannot be read ({reason(error)}); get them again."
        ) from error
    except (torch.OutOfMemoryError, torch.distributed.DistError):
        raise  # no fault of the files
    except _NOT_BY_THIS_WAY as error:
        way = "under ZeRO stage 3" if loading.is_zero3() else "as they are"
        raise InputError(
            f"the weights of {source!r} cannot be loaded {way} ({reason(error)}); choose another "
            "model, or for a student another stage."
        ) from error
    finally:
        # While it is alive the next from_pretrained would be partitioned, too.
        unset_hf_deepspeed_config()
        del loading
        gc.collect()


@contextmanager
def partitioning_known(model: nn.Module) -> Iterator[None]:
    """While open, libraries that ask transformers hear that parameters are partitioned, if those of
    `model` are: peft then gathers what it reads. Not for loading models.
    """
    if not any(is_partitioned(p) for p in model.parameters()):
        yield
        return
    loading = _Zero3Loading({"zero_optimization": {"stage": 3}})
    set_hf_deepspeed_config(loading)
    try:
        yield
    finally:
        unset_hf_deepspeed_config()


def keep_together(model: nn.Module, kinds: set[type[nn.Module]]) -> None:
    """Let ZeRO-3 fetch and release modules of these kinds as one. Before the engine is built."""
    if kinds:
        deepspeed.utils.set_z3_leaf_modules(model, list(kinds))


class EngineRoot(nn.Module):
    """The module that DeepSpeed wraps. Its forward runs whatever it is given, inside ZeRO-3's
    hooks.

    ZeRO-3 counts one pass over the parameters per call of the root module (that is when its
    prefetch trace starts anew), so everything that touches partitioned parameters goes through
    here.
    """

    def __init__(self, **modules: nn.Module):
        super().__init__()
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, *, run: Callable[[], Any]) -> Any:
        return run()

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """What DeepSpeed saves: all but frozen parameters, under whichever of their names. They are
        where they were loaded from. (DeepSpeed's `exclude_frozen_parameters` keeps one that is
        tied, by its second name.)
        """
        state = super().state_dict(*args, **kwargs)
        for name, parameter in self.named_parameters(remove_duplicate=False):
            if not parameter.requires_grad:
                state.pop(name, None)
        return state


def initialize(model: nn.Module, ds_config: dict[str, Any], **kwargs: Any):
    """`deepspeed.initialize` without its prints; returns the engine."""
    engine, *_ = deepspeed.initialize(
        model=model, config=ds_config, dist_init_required=False, **kwargs
    )
    if stage(engine) == 0 and engine.optimizer is not engine.basic_optimizer:
        # Making its 16-bit optimizer, DeepSpeed has stepped the inner one once, with gradients of
        # zero: Adam would take the first update for its second, and make it a quarter too small.
        engine.basic_optimizer.state.clear()
    return engine


def stage(engine) -> int:
    return engine.zero_optimization_stage()


@contextmanager
def gathered_parameters(engine, counters: Counters) -> Iterator[None]:
    """All parameters of a ZeRO-3 engine whole on every rank, with one gather; ZeRO's hooks are off
    meanwhile.

    The hooks would re-partition a gathered layer after its first use. They come back whatever
    happens inside. Collective: every rank enters and leaves. Below stage 3 the parameters are whole
    anyway.
    """
    if stage(engine) < 3:
        with _plain_linear():
            yield
        return
    offload, parameters = _parameter_offload(engine), list(engine.module.parameters())
    with deepspeed.zero.GatheredParameters(parameters), _plain_linear():
        counters.student_gathers += 1
        counters.student_bytes += sum(full_numel(p) * p.element_size() for p in parameters)
        for hook in offload.forward_hooks + offload.backward_hooks:
            hook.remove()
        offload.forward_hooks, offload.backward_hooks = [], []
        try:
            yield
        finally:
            offload._register_deepspeed_module(offload.module)


@contextmanager
def optimizer_states_on_host(engine, counters: Counters) -> Iterator[None]:
    """The optimizer's states in page-locked host memory, so that a rollout has their room. Not
    collective.

    DeepSpeed's own `engine.offload_states` knows its FusedAdam at stage 3 alone; this moves any
    torch optimizer's. NOT TESTED on a GPU. On the CPU it copies to and fro for nothing.
    """
    optimizer = engine.optimizer
    if not isinstance(optimizer, torch.optim.Optimizer):
        optimizer = optimizer.optimizer  # inside ZeRO's
    places = [
        (state, name)
        for state in optimizer.state.values()
        for name in state
        if _is_on(state[name], accelerator.device())
    ]
    for state, name in places:
        counters.optimizer_bytes += state[name].nbytes
        host = get_accelerator().pin_memory(torch.empty_like(state[name], device="cpu"))
        state[name] = host.copy_(state[name])
    try:
        yield
    finally:
        for state, name in places:
            state[name] = torch.empty_like(state[name], device=accelerator.device()).copy_(
                state[name]
            )


def _is_on(value: Any, place: torch.device) -> bool:
    return isinstance(value, Tensor) and value.device.type == place.type


@contextmanager
def _plain_linear() -> Iterator[None]:
    """torch's own F.linear. DeepSpeed leaves an autograd function written in Python in its place
    for the whole process once there is a ZeRO-3 engine; for the few rows of a decode step that
    costs as much as the product itself.
    """
    theirs = torch.nn.functional.linear
    torch.nn.functional.linear = torch._C._nn.linear
    try:
        yield
    finally:
        torch.nn.functional.linear = theirs


def run_pass(engine, run: Callable[[], Any]) -> Any:
    """One pass over a ZeRO-3 engine's parameters outside of training; returns what `run` returns.
    Collective.

    ZeRO-3 prefetches in the order of the pass that it has recorded. A pass that ends earlier
    (scoring does without the head, which generating needs) leaves prefetched parameters in flight,
    and nobody else could gather or partition them: they are released here.
    """
    try:
        return engine.module(run=run)
    finally:
        release_prefetched(engine)


def release_prefetched(engine) -> None:
    """Release what was prefetched beyond the end of a pass. Does nothing below stage 3."""
    if stage(engine) == 3:
        _parameter_offload(engine).get_param_coordinator()._clean_inflight_param_registry()


def forget_order(engine) -> None:
    """Partition everything, and let ZeRO-3 record the order of its modules anew in the next pass.
    Does nothing below stage 3.

    For an unusual first pass, such as a start-up check that runs the model twice, and for one that
    an exception has ended. ZeRO-3 would go
    on prefetching what it used and, worse, keep all that it used twice for reuse: which parameters
    a module releases at a step is cached for good (an lru_cache in DeepSpeed 0.19.8), so this must
    come before a second pass.
    """
    if stage(engine) < 3:
        return
    offload = _parameter_offload(engine)
    coordinator = offload.get_param_coordinator()
    if not coordinator.is_invalid_trace():
        coordinator._invalidate_trace()
    offload.partition_all_parameters()


def _parameter_offload(engine):
    """The object that owns ZeRO-3's hooks: for an engine without optimizer it stands in the
    optimizer's place.
    """
    optimizer = engine.optimizer
    return optimizer if isinstance(optimizer, DeepSpeedZeRoOffload) else optimizer.parameter_offload


@contextmanager
def gathered(parameters: list[nn.Parameter]) -> Iterator[None]:
    """These parameters whole on every rank; a collective. Does nothing for parameters that are not
    partitioned.
    """
    partitioned = [p for p in parameters if is_partitioned(p)]
    if not partitioned:
        yield
        return
    # On one rank GatheredParameters would still copy a single parameter through the collective;
    # this does not.
    partitioned[0].all_gather_coalesced(partitioned).wait()
    with deepspeed.zero.GatheredParameters(partitioned):
        yield


def keep_whole(parameters: list[nn.Parameter]) -> None:
    """Gather these parameters for good; a collective. For small ones that no engine manages."""
    partitioned = [p for p in parameters if is_partitioned(p)]
    if partitioned:
        partitioned[0].all_gather(param_list=partitioned)


def is_partitioned(parameter: nn.Parameter) -> bool:
    return "ds_status" in parameter.__dict__ and parameter.ds_status != ZeroParamStatus.AVAILABLE


def is_on_nvme(parameter: nn.Parameter) -> bool:
    """Whether this rank's shard of the parameter lives in a swap file."""
    return (
        "ds_tensor" in parameter.__dict__
        and parameter.ds_tensor.final_location == OffloadDeviceEnum.nvme
    )


def is_only_on_nvme(parameter: nn.Parameter) -> bool:
    """Whether this rank's shard of the parameter is in its swap file alone, neither read nor being
    read.
    """
    return (
        is_on_nvme(parameter) and parameter.ds_tensor.status == PartitionedParamStatus.NOT_AVAILABLE
    )


@contextmanager
def own_part(parameter: Tensor) -> Iterator[tuple[Tensor, int]]:
    """This rank's part of a partitioned parameter, flat, and the number of its first element in the
    whole; all of a parameter or buffer that is not partitioned. Collective for one on NVMe.
    """
    if not is_partitioned(parameter):
        yield parameter, 0
        return
    size = parameter.ds_tensor.ds_numel
    begin = min(deepspeed.comm.get_rank() * size, parameter.ds_numel)
    end = min(begin + size, parameter.ds_numel)  # the last part is padded
    if is_only_on_nvme(parameter):
        with gathered([parameter]):
            yield parameter.flatten()[begin:end], begin
    else:
        yield parameter.ds_tensor[: end - begin], begin


def full_numel(parameter: nn.Parameter) -> int:
    """Elements of the whole parameter, partitioned or not."""
    return parameter.ds_numel if "ds_numel" in parameter.__dict__ else parameter.numel()


def numel_beside_embeddings(model: nn.Module) -> int:
    """Elements of all parameters but those of embeddings."""
    embeddings = {
        id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)
    }
    return sum(full_numel(p) for p in model.parameters() if id(p) not in embeddings)


def full_shape(parameter: nn.Parameter) -> torch.Size:
    return torch.Size(parameter.ds_shape) if "ds_shape" in parameter.__dict__ else parameter.shape


def state_names(model: nn.Module) -> set[str]:
    """The names in the model's state_dict, also while its parameters are partitioned."""
    names = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    for prefix, module in model.named_modules(remove_duplicate=False):
        persistent = module._buffers.keys() - module._non_persistent_buffers_set
        names |= {
            f"{prefix}.{name}".lstrip(".")
            for name in persistent
            if module._buffers[name] is not None
        }
    return names


def full_state_dict(
    model: nn.Module, wanted: Callable[[nn.Parameter], bool] = lambda parameter: True
) -> dict[str, Tensor] | None:
    """The whole weights that are `wanted` on the CPU of rank 0 (None on the others), under the
    names `model` gives them.

    Collective, one parameter at a time, so that no device holds more than one whole parameter
    beyond its shard.
    """
    keep = deepspeed.comm.get_rank() == 0
    state: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if not wanted(parameter):
            continue
        with gathered([parameter]):
            if keep:
                state[name] = parameter.detach().to("cpu", copy=True)
    persistent = state_names(model)
    for name, buffer in model.named_buffers():
        if keep and name in persistent:
            state[name] = buffer.detach().to("cpu", copy=True)
    return state if keep else None

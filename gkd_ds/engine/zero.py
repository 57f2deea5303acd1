"""The only file that touches DeepSpeed's internals: its configuration, loading under ZeRO-3,
gathering, hooks.

Everything it relies on was read in, and is tested against, deepspeed 0.19.8.
"""

from __future__ import annotations

import atexit
import copy
import datetime
import gc
import json
import logging
import os
import socket
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import deepspeed
import torch
import transformers
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.zero.offload_config import OffloadDeviceEnum
from deepspeed.runtime.zero.parameter_offload import DeepSpeedZeRoOffload
from deepspeed.runtime.zero.partition_parameters import PartitionedParamStatus, ZeroParamStatus
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.integrations.deepspeed import set_hf_deepspeed_config, unset_hf_deepspeed_config

from gkd_ds.config import paths
from gkd_ds.config.config import GKDConfig
from gkd_ds.engine import accelerator
from gkd_ds.runtime import ranks
from gkd_ds.runtime.errors import InputError, first_line


@dataclass
class Counters:
    """What a run did, counted rather than timed; reset by nobody, so callers take differences."""

    student_gathers: int = 0  # whole-model gathers of the student
    teacher_passes: int = 0  # passes over the teacher's layers that score a window
    teacher_decode_passes: int = (
        0  # passes for one token more of every completion that the teacher writes
    )
    optimizer_bytes: int = 0  # bytes of optimizer states that went to the host for a rollout
    teacher_bytes: int = (
        0  # bytes of the teacher's weights that were made available on this rank, head included
    )


def start(config: GKDConfig) -> None:
    """Join the process group: the launcher's, or one of a single process when there is no launcher.

    A CPU run must not spend three minutes building DeepSpeed's shared-memory communication op; gloo
    does without.
    """
    logging.getLogger("DeepSpeed").setLevel(config.deepspeed_log_level.upper())
    if config.deepspeed_log_level in ("error", "critical"):
        # DeepSpeed calls collectives by names that torch deprecates, and transformers renames its
        # switch for checkpointing: a line per call. A bar per model that is read or written is
        # chatter, too.
        warnings.filterwarnings(
            "ignore", category=FutureWarning, module=r"torch\.distributed|transformers"
        )
        transformers.utils.logging.disable_progress_bar()
    if config.use_cpu and get_accelerator().device_name() != "cpu":
        raise InputError(
            "use_cpu is set but DeepSpeed has chosen an accelerator; set DS_ACCELERATOR=cpu as "
            "well."
        )
    if config.tf32 is not None:
        torch.set_float32_matmul_precision("high" if config.tf32 else "highest")
    if config.full_determinism:
        torch.use_deterministic_algorithms(True)
    if torch.distributed.is_initialized() and deepspeed.comm.is_initialized():
        return
    if "RANK" not in os.environ:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        alone = {
            "RANK": 0,
            "LOCAL_RANK": 0,
            "WORLD_SIZE": 1,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
        }
        os.environ.update({name: str(value) for name, value in alone.items()})
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    get_accelerator().set_device(int(os.environ["LOCAL_RANK"]))
    deepspeed.init_distributed(
        dist_backend=config.ddp_backend or get_accelerator().communication_backend_name(),
        timeout=datetime.timedelta(seconds=config.ddp_timeout),
        auto_mpi_discovery=False,
        verbose=False,
    )


def leave_at_exit() -> None:
    """Leave the process group when the program ends, after a run that all ranks have finished
    together.

    A thread of gloo's that still holds Python objects is otherwise taken down by the interpreter,
    now and then with SIGABRT ("terminate called without an active exception").
    """
    atexit.unregister(_leave)
    atexit.register(_leave)


def _leave() -> None:
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def print_communication() -> None:
    """What DeepSpeed's communication logger has seen, on rank 0's stdout, where a DeepSpeed file
    switches it on.

    Nobody else calls its summary. Collective.
    """
    if deepspeed.comm.comms_logger.enabled:
        deepspeed.comm.log_summary()


def device() -> torch.device:
    return torch.device(get_accelerator().current_device_name())


def precision(config: GKDConfig) -> torch.dtype:
    """bf16 and fp16 as configured; by default bf16 on an asynchronous accelerator (a GPU) that has
    it, else fp32.
    """
    if config.fp16:
        return torch.float16
    accelerator = get_accelerator()
    default = not accelerator.is_synchronized_device() and accelerator.is_bf16_supported()
    return torch.bfloat16 if (default if config.bf16 is None else config.bf16) else torch.float32


def student_config(config: GKDConfig, world_size: int, hidden_size: int) -> dict[str, Any]:
    """The DeepSpeed configuration of the student: the user's file, with the fields that GKDConfig
    owns filled in.
    """
    resolved = _read(config.deepspeed) or {
        "zero_optimization": {"stage": 3, "reduce_bucket_size": "auto"}
    }
    micro, accumulation = config.per_device_train_batch_size, config.gradient_accumulation_steps
    resolved |= {
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": accumulation,
        "train_batch_size": micro * accumulation * world_size,
        "gradient_clipping": config.max_grad_norm,
    }
    if resolved["zero_optimization"].get("stage", 0) == 0 and precision(config) == torch.float32:
        resolved["gradient_clipping"] = (
            0.0  # Student.update clips, by a norm that is summed in fp64
        )
    if "optimizer" in resolved:
        resolved["optimizer"].setdefault("params", {}).update(
            lr=config.learning_rate,
            betas=[config.adam_beta1, config.adam_beta2],
            eps=config.adam_epsilon,
            weight_decay=config.weight_decay,
        )
    return _finish(resolved, config, hidden_size)


def teacher_config(config: GKDConfig, hidden_size: int) -> dict[str, Any]:
    """The DeepSpeed configuration of the teacher: ZeRO-3 without optimizer, offloaded as the user's
    file says.
    """
    resolved = _read(config.teacher_deepspeed) or {"zero_optimization": {"stage": 3}}
    resolved |= {"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1}
    resolved.pop("train_batch_size", None)
    # It would put an autograd function written in Python in the place of F.linear, for the student,
    # too.
    resolved["zero_optimization"]["memory_efficient_linear"] = False
    return _finish(resolved, config, hidden_size)


def _read(source: str | dict | None) -> dict[str, Any]:
    if source is None:
        return {}
    return (
        copy.deepcopy(source) if isinstance(source, dict) else json.loads(Path(source).read_text())
    )


def _finish(resolved: dict[str, Any], config: GKDConfig, hidden_size: int) -> dict[str, Any]:
    dtype = precision(config)
    resolved["bf16"] = {**_section(resolved, "bf16"), "enabled": dtype == torch.bfloat16}
    resolved["fp16"] = {**_section(resolved, "fp16"), "enabled": dtype == torch.float16}
    resolved["steps_per_print"] = 2**62
    # The optimizer is torch's fused AdamW, on CPU partitions too: it needs no compiler on the
    # nodes.
    resolved["zero_allow_untested_optimizer"] = True
    resolved["zero_force_ds_cpu_optimizer"] = False
    zero = resolved["zero_optimization"]
    for name in (
        "zero_quantized_weights",
        "zero_quantized_gradients",
        "zero_quantized_nontrainable_weights",
    ):
        if zero.get(name) and accelerator.on_cpu():
            raise InputError(
                f"{name} needs kernels that DeepSpeed has for GPUs only; remove it to run on the "
                "CPU."
            )
    for name in ("offload_param", "offload_optimizer"):
        block = zero.get(name) or {}
        if block.get("device") == "nvme":
            block["nvme_path"] = paths.place_of_our_own(block["nvme_path"], ranks.rank())
    # transformers' formulas for these three, so that one file serves both trainers.
    by_width = {
        "reduce_bucket_size": hidden_size * hidden_size,
        "stage3_prefetch_bucket_size": int(0.9 * hidden_size * hidden_size),
        "stage3_param_persistence_threshold": 10 * hidden_size,
    }
    for name, value in by_width.items():
        if zero.get(name) == "auto":
            zero[name] = value
    return _without_auto(resolved)


def _section(resolved: dict, name: str) -> dict:
    return resolved.get(name) or {}


def _without_auto(value: Any) -> Any:
    """What is still "auto" is left to DeepSpeed's default."""
    if isinstance(value, dict):
        return {key: _without_auto(inner) for key, inner in value.items() if inner != "auto"}
    return value


class _Zero3Loading:
    """What transformers asks of its HfDeepSpeedConfig, which itself needs accelerate."""

    def __init__(self, config: dict[str, Any]):
        self.config = config

    def is_zero3(self) -> bool:
        return self.config["zero_optimization"].get("stage") == 3


def load(
    source: str, ds_config: dict[str, Any], dtype: torch.dtype, **init_kwargs: Any
) -> PreTrainedModel:
    """`from_pretrained` under `ds_config`: at ZeRO-3 every parameter is partitioned as soon as it
    exists.

    Rank 0 maps the checkpoint's files and hands the ranks one module after the other; nobody holds
    the whole model.
    """
    loading = _Zero3Loading(ds_config)
    set_hf_deepspeed_config(loading)
    try:
        with accelerator.loading():
            return AutoModelForCausalLM.from_pretrained(source, **{"dtype": dtype, **init_kwargs})
    except (OSError, SafetensorError) as error:
        raise InputError(
            f"the weights of {source!r} cannot be read ({first_line(error)}); get them again."
        ) from error
    finally:
        # While it is alive the next from_pretrained would be partitioned, too.
        unset_hf_deepspeed_config()
        del loading
        gc.collect()


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


def initialize(model: nn.Module, ds_config: dict[str, Any], **kwargs: Any):
    """`deepspeed.initialize` without its prints; returns the engine."""
    engine, *_ = deepspeed.initialize(
        model=model, config=ds_config, dist_init_required=False, **kwargs
    )
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
    offload = _parameter_offload(engine)
    with deepspeed.zero.GatheredParameters(list(engine.module.parameters())), _plain_linear():
        counters.student_gathers += 1
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
        if _is_on(state[name], device())
    ]
    for state, name in places:
        counters.optimizer_bytes += state[name].nbytes
        host = get_accelerator().pin_memory(torch.empty_like(state[name], device="cpu"))
        state[name] = host.copy_(state[name])
    try:
        yield
    finally:
        for state, name in places:
            state[name] = torch.empty_like(state[name], device=device()).copy_(state[name])


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

    For an unusual first pass, such as a start-up check that runs the model twice. ZeRO-3 would go
    on prefetching what it used and, worse, keep all that it used twice for reuse: which parameters
    a module releases at a step is cached for good (an lru_cache in DeepSpeed 0.19.8), so this must
    come before a second pass.
    """
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


def full_numel(parameter: nn.Parameter) -> int:
    """Elements of the whole parameter, partitioned or not."""
    return parameter.ds_numel if "ds_numel" in parameter.__dict__ else parameter.numel()


def full_shape(parameter: nn.Parameter) -> torch.Size:
    return torch.Size(parameter.ds_shape) if "ds_shape" in parameter.__dict__ else parameter.shape


def full_state_dict(engine, model: PreTrainedModel) -> dict[str, Tensor] | None:
    """The student's whole weights on the CPU of rank 0 (None on the others), under the names
    `model` gives them.

    Collective, one parameter at a time, so that no device holds more than one whole parameter
    beyond its shard.
    """
    keep = deepspeed.comm.get_rank() == 0
    state: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        with gathered([parameter]):
            if keep:
                state[name] = parameter.detach().to("cpu", copy=True)
    persistent = set(model.state_dict())
    for name, buffer in model.named_buffers():
        if keep and name in persistent:
            state[name] = buffer.detach().to("cpu", copy=True)
    return state if keep else None

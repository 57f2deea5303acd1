"""A model is lent to an engine, and taken back: the same model, with the weights that it has now.

    make_whole(model)                 # as transformers gives it, whatever it was loaded through
    loan = Loan(model)
    engine = zero.initialize(...)     # hooks, partitions, other layers in the place of the model's
    ...
    loan.end(engine)                  # generate, state_dict, another engine: as before

For one process: on several ranks nobody has room for a whole model. `guard` is for them.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from deepspeed.runtime.zero.parameter_offload import FWD_MODULE_STACK
from torch import Tensor, nn
from transformers import PreTrainedModel

from gkd_ds.engine import zero
from gkd_ds.runtime.errors import InputError


class Loan:
    """Remembers what `model` consists of: its modules' children, hooks and other attributes, and
    which parameters are trained. Values of parameters and buffers are not copied.
    """

    def __init__(self, model: PreTrainedModel):
        self._modules = [(module, _attributes(module)) for module in model.modules()]
        self._parameters = [(p, dict(p.__dict__), p.requires_grad) for p in model.parameters()]

    def end(self, engine) -> None:
        """Destroy `engine` and put the model together again. Whatever was attached to a module
        meanwhile is gone; parameters and buffers keep their values, and parameters have memory of
        their own.
        """
        engine.destroy()
        if engine.module in FWD_MODULE_STACK:  # DeepSpeed's, where it would stay for ever
            FWD_MODULE_STACK.remove(engine.module)
        for parameter, attributes, is_trained in self._parameters:
            whole = _values(parameter).clone(memory_format=torch.contiguous_format)
            parameter.__dict__.clear()
            parameter.__dict__.update(attributes)
            parameter.grad = None
            parameter.data = whole
            parameter.requires_grad_(is_trained)
        for module, attributes in self._modules:
            buffers = module._buffers
            module.__dict__.clear()
            module.__dict__.update(attributes)
            module._buffers = buffers


def make_whole(model: PreTrainedModel) -> None:
    """Free a model that was loaded for ZeRO-3, by a single process, of its partitions."""
    for parameter in model.parameters():
        if zero.is_partitioned(parameter):
            whole = _values(parameter)
            parameter.__dict__.clear()
            parameter.data = whole


def separate(model: PreTrainedModel, other: PreTrainedModel) -> None:
    """Give `model` copies of those modules that `other` has, too: an activation that all models of
    an architecture share. Engines put hooks on modules.
    """
    theirs = set(other.modules())
    for module in list(model.modules()):
        for name, child in module.named_children():
            if child in theirs:
                module.add_module(name, copy.deepcopy(child))


def refuse_lent(model: PreTrainedModel | str, role: str) -> None:
    """Raise InputError for a model that another trainer's engine has at this moment."""
    if isinstance(model, PreTrainedModel) and any(map(zero.is_partitioned, model.parameters())):
        raise InputError(
            f"the {role} is in the engine of another trainer; give this one a model of its own, or "
            "the name of one."
        )


def is_lendable(model: PreTrainedModel) -> bool:
    """Whether this process holds all of the model in memory, partitioned or not."""
    return not any(zero.is_on_nvme(parameter) for parameter in model.parameters())


def _attributes(module: nn.Module) -> dict[str, Any]:
    """The module's attributes; of containers (hooks, children), what is in them now."""
    return {
        name: value.copy() if isinstance(value, dict) else value
        for name, value in module.__dict__.items()
    }


def _values(parameter: nn.Parameter) -> Tensor:
    """The whole values where they are kept: of a single process's partition, a view of it."""
    if "ds_tensor" in parameter.__dict__:
        return parameter.ds_tensor.detach().view(parameter.ds_shape)
    return parameter.detach()


def guard(model: PreTrainedModel) -> None:
    """From now on `model.state_dict()`, and with it `save_pretrained`, raises InputError while
    parameters are partitioned: it would hold empty tensors.
    """
    if _refuse_partitioned not in model._state_dict_pre_hooks.values():
        model.register_state_dict_pre_hook(_refuse_partitioned)


def _refuse_partitioned(module: nn.Module, prefix: str, keep_vars: bool) -> None:
    # DeepSpeed asks through its root, with a prefix, and knows.
    if not prefix and any(zero.is_partitioned(parameter) for parameter in module.parameters()):
        raise InputError(
            "the model's parameters are partitioned, so its state_dict and save_pretrained would "
            "hold empty tensors; call trainer.save_model(directory) on all ranks."
        )

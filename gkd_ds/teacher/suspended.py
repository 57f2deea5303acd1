"""A model's own forward that stops wherever it calls a streamed module.

    forward = SuspendedForward(lambda: model(ids))
    call = forward.go_on()          # the first call of a slot, with the model's arguments
    call = forward.go_on(answer)    # the next one; after the last, what the forward returns

So a layer can run over all chunks of a window before the next one is fetched, whatever the model
does before, between and after its layers: masks and rotations, layers that return tuples, several
residual streams, layers that are called twice. The forward runs in a thread, which is how Python
leaves a function in the middle; caller and thread take turns, and never run at the same time.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from torch import Tensor, nn


@dataclass(frozen=True)
class Call:
    """How the model called a streamed module, as far as it went."""

    slot: Slot
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class _Abandoned(BaseException):
    """Ends the thread of a forward that nobody goes on with."""


class SuspendedForward:
    """Runs `forward` up to its next call of a slot, whenever it is told to go on."""

    def __init__(self, forward: Callable[[], Tensor]):
        self._forward, self._device = forward, get_accelerator().current_device()
        self._answers, self._stops = SimpleQueue(), SimpleQueue()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def go_on(self, answer: Any = None) -> Call | Tensor:
        """Give the last call its `answer`; returns the next call, or the forward's result.

        Raises what the forward raises.
        """
        if self._thread.ident is None:
            self._thread.start()
        else:
            self._answers.put(answer)
        stop = self._stops.get()
        if isinstance(stop, BaseException):
            raise stop
        return stop

    def abandon(self) -> None:
        """Let go of what a forward holds that is not through."""
        if self._thread.is_alive():
            self._answers.put(_Abandoned())
            self._thread.join()

    def wait_for(self, call: Call) -> Any:
        """The answer to a call. In the forward's thread."""
        self._stops.put(call)
        answer = self._answers.get()
        if isinstance(answer, _Abandoned):
            raise answer
        return answer

    def _run(self) -> None:
        # All three belong to a thread, and this one is new.
        _suspended.set(self)
        get_accelerator().set_device(self._device)
        with torch.no_grad():
            try:
                stop: Any = self._forward()
            except BaseException as error:
                stop = error
        self._stops.put(stop)


# The forward whose thread this is; none outside of such threads.
_suspended: ContextVar[SuspendedForward | None] = ContextVar("suspended", default=None)


class Slot(nn.Module):
    """Stands in the model for a streamed module: a suspended forward stops here, any other runs
    it.

    `streamed` has the module as `module`, and makes of a list of calls the list of their answers.
    """

    def __init__(self, streamed: nn.Module):
        super().__init__()
        self.streamed = streamed

    def __getattr__(self, name: str):
        # The model may ask its layers for attributes such as `attention_type`.
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("streamed").module, name)

    def forward(self, *args, **kwargs) -> Any:
        call = Call(self, args, kwargs)
        suspended = _suspended.get()
        return self.streamed(calls=[call])[0] if suspended is None else suspended.wait_for(call)

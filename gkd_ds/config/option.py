"""How a field is declared, and what is known of it.

    per_device_train_batch_size: Annotated[int, Bounds(low=1)] = option(8, "Samples per rank.")
    model_name_or_path: InitVar[str | None] = option(None, "The student.")

HfArgumentParser makes flags of a dataclass: it hands all of a field's metadata to argparse and
overwrites `Field.type`. So the metadata is the help text alone; bounds, and values that argparse
does not know, stand in the annotation, where no parser looks. An `InitVar` is an argument and an
attribute like any other, but no flag of such a parser: so are the names that TRL's scripts keep in
ScriptArguments and ModelConfig, which share a parser with GKDConfig.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from dataclasses import InitVar, dataclass
from numbers import Real
from typing import Annotated, Any, get_args, get_origin, get_type_hints

from gkd_ds.config.values import convert, wrong
from gkd_ds.runtime.errors import show


@dataclass(frozen=True)
class Bounds:
    """Of a number: inclusive (`low`, `high`) or exclusive (`above`, `below`)."""

    low: float = -math.inf
    above: float = -math.inf
    high: float = math.inf
    below: float = math.inf

    def check(self, name: str, value: Any) -> None:
        """Raise InputError for a number that is not within."""
        if isinstance(value, Real) and not (
            self.low <= value <= self.high and self.above < value < self.below
        ):
            words = {"low": "at least", "above": "above", "high": "at most", "below": "below"}
            given = {key: bound for key, bound in vars(self).items() if math.isfinite(bound)}
            wanted = " and ".join(f"{words[key]} {bound}" for key, bound in given.items())
            raise wrong(name, f"must be {wanted}, not {show(value)}")


@dataclass(frozen=True)
class Read:
    """What values are read as (values.convert), where the annotation is what argparse can do."""

    kind: Any


SECRET = "secret"  # in an annotation: the value is written nowhere

JsonObject = Annotated[dict | str | None, Read(dict | None)]
AtLeastOne = Annotated[int | None, Bounds(low=1)]
Share = Annotated[float, Bounds(low=0, high=1)]
NotNegative = Annotated[float, Bounds(low=0)]
Positive = Annotated[float, Bounds(above=0)]


def option(default: Any, help: str) -> Any:
    """A field: its default (`dict` and `list` mean an empty one) and its meaning."""
    metadata = {"help": help}
    if default in (dict, list):
        return dataclasses.field(default_factory=default, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Option:
    """What is known of a field. `kind` is what its values are read as; `is_flag` whether parsers
    that read dataclasses see it.
    """

    name: str
    kind: Any
    default: Any
    help: str
    bounds: Bounds | None
    is_secret: bool
    is_flag: bool


def options_of(group: type) -> list[Option]:
    """The fields that a dataclass declares, in their order."""
    hints = get_type_hints(group, include_extras=True)
    fields = group.__dataclass_fields__.values()
    return [_option(field, hints[field.name]) for field in fields]


def _option(field: dataclasses.Field, hint: Any) -> Option:
    is_flag = not isinstance(hint, InitVar)
    hint = hint if is_flag else hint.type
    kind, *extras = get_args(hint) if get_origin(hint) is Annotated else (hint,)
    read = [extra.kind for extra in extras if isinstance(extra, Read)]
    bounds = [extra for extra in extras if isinstance(extra, Bounds)]
    factory = field.default_factory
    return Option(
        field.name,
        read[0] if read else kind,
        field.default if factory is dataclasses.MISSING else factory(),
        field.metadata["help"],
        bounds[0] if bounds else None,
        SECRET in extras,
        is_flag,
    )


class KeepsInitVars:
    """A base of dataclasses that makes attributes of their InitVars.

    A dataclass hands InitVars to `__post_init__` and forgets them. Subclasses here write it without
    them, as those of TRL's configurations do.
    """

    def __init_subclass__(cls, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        bases = [vars(base).get("__dataclass_fields__", {}) for base in reversed(cls.__mro__)]
        fields = [field for of_base in bases for field in of_base.values()]
        names = [field.name for field in fields if isinstance(field.type, InitVar)]
        if "__post_init__" in vars(cls):
            cls.__post_init__ = _keeping(cls.__post_init__, list(dict.fromkeys(names)))


def _keeping(post_init: Callable, names: list[str]) -> Callable:
    @functools.wraps(post_init)
    def __post_init__(self, *values: Any) -> None:
        for name, value in zip(names, values):  # a subclass calls super's without any
            setattr(self, name, value)
        post_init(self, *values[len(names) :])

    return __post_init__


@dataclass(frozen=True)
class Alias:
    """In the place of the field `option`: another name of the field `of`, which it sets unless it
    is given None.
    """

    option: Option
    of: str

    def __get__(self, config: Any, owner: type) -> Any:
        return self if config is None else getattr(config, self.of)

    def __set__(self, config: Any, value: Any) -> None:
        value = convert(self.option.name, self.option.kind, value)
        if value is not None:
            setattr(config, self.of, value)

"""One value: from what a recipe, a flag or a caller gave to the type that a field asks for.

Recipes and flags give text, so text is read as the wanted type: "2e-5" as a number, "no" as false,
'{"a": 1}' as a mapping, "null" as None. Whatever does not fit is an InputError that names the field
and shows the value.
"""

import json
import math
import os
import re
import types
from enum import Enum
from numbers import Integral, Real
from typing import Any, Literal, Union, get_args, get_origin

from gkd_ds.runtime.errors import InputError, show

DTYPES = ("auto", "float32", "bfloat16", "float16")
TRUE_WORDS = {"true", "yes", "on", "1"}
FALSE_WORDS = {"false", "no", "off", "0"}
MEANINGS = {
    bool: "true or false",
    int: "a whole number",
    float: "a finite number",
    str: "text",
    dict: "a mapping",
    list: "a list",
}


# Equal to transformers' enums of the same names (both are text), which cost an import of torch.
class IntervalStrategy(str, Enum):
    NO = "no"
    STEPS = "steps"
    EPOCH = "epoch"


class SaveStrategy(str, Enum):
    NO = "no"
    STEPS = "steps"
    EPOCH = "epoch"
    BEST = "best"


def convert(name: str, kind: Any, value: Any) -> Any:
    """`value` as the type `kind` (a type, an Enum, a Literal, or a union of them).

    Raises:
        InputError: it cannot be read as that type.
    """
    kinds = get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)
    optional = types.NoneType in kinds
    if optional and (
        value is None
        or (str not in kinds and is_text(value) and value.strip().lower() in ("null", "none"))
    ):
        return None
    for one in kinds:
        try:
            if one is not types.NoneType:
                return read_as(one, value)
        except ValueError:
            continue
    wanted = " or ".join(describe(one) for one in kinds if one is not types.NoneType)
    problem = "but is empty" if value is None else f"not {show(value)}"
    raise wrong(name, f"must be {wanted}{' or null' if optional else ''}, {problem}")


def read_as(kind: Any, value: Any) -> Any:
    """`value` as one type; ValueError when that is not possible."""
    if isinstance(value, Enum):
        value = value.value
    if get_origin(kind) is Literal:
        return choose(get_args(kind), value)
    if get_origin(kind) is list:
        return read_names(value)
    if issubclass(kind, Enum):
        return kind(choose([member.value for member in kind], value))
    return {
        bool: read_bool,
        int: read_int,
        float: read_float,
        str: read_text,
        dict: read_dict,
        list: read_list,
    }[kind](value)


def choose(choices: Any, value: Any) -> str:
    if value is False and "no" in choices:  # YAML 1.1 reads a bare `no` as false
        value = "no"
    if is_text(value) and value in choices:
        return value
    raise ValueError


def read_bool(value: Any) -> bool:
    word = value.strip().lower() if is_text(value) else value
    if word is True or word is False:
        return word
    if is_text(word) and word in TRUE_WORDS | FALSE_WORDS:
        return word in TRUE_WORDS
    if isinstance(word, Integral) and word in (0, 1):
        return bool(word)
    raise ValueError


def read_float(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (Real, str)):
        raise ValueError
    try:
        number = float(value)
    except OverflowError:
        raise ValueError from None
    if not math.isfinite(number):
        raise ValueError
    return number


def read_int(value: Any) -> int:
    if isinstance(value, bool):
        raise ValueError
    if isinstance(value, Integral):
        number = int(value)
    else:
        real = read_float(value)
        number = (
            int(value) if is_text(value) and re.fullmatch(r"\s*[+-]?\d+\s*", value) else int(real)
        )
        if number != real and abs(real) < 2**53:
            raise ValueError
    if abs(number) >= 2**63:
        raise ValueError
    return number


def read_text(value: Any) -> str:
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    if not is_text(value) or "\0" in value:
        raise ValueError
    value.encode()  # a lone surrogate raises UnicodeEncodeError, a ValueError
    return value


def read_dict(value: Any) -> dict:
    if is_text(value) and value.lstrip().startswith("{"):
        value = read_json(value)
    if not isinstance(value, dict) or not all(is_text(key) for key in value):
        raise ValueError
    return value


def read_list(value: Any) -> list:
    if is_text(value) and value.lstrip().startswith("["):
        value = read_json(value)
    if not isinstance(value, (list, tuple)):
        raise ValueError
    return list(value)


def read_names(value: Any) -> list[str]:
    names = read_list(value)
    if not all(is_text(name) for name in names):
        raise ValueError
    return names


def read_json(text: str) -> Any:
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError from None


def init_dtypes(init_kwargs: dict | None) -> list[Any]:
    """What the keyword arguments of a from_pretrained say about its dtype, under either name."""
    names = ("dtype", "torch_dtype")
    return [value for name in names if (value := (init_kwargs or {}).get(name)) is not None]


def dtype_name(name: str, value: Any) -> str:
    """A dtype of torch, or its name, as one of DTYPES; InputError in the field `name` otherwise."""
    text = str(value).removeprefix("torch.")
    if text not in DTYPES:
        raise wrong(name, f"asks for the dtype {show(value)}; it must be {', '.join(DTYPES)}")
    return text


def whole_steps(name: str, steps: float) -> int:
    if steps != int(steps):
        raise wrong(name, f"must be a whole number, or a share below 1, not {show(steps)}")
    return int(steps)


def is_text(value: Any) -> bool:
    return isinstance(value, str)


def describe(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return "one of " + ", ".join(get_args(kind))
    if get_origin(kind) is list:
        return "a list of names"
    if issubclass(kind, Enum):
        return "one of " + ", ".join(member.value for member in kind)
    return MEANINGS[kind]


def wrong(name: str, problem: str) -> InputError:
    return InputError(f"GKDConfig field '{name}' {problem}.")

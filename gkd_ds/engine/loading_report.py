"""What transformers reports about loading a model, judged: weights that are missing, of another
shape, or without a place in it.
"""

from __future__ import annotations

import logging
import re
from typing import Any

from transformers import PreTrainedModel

logger = logging.getLogger(__name__)
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


def problem(model: PreTrainedModel, report: dict[str, Any], is_changed: bool = False) -> str | None:
    """What is wrong with the files that gave `report`, in words; None where they hold the whole
    `model`, and no other one.

    Weights without a place in it are named in a warning (the head of another task, layers that
    predict further tokens), unless they would change it. `is_changed` says that the user has
    changed the configuration: then fewer layers than there are in the files are meant.
    """
    missing, other = sorted(report["missing_keys"]), sorted(report["mismatched_keys"])
    beyond = sorted(report["unexpected_keys"])
    left_out = beyond if missing else _parts_of_it(model, beyond, is_changed)
    faults = []
    if missing:
        faults.append(f"{_count(missing)} missing ({_some(missing)})")
    if other:
        name, found, wanted = other[0]
        shapes = f"{name!r} is {list(found)} and should be {list(wanted)}"
        faults.append(f"{_count(other)} of another shape ({shapes}{', ...' * (len(other) > 1)})")
    if left_out:
        faults.append(f"{_count(left_out)} without a place in it ({_some(left_out)})")
    if not faults and beyond:
        kind = type(model).__name__
        logger.warning("%s has no use for these weights: %s.", kind, _some(beyond))
    return ", ".join(faults) or None


def _some(names: list[str]) -> str:
    return ", ".join(map(repr, names[:3])) + ", ..." * (len(names) > 3)


def _count(names: list) -> str:
    return f"{len(names)} weight{'s are' if len(names) > 1 else ' is'}"


def _parts_of_it(model: PreTrainedModel, beyond: list[str], is_changed: bool) -> list[str]:
    """Those of the names beyond the model's that it would have under another configuration, or has
    under a prefix.

    They are of layers or experts after its last (names that differ in numbers alone), of a module
    that has other weights (a bias, a scale, an adapter), or of a second copy of its layers.
    """
    names = set(model.state_dict())
    in_layers = {name for name in names if _NUMBER.search(name)}
    numberless = set() if is_changed else {_NUMBER.sub("#", name) for name in in_layers}
    modules = dict(model.named_modules())
    further = _further_layers(model)

    def is_part(name: str) -> bool:
        parts = name.split(".")
        tails = (".".join(parts[start:]) for start in range(1, len(parts)))
        if not in_layers.isdisjoint(tails):
            return True
        above = (".".join(parts[:end]) for end in range(len(parts) - 1, -1, -1))
        nearest = modules[next(name for name in above if name in modules)]
        if any(True for _ in nearest.parameters(recurse=False)):
            return True
        return _NUMBER.sub("#", name) in numberless and further.isdisjoint(parts)

    return [name for name in beyond if is_part(name)]


def _further_layers(model: PreTrainedModel) -> set[str]:
    """The numbers of the layers after the last that predict further tokens (DeepSeek-V3, GLM 4.5),
    which transformers does not run.
    """
    text = model.config.get_text_config()
    count = text.to_dict().get("num_nextn_predict_layers") or 0
    return {str(text.num_hidden_layers + i) for i in range(count)}

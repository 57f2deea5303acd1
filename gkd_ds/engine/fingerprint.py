"""Fingerprints of weights: two numbers each, by which a loaded model is compared with its files.

The sum of squares tells the norm, and the product with a fixed pattern tells the order. Both are
sums in fp64 over the elements: those of a partitioned weight's parts add up to those of the whole.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor, nn

from gkd_ds.engine import accelerator, zero
from gkd_ds.runtime import ranks

# A prime, so that rows or experts that change places meet other numbers of the pattern; of this
# size, because a block of it in fp64 stays in a core's cache.
_PERIOD = 131_071
# Of the norm. Sums of 10^10 terms are good to 1e-10 in fp64, and one element of 10^12 that is
# another one is seen.
_TOLERANCE = 1e-7


def fingerprint(part: Tensor, begin: int = 0) -> Tensor:
    """(sum of squares, product with the pattern) of `part`, whose first element is number `begin`
    of its weight: fp64 `[2]` on the CPU.
    """
    flat, device = part.detach().flatten(), accelerator.device()
    pattern = _pattern(device)
    sums = torch.zeros(2, dtype=torch.float64, device=device)
    done = 0
    while done < len(flat):
        place = (begin + done) % _PERIOD
        block = flat[done : done + len(pattern) - place].to(device).double()
        sums[0] += block.dot(block)
        sums[1] += block.dot(pattern[place : place + len(block)])
        done += len(block)
    return sums.cpu()


def fingerprints(model: nn.Module) -> dict[str, Tensor]:
    """The fingerprints of all weights and saved buffers of `model` by name. Collective."""
    tensors = {
        name: tensor
        for name, tensor in model.state_dict(keep_vars=True).items()
        if isinstance(tensor, Tensor)
    }
    prints = {}
    for name, tensor in tensors.items():
        with zero.own_part(tensor) as (part, begin):
            prints[name] = fingerprint(part, begin)
    parts = [name for name, tensor in tensors.items() if zero.is_partitioned(tensor)]
    sums = ranks.all_reduce_sum([number for name in parts for number in prints[name].tolist()])
    whole = torch.tensor(sums, dtype=torch.float64).view(-1, 2)
    return prints | dict(zip(parts, whole, strict=True))


def is_same(ours: Tensor, theirs: Tensor) -> bool:
    """Whether these are fingerprints of the same numbers. Of numbers that are not finite, all are
    alike.
    """
    if not theirs.isfinite().all():
        return not ours.isfinite().all()
    squares = theirs[0]
    allowed = _TOLERANCE * torch.stack([squares, squares.sqrt()])
    return bool(((ours - theirs).abs() <= allowed).all())


def forget_pattern() -> None:
    """Free what is kept from one fingerprint to the next: 1 MiB, on an accelerator 64 of it."""
    _pattern.cache_clear()


@cache
def _pattern(device: torch.device) -> Tensor:
    """Numbers in [-0.5, 0.5), fp64; several periods where a block must be large to be quick."""
    generator = torch.Generator().manual_seed(0)
    period = torch.rand(_PERIOD, generator=generator, dtype=torch.float64) - 0.5
    return period.to(device).repeat(1 if device.type == "cpu" else 64)

"""splitmix64, the hash behind every draw of a run: source draws, sample orders, sampled tokens.

It is written once per kind of number, because each kind wraps at 64 bits in its own way. All three
give the same 64 bits for the same 64 bits.
"""

import numpy as np
from torch import Tensor

MASK_64 = (1 << 64) - 1
INCREMENT = 0x9E3779B97F4A7C15
_FACTORS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)


def splitmix64(value: int) -> int:
    """Of a Python integer in [0, 2^64)."""
    value = (value + INCREMENT) & MASK_64
    value = ((value ^ (value >> 30)) * _FACTORS[0]) & MASK_64
    value = ((value ^ (value >> 27)) * _FACTORS[1]) & MASK_64
    return value ^ (value >> 31)


def splitmix64_array(values: np.ndarray) -> np.ndarray:
    """Of each element of a uint64 array, whose additions and multiplications wrap."""
    values = values + np.uint64(INCREMENT)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(_FACTORS[0])
    values = (values ^ (values >> np.uint64(27))) * np.uint64(_FACTORS[1])
    return values ^ (values >> np.uint64(31))


def splitmix64_tensor(values: Tensor) -> Tensor:
    """Of each element of an int64 tensor. Multiplications wrap; a right shift copies the sign, and
    a mask removes the copies.
    """
    values = values + _signed(INCREMENT)
    values = (values ^ ((values >> 30) & ((1 << 34) - 1))) * _signed(_FACTORS[0])
    values = (values ^ ((values >> 27) & ((1 << 37) - 1))) * _signed(_FACTORS[1])
    return values ^ ((values >> 31) & ((1 << 33) - 1))


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value

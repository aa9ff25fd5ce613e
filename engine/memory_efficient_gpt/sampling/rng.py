"""Counter-based random numbers: the same (seed, counter) gives the same number, always and everywhere.

Purpose: one uniform number for each token drawn, with no generator state to keep, save or restore.
Does not know: batches, devices, torch.
Invariant: a number depends on its own seed and counter only, so a row's draws do not change with its
neighbours, its position in the batch, preemption or a restart.

The numbers are those of SplitMix64 (Steele, Lea, Flood: Fast Splittable Pseudorandom Number Generators,
2014, section 4) started at a hash of the seed, so that nearby seeds have unrelated streams.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

_GOLDEN: Final = np.uint64(0x9E3779B97F4A7C15)
_MULTIPLIER_1: Final = np.uint64(0xBF58476D1CE4E5B9)
_MULTIPLIER_2: Final = np.uint64(0x94D049BB133111EB)
_WORD: Final = (1 << 64) - 1
_MANTISSA_BITS: Final = 53


def uniforms(seeds: Sequence[int], counters: Sequence[int]) -> npt.NDArray[np.float64]:
    """`[R] float64` in [0, 1), one for each pair; seeds may be negative (taken modulo 2**64)."""
    steps = np.array([counter & _WORD for counter in counters], dtype=np.uint64)
    return numbers_of(streams(seeds), steps)


def streams(seeds: Sequence[int]) -> npt.NDArray[np.uint64]:
    """Where each seed's numbers start, `[R] uint64`: for `numbers_of`."""
    return _mix(np.array([seed & _WORD for seed in seeds], dtype=np.uint64) + _GOLDEN)


def numbers_of(started: npt.NDArray[np.uint64], counters: npt.NDArray[np.uint64]) -> npt.NDArray[np.float64]:
    """`uniforms` of the seeds that started there; counters `[R] uint64`."""
    words = _mix(started + (counters + np.uint64(1)) * _GOLDEN)
    return (words >> np.uint64(64 - _MANTISSA_BITS)).astype(np.float64) * 2.0**-_MANTISSA_BITS


def _mix(words: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    words = (words ^ (words >> np.uint64(30))) * _MULTIPLIER_1
    words = (words ^ (words >> np.uint64(27))) * _MULTIPLIER_2
    mixed: npt.NDArray[np.uint64] = words ^ (words >> np.uint64(31))
    return mixed

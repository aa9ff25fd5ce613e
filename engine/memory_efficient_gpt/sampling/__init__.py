"""Batched sampling: one step's logits in, one token a row out.

rng.py        one uniform number for a (seed, counter) pair
batch.py      rows of a step -> tensors: SampleRow, SamplingBatch
adjust.py     logit bias, suppression, penalties
draw.py       temperature, min_p, top_k, top_p, the draw itself
ordering.py   the sorts and maxima these need, fast on each device
logprobs.py   log probabilities of chosen and most likely tokens
sampler.py    sample(): all of it in order
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from memory_efficient_gpt.sampling.batch import SampleRow, SamplingBatch
    from memory_efficient_gpt.sampling.logprobs import LogprobTensors, prompt_logprobs
    from memory_efficient_gpt.sampling.sampler import Sampled, sample

__all__ = ["LogprobTensors", "SampleRow", "Sampled", "SamplingBatch", "prompt_logprobs", "sample"]

_HOMES = {
    "LogprobTensors": "logprobs",
    "SampleRow": "batch",
    "Sampled": "sampler",
    "SamplingBatch": "batch",
    "prompt_logprobs": "logprobs",
    "sample": "sampler",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)

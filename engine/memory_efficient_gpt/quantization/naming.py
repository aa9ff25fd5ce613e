"""What people call the way in which a whole model is stored.

Purpose: one name for the schemes of all its inner layers.
Does not know: models.
Invariant: a mix is never called by the name of one of its schemes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from memory_efficient_gpt.quantization.scheme import Scheme


def inner_schemes(sizes: Mapping[Scheme, int], outer_sizes: Mapping[Scheme, int]) -> frozenset[Scheme]:
    """The schemes of inner layers, by weights; of embedding and head where nothing else is quantized."""
    inner = frozenset(scheme for scheme, size in sizes.items() if size)
    return inner or frozenset(scheme for scheme, size in outer_sizes.items() if size)


def name_of(schemes: Iterable[Scheme]) -> str | None:
    """`int4`, or `mixed (int4, int8)`; None for nothing."""
    names = sorted({str(scheme) for scheme in schemes})
    return f"mixed ({', '.join(names)})" if len(names) > 1 else next(iter(names), None)

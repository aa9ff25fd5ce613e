"""Groups of inputs that are not contiguous, put in order.

Purpose: from the group of each input to an order of inputs in which groups are contiguous.
Does not know: formats, how layers compute in another order (see reordered.py).
Invariant: in that order input j is of group j // size, as QuantizedWeight wants it.
"""

from __future__ import annotations

import torch

from memory_efficient_gpt.quantization.foreign.tensor_files import LayerTensors


def order_of_groups(
    tensors: LayerTensors, own_name: str, index: torch.Tensor, groups: int
) -> tuple[torch.Tensor | None, int | None]:
    """The order that sorts inputs by group (None: they are sorted), and the group size (None: one group).

    index: `[K] int64`, the group of each input. Raises CheckpointError unless all groups but the last are
    equally large.
    """
    if index.min() < 0 or index.max() >= groups:
        raise tensors.error(
            own_name, f"names groups {int(index.min())}..{int(index.max())}, there are {groups}"
        )
    if groups == 1:
        return None, None
    size = int(torch.bincount(index).max())
    in_order = torch.arange(len(index)) // size
    if torch.equal(index, in_order):
        return None, size
    order = index.argsort(stable=True)
    if not torch.equal(index[order], in_order):
        raise tensors.error(own_name, f"has groups of unequal sizes, up to {size} inputs")
    return order, size

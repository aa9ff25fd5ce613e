"""Whether a module that others use, too, is still the one that was prepared.

Purpose: a mark of a module's structure and of where its tensors are, cheap enough for every call.
Does not know: engines, what is done when it differs.
Invariant: a tensor that was replaced, moved, changed its dtype, or was written to by torch under its own name
gives another mark. What is written behind `.data`, in place, does not.
"""

from __future__ import annotations

from torch import nn

from memory_efficient_gpt.quantization.modules import QuantizedModule

State = tuple[object, ...]


def state_of(module: nn.Module) -> State:
    """The mark. Two are equal while nothing was changed; neither holds a tensor."""
    marks: list[object] = []
    waiting = [module]
    while waiting:  # as `modules` goes, in a fifth of its time
        part = waiting.pop()
        marks.append(id(part))
        for tensor in (*part._parameters.values(), *part._buffers.values()):
            if tensor is not None:
                version = 0 if tensor.is_inference() else tensor._version  # torch counts no writes to those
                marks += (tensor.data_ptr(), tensor.dtype, version)
        if isinstance(part, QuantizedModule):
            marks.append(part.compute_dtype)
            if part.packed_weight is not None:
                marks.append(part.packed_weight.codes.data_ptr())
        waiting += filter(None, part._modules.values())
    return tuple(marks)

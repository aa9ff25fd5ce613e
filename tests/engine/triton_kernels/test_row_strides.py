"""Strided views are addressed where they lie: rows found by the strides are the view's own."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from memory_efficient_gpt.triton_kernels.row_strides import one_stride, two_strides

View = Callable[[], torch.Tensor]


def numbers(*shape: int) -> torch.Tensor:
    return torch.arange(float(torch.Size(shape).numel())).view(shape)


def by_strides(x: torch.Tensor) -> torch.Tensor:
    """The rows that a launch would read."""
    at, inner, outer_stride, inner_stride = two_strides(x)
    size = x.shape[-1]
    flat = at.as_strided((at.untyped_storage().nbytes() // 4 - at.storage_offset(),), (1,))
    starts = [r // inner * outer_stride + r % inner * inner_stride for r in range(x.numel() // size)]
    return torch.stack([flat[start : start + size] for start in starts]).view(x.shape)


VIEWS: dict[str, View] = {
    "contiguous": lambda: numbers(2, 3, 4),
    "one row": lambda: numbers(4),
    "half of each row": lambda: numbers(1, 5, 8)[..., 4:],
    "heads of a merged product": lambda: numbers(1, 5, 20)[..., 8:16].unflatten(-1, (2, 4)),
    "heads before tokens": lambda: numbers(1, 5, 3, 4).transpose(1, 2),
    "one token of a merged product": lambda: numbers(1, 1, 20)[..., 8:16].unflatten(-1, (2, 4)),
    "every second row": lambda: numbers(6, 4)[::2],
    "one row for all": lambda: numbers(1, 4).expand(3, 4),
}
COPIED: dict[str, View] = {
    "a transposed matrix": lambda: numbers(4, 3).t(),
    "three strides": lambda: numbers(2, 5, 6, 4)[:, ::2, ::3],
}


@pytest.mark.parametrize("name", VIEWS)
def test_rows_are_read_where_they_lie(name: str) -> None:
    x = VIEWS[name]()
    assert two_strides(x)[0] is x
    assert torch.equal(by_strides(x), x)


@pytest.mark.parametrize("name", COPIED)
def test_what_has_no_two_strides_is_copied(name: str) -> None:
    x = COPIED[name]()
    assert two_strides(x)[0].data_ptr() != x.data_ptr()
    assert torch.equal(by_strides(x), x)


@pytest.mark.parametrize("name", [*VIEWS, *COPIED])
def test_one_stride_leads_from_row_to_row(name: str) -> None:
    x = {**VIEWS, **COPIED}[name]()
    at, stride = one_stride(x)
    size = x.shape[-1]
    flat = at.as_strided((at.untyped_storage().nbytes() // 4 - at.storage_offset(),), (1,))
    got = torch.stack([flat[r * stride : r * stride + size] for r in range(x.numel() // size)])
    assert torch.equal(got.view(x.shape), x)


def test_halves_of_a_merged_product_are_not_copied() -> None:
    for half in numbers(1, 5, 8).chunk(2, dim=-1):
        assert one_stride(half)[0] is half

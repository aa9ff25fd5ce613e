"""Calls that wait: whatever comes next, nothing can tell that they did."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch.nn import functional

from memory_efficient_gpt.native.deferral import Deferral, DeferredKind, current_deferral
from memory_efficient_gpt.native.deferred_calls import DeferredHeadNorm, DeferredSum, DeferredTurn
from memory_efficient_gpt.native.ops import NormStyle
from memory_efficient_gpt.native.rotary import unturned


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.inference_mode():
        yield


def pair(*shape: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)


def sums(*, poison: bool = False) -> Deferral:
    return Deferral(frozenset(("sums",)), poison=poison)


def waits(deferral: Deferral, total: torch.Tensor) -> bool:
    return deferral.take(DeferredSum, total) is not None


def test_a_sum_waits_and_its_taker_gets_the_terms() -> None:
    left, right = pair(1, 3, 8)
    with sums(poison=True) as deferral:
        total = left + right
        terms = deferral.take(DeferredSum, total)
        assert terms is not None
        assert terms.left is left and terms.right is right and terms.out is total
        assert total.isnan().all()  # nobody has computed it
        assert deferral.take(DeferredSum, total) is None
    assert deferral.taken == {"sums": 1}
    assert total.isnan().all()


USES: dict[str, Callable[[torch.Tensor, torch.Tensor, torch.Tensor], Any]] = {
    "by an operation": lambda total, left, right: total * 1,
    "by a function": lambda total, left, right: functional.linear(total, torch.eye(8)),
    "by an operator": lambda total, left, right: torch.ops.aten.mul.Tensor(total, 1),
    "through a view": lambda total, left, right: total.view(-1)[0],
    "as part": lambda total, left, right: total[:, 1:],
    "by its address": lambda total, left, right: total.data_ptr(),
    "by its storage": lambda total, left, right: total.untyped_storage(),
    "as an array": lambda total, left, right: total.numpy(),
    "by another library": lambda total, left, right: total.__dlpack__(),
    "in a list": lambda total, left, right: torch.cat([left, total]),
    "by name": lambda total, left, right: torch.mul(input=total, other=total),
    "by the next sum": lambda total, left, right: (total + left).sum(),
    "never": lambda total, left, right: None,
    "never, but a term is written": lambda total, left, right: left.zero_(),
    "never, but a term is written through a view": lambda total, left, right: right.view(-1)[0].fill_(9),
}


@pytest.mark.parametrize("use", USES)
def test_whatever_is_done_next_finds_the_sum_computed(use: str) -> None:
    left, right = pair(1, 3, 8)
    want = left + right
    with sums(poison=True) as deferral:
        total = left + right
        USES[use](total, left, right)
        if use != "never":
            assert not waits(deferral, total)
    assert torch.equal(total, want)


def test_what_is_known_without_contents_may_be_asked_for() -> None:
    left, right = pair(1, 3, 8)
    with sums() as deferral:
        total = left + right
        assert total.shape == (1, 3, 8) and total.size(-1) == 8 and total.dim() == 3 and total.ndim == 3
        assert total.dtype is torch.float32 and total.device.type == "cpu" and total.is_contiguous()
        assert left.numel() == 24 and not total.requires_grad and total.is_inference() and total.is_cpu
        assert waits(deferral, total)


def test_sums_of_other_kinds_do_not_wait() -> None:
    left, right = pair(1, 3, 8)
    with sums() as deferral:
        for total in (
            left + 1.0,
            1.0 + left,
            left + right[0],
            left + right[..., :1],
            left + right.double(),
            left.transpose(1, 2) + right.transpose(1, 2),
            left[0, 0] + right[0, 0],
            left.long() + right.long(),
            torch.add(left, right, alpha=2),
            torch.add(left, right, out=torch.empty(1, 3, 8)),
            left + torch.nn.Parameter(right, requires_grad=False),
        ):
            assert not waits(deferral, total)
    with torch.inference_mode(False), torch.enable_grad(), sums() as deferral:
        left, right = pair(1, 3, 8)
        assert not waits(deferral, left + right)


def test_views_may_be_taken_and_see_what_is_computed_later() -> None:
    left, right = pair(1, 3, 8)
    with sums() as deferral:
        total = left + right
        view, other = total.view(-1), left.transpose(1, 2).unflatten(1, (2, 4)).narrow(1, 0, 1)
        terms = deferral.take(DeferredSum, total)
        assert terms is not None
        terms.compute()
    assert torch.equal(view, (left + right).view(-1)) and other.shape == (1, 1, 4, 3)


def test_a_tensor_that_is_alike_is_not_the_one_that_waits() -> None:
    left, right = pair(1, 3, 8)
    with sums() as deferral:
        total = left + right
        assert deferral.take(DeferredSum, left) is None
        assert waits(deferral, total)


def test_only_kinds_that_were_asked_for_wait() -> None:
    left, right = pair(1, 3, 8)
    with Deferral(frozenset(("turns",))) as deferral:
        assert deferral.defers("turns") and not deferral.defers("sums")
        assert not waits(deferral, left + right)


class Kernels:
    """Turns by copying, norms by doubling."""

    def rms_norm_into(
        self, x: torch.Tensor, weight: torch.Tensor, eps: float, style: str, out: torch.Tensor
    ) -> None:
        torch.mul(x, 2, out=out)

    def rotate_into(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        out: tuple[torch.Tensor, torch.Tensor],
    ) -> None:
        out[0].copy_(query)
        out[1].copy_(key)


def turn() -> DeferredTurn:
    query, key = pair(1, 2, 3, 8)
    return DeferredTurn(Kernels(), query, key, query[0], key[0], (unturned(query), unturned(key)))


def test_a_turn_is_taken_with_both_results_or_computed_by_itself() -> None:
    with Deferral(frozenset(("turns",)), poison=True) as deferral:
        taken, crossed, left = turn(), turn(), turn()
        assert deferral.take(DeferredTurn, *deferral.put_turn(taken)) is taken
        assert crossed.outputs[0].transpose(1, 2).is_contiguous()
        query, key = deferral.put_turn(crossed)
        assert deferral.take(DeferredTurn, key, query) is None
        assert deferral.take(DeferredSum, query) is None
        deferral.put_turn(left)  # the next one: what waited is computed
    assert taken.outputs[0].isnan().all() and taken.outputs[1].isnan().all()
    for call in (crossed, left):
        assert torch.equal(call.outputs[0], call.query) and torch.equal(call.outputs[1], call.key)
    assert deferral.taken == {"turns": 1}


def norms(style: NormStyle = "round_then_scale") -> tuple[DeferredHeadNorm, DeferredHeadNorm]:
    query, key = pair(1, 3, 2, 8)
    return (
        DeferredHeadNorm(Kernels(), query, query, 1e-6, "round_then_scale", torch.empty_like(query)),
        DeferredHeadNorm(Kernels(), key, key, 1e-6, style, torch.empty_like(key)),
    )


ALL = frozenset[DeferredKind](("sums", "turns", "head_norms"))


def test_norms_wait_together_and_are_taken_with_the_turn_of_their_results() -> None:
    first, second = norms()
    with Deferral(ALL, poison=True) as deferral:
        query = deferral.put_norm(first).transpose(1, 2)
        key = deferral.put_norm(second).transpose(1, 2)
        taken = deferral.take(DeferredTurn, *deferral.put_turn(turn_of(query, key)))
    assert taken is not None and taken.norms == (first, second)
    assert torch.equal(first.source_of(query), first.x.transpose(1, 2))
    assert first.source_of(first.out) is first.x
    assert first.out.isnan().all() and second.out.isnan().all()
    assert deferral.taken == {"turns": 1, "head_norms": 2}


@pytest.mark.parametrize(
    "way", ["swapped view", "other style", "read between", "one alone", "a third", "untaken"]
)
def test_norms_that_the_turn_does_not_end_are_computed(way: str) -> None:
    first, second = norms("scale_then_round" if way == "other style" else "round_then_scale")
    with Deferral(ALL, poison=True) as deferral:
        query = deferral.put_norm(first).transpose(1, 2)
        out = deferral.put_norm(second)
        key = out.transpose(2, 1) if way == "swapped view" else out.transpose(1, 2)
        if way == "read between":
            key.sum()
        if way == "a third":
            deferral.put_norm(norms()[0])
        call = turn_of(query, query if way == "one alone" else key)
        outputs = deferral.put_turn(call)
        taken = None if way == "untaken" else deferral.take(DeferredTurn, *outputs)
    assert (taken is None) == (way == "untaken")
    assert taken is None or taken.norms is None
    for norm in (first, second):
        assert torch.equal(norm.out, norm.x * 2)
    if taken is None:
        assert torch.equal(outputs[1], second.x.transpose(1, 2) * 2)


def turn_of(query: torch.Tensor, key: torch.Tensor) -> DeferredTurn:
    """Of tensors that may wait: nothing looks at them."""
    return DeferredTurn(Kernels(), query, key, query, key, (unturned(query), unturned(key)))


def test_nothing_waits_within_a_function_that_torch_computes() -> None:
    asked = []

    class Probe(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            asked.append(deferral.defers("sums"))
            return torch.zeros(1)

    with sums() as deferral:
        torch.relu(torch.zeros(2).as_subclass(Probe))
    assert False in asked


def test_an_error_leaves_no_call_waiting_and_no_context() -> None:
    left, right = pair(1, 3, 8)
    totals = []

    def fail() -> None:
        with sums():
            totals.append(left + right)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert current_deferral() is None
    with sums() as deferral:
        assert not waits(deferral, totals[0])

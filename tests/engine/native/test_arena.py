"""Memory that is used again: no two living tensors share a byte, and little is needed for many."""

from __future__ import annotations

import random

import torch

from memory_efficient_gpt.native.arena import Arena, is_dense


def test_tensors_that_live_share_no_byte_whatever_is_made_and_dropped() -> None:
    rng, arena = random.Random(0), Arena()
    living: list[tuple[torch.Tensor, int]] = []
    for number in range(3000):
        if living and rng.random() < 0.5:
            tensor, stamp = living.pop(rng.randrange(len(living)))
            assert (tensor == stamp).all()
            continue
        shape = [rng.randrange(1, 40) for _ in range(rng.randrange(1, 4))]
        like = torch.empty(shape, dtype=rng.choice([torch.float32, torch.int64, torch.int16]))
        if len(shape) > 1 and rng.random() < 0.3:
            like = like.transpose(0, 1)
        made = arena.like(like)
        assert made is not None
        assert (made.shape, made.stride(), made.dtype) == (like.shape, like.stride(), like.dtype)
        assert made.data_ptr() % 64 == 0 and arena.owns(made)
        living.append((made.fill_(number % 1000), number % 1000))
    for tensor, stamp in living:
        assert (tensor == stamp).all()


def test_a_view_keeps_its_memory_and_the_last_one_gives_it_back() -> None:
    arena = Arena()
    first = arena.like(torch.empty(16))
    assert first is not None
    address, view = first.data_ptr(), first.view(4, 4)[1]
    del first
    other = arena.like(torch.empty(16))
    assert other is not None and other.data_ptr() != address and arena.owns(view)
    del view
    again = arena.like(torch.empty(16))
    assert again is not None and again.data_ptr() == address


def test_a_chain_needs_the_memory_of_what_lives_at_one_time() -> None:
    arena = Arena()
    x = arena.like(torch.empty(1000, 100))
    for _ in range(50):
        x = arena.like(torch.empty(1000, 100))
    assert x is not None and arena.num_bytes <= 3 * 400_000


def test_a_tensor_outlives_its_arena() -> None:
    arena = Arena()
    tensor = arena.like(torch.empty(8))
    del arena
    assert tensor is not None and float(tensor.fill_(2.0).sum()) == 16.0


def test_tensors_with_gaps_are_not_for_it() -> None:
    assert is_dense(torch.empty(3, 4).t()) and is_dense(torch.empty(1, 5, 1))
    for tensor in (torch.empty(3, 4)[:, :2], torch.empty(3, 1).expand(3, 4), torch.empty(0)):
        assert not is_dense(tensor) and Arena().like(tensor) is None

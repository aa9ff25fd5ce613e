"""KV memory on a CUDA device that comes and goes while an engine works: what the device really has.

Run on a machine with a GPU and cuda-bindings: python -m pytest -m gpu -s tests/gpu/test_elastic_kv_cuda.py
"""

from __future__ import annotations

import gc
import multiprocessing
import random
import sys
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import LlamaConfig, LlamaForCausalLM

from memory_efficient_gpt.config import EngineConfig
from memory_efficient_gpt.core import Engine
from memory_efficient_gpt.kv_cache.blocks import BlockAllocator
from memory_efficient_gpt.kv_cache.cuda_driver import load_driver
from memory_efficient_gpt.kv_cache.cuda_memory import CudaMemory, bytes_on
from memory_efficient_gpt.kv_cache.geometry import LayerKV
from memory_efficient_gpt.kv_cache.limit import KVLimit
from memory_efficient_gpt.kv_cache.pool import KVPool
from memory_efficient_gpt.kv_cache.pool_memory import PoolMemoryError
from memory_efficient_gpt.request import Request, SamplingParams

pytestmark = pytest.mark.gpu

DEVICE = torch.device("cuda", 0)
GIB = 1 << 30
SHAPE: dict[str, Any] = dict(
    vocab_size=4096, hidden_size=1024, intermediate_size=2048, num_hidden_layers=4, num_attention_heads=8,
    num_key_value_heads=8, head_dim=128, max_position_embeddings=2048, initializer_range=0.1,
)  # fmt: skip
GRANULES = 8 * (2 << 20)
"""One granule in each tensor of that shape, in bytes: 16 blocks of 64 tokens in 16 bits."""
ROUNDING = 64 << 20
"""Bytes: page tables, kernels that are loaded when they are first used, what torch's allocator keeps."""


@pytest.fixture(autouse=True)
def _alone() -> Iterator[None]:
    """What earlier tests have left would be counted, and be given back in the middle."""
    clean()
    yield
    clean()


@pytest.fixture(autouse=True, scope="module")
def _bindings() -> None:
    pytest.importorskip("cuda.bindings.driver")


def clean() -> None:
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()


def layers(count: int) -> list[LayerKV]:
    return [
        LayerKV(module=f"l.{i}", num_kv_heads=8, key_dim=128, value_dim=128, num_query_heads=8)
        for i in range(count)
    ]


def make_pool(num_blocks: int, dtype: torch.dtype = torch.bfloat16, count: int = 4) -> KVPool:
    memory = CudaMemory(load_driver(DEVICE), bytes_on(DEVICE))
    return KVPool(layers(count), num_blocks, 64, dtype, DEVICE, memory=memory)


def free_bytes() -> int:
    torch.cuda.synchronize()
    return torch.cuda.mem_get_info(DEVICE)[0]


def make_engine(**options: Any) -> Engine:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        with torch.device(DEVICE):
            model = LlamaForCausalLM(LlamaConfig(**SHAPE)).bfloat16().eval()
    defaults = dict(kv_cache_bytes=10 * GRANULES, kv_reserve_bytes=GIB, debug_checks=True, max_num_seqs=16)
    return Engine.from_model(model, EngineConfig(model="elastic", **{**defaults, **options}))


def ask(engine: Engine, number: int, tokens: int = 200) -> None:
    rng = random.Random(number)
    prompt = tuple(rng.randrange(3, 4096) for _ in range(40 + 29 * number))
    params = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True)
    engine.submit(Request(id=str(number), prompt_token_ids=prompt, params=params))


def drain(engine: Engine) -> dict[str, list[int]]:
    texts: dict[str, list[int]] = {}
    while engine.has_work:
        collect(engine, texts)
    return texts


def collect(engine: Engine, texts: dict[str, list[int]]) -> None:
    for event in engine.step():
        assert event.error is None
        texts.setdefault(event.request_id, []).extend(event.token_ids)


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float16, torch.float32, torch.int8, torch.float8_e4m3fn], ids=str
)
def test_kept_blocks_keep_their_content_and_the_device_has_what_is_told(dtype: torch.dtype) -> None:
    rng = random.Random(0)
    pool = make_pool(1000, dtype)
    for tensor in pool.tensors():  # kernels that are used for the first time take memory, too
        tensor.view(torch.uint8)[0] = 0
        assert (tensor.view(torch.uint8)[0] == 0).all()
    pool.keep_all_but(range(1, 1000))
    empty, held_at_first = free_bytes(), pool.held_bytes(range(1, 1000))
    held: dict[int, int] = {}
    addresses = [tensor.data_ptr() for tensor in pool.tensors()]
    for turn in range(1, 12):
        first = rng.randrange(1, 900)
        gone = [*range(1, first, rng.choice([1, 1, 2])), *range(first + rng.randrange(99), 1000)]
        pool.keep_all_but(gone)
        told = pool.held_bytes(gone) - held_at_first
        assert abs(empty - free_bytes() - told) <= ROUNDING
        absent = set(gone)
        held = {block: number for block, number in held.items() if block not in absent}
        for block, number in held.items():
            assert all((t.view(torch.uint8)[block] == number).all() for t in pool.tensors())
        for block in rng.sample(sorted(set(range(1000)) - absent), min(20, 1000 - len(absent))):
            held[block] = turn
            for tensor in pool.tensors():
                tensor.view(torch.uint8)[block] = turn
    assert addresses == [tensor.data_ptr() for tensor in pool.tensors()]
    assert all(tensor.device == DEVICE and tensor.dtype is not None for tensor in pool.tensors())


def test_new_memory_is_zero_though_others_wrote_it() -> None:
    pool = make_pool(512)
    pool.keep_all_but(())
    for tensor in pool.tensors():
        tensor.fill_(3.0)
    pool.keep_all_but(range(100, 512))
    pool.keep_all_but(())
    for tensor in pool.tensors():
        assert (tensor[:100] == 3.0).all() and not tensor[128:].any()


def test_all_of_it_comes_back_when_the_pool_is_gone() -> None:
    make_pool(16).keep_all_but(())
    clean()
    before = free_bytes()
    pool = make_pool(2000)
    pool.keep_all_but(())
    assert before - free_bytes() >= pool.held_bytes(()) > 2 * GIB * 0.9
    del pool
    clean()
    assert abs(before - free_bytes()) <= ROUNDING


def test_memory_that_is_not_there_leaves_limit_and_content_as_they_were() -> None:
    total = torch.cuda.mem_get_info(DEVICE)[1]
    num_blocks = 2 * total // (4 * 2 * 64 * 8 * 128 * 2)
    pool = make_pool(num_blocks)
    allocator = BlockAllocator(num_blocks, 64)
    limit = KVLimit(pool, allocator, 321, max_len=64)
    for tensor in pool.tensors():
        tensor[:321] = 2.0
    held, before = limit.held_bytes, free_bytes()
    began = time.perf_counter()
    assert limit.set(pool.num_bytes) == held and allocator.limit == 320
    Console().print(f"\na refusal of {pool.num_bytes:,} bytes took {time.perf_counter() - began:.2f} s")
    assert abs(before - free_bytes()) <= ROUNDING
    assert all((tensor[:321] == 2.0).all() for tensor in pool.tensors())
    with pytest.raises(PoolMemoryError, match="CUDA_ERROR_OUT_OF_MEMORY"):
        pool.keep_all_but(())
    assert torch.zeros(1, device=DEVICE).item() == 0.0, "the device is of use"


@pytest.mark.parametrize("kv_cache_dtype", ["auto", "int8", "fp8"])
@pytest.mark.parametrize("options", [{}, {"cuda_graphs": False}, {"native_kernels": False}], ids=str)
def test_greedy_tokens_are_the_same_while_the_limit_moves(
    options: dict[str, Any], kv_cache_dtype: str
) -> None:
    # what torch multiplies depends on the rows of a step, so here every step has the same requests
    sizes = {"kv_cache_dtype": kv_cache_dtype, "max_num_seqs": 1, **options}
    fixed = make_engine(kv_reserve_bytes=None, **sizes)
    for number in range(12):
        ask(fixed, number, tokens=60)
    expected = drain(fixed)
    fixed.close()
    del fixed
    clean()
    engine = make_engine(**sizes)
    assert engine.info.kv_most_bytes is not None, engine.info.notes
    rng, texts, seen, turn = random.Random(1), dict[str, list[int]](), set[int](), 0
    for number in range(12):
        ask(engine, number, tokens=60)
    while engine.has_work:
        if turn % 11 == 0:
            before, free = engine.set_kv_limit(0), free_bytes()
            held = engine.set_kv_limit(rng.randrange(GIB))
            assert abs(free - free_bytes() - (held - before)) <= ROUNDING
            seen.add(held)
        collect(engine, texts)
        turn += 1
    assert texts == expected and len(seen) > 10
    if not options:
        assert engine._runner._replays.replayed > 100  # type: ignore[attr-defined]


def test_many_sequences_go_on_under_a_limit_that_moves_and_none_is_lost() -> None:
    engine = make_engine()
    texts: dict[str, list[int]] = {}
    rng, turn = random.Random(2), 0
    for number in range(40):
        ask(engine, number, tokens=120)
    while engine.has_work:
        if turn % 5 == 0:
            engine.set_kv_limit(rng.choice([0, 10 * GRANULES, 30 * GRANULES, GIB]))
        collect(engine, texts)
        turn += 1
    torch.cuda.synchronize()
    assert {name: len(tokens) for name, tokens in texts.items()} == {str(n): 120 for n in range(40)}


def test_graphs_of_before_are_replayed_after_the_limit_moved() -> None:
    engine = make_engine(prefix_cache=False)
    for _ in range(2):
        ask(engine, 3)
        before = drain(engine)
    graphs: Any = engine._runner._replays  # type: ignore[attr-defined]
    captured = graphs.captured
    engine.set_kv_limit(GIB)
    engine.set_kv_limit(0)
    engine.set_kv_limit(20 * GRANULES)
    ask(engine, 3)
    assert drain(engine) == before and graphs.captured == captured


def test_asleep_it_has_no_kv_memory_and_wakes_with_its_limit() -> None:
    engine = make_engine(prefix_cache=False)
    ask(engine, 3)
    before = drain(engine)
    engine.set_kv_limit(30 * GRANULES)
    clean()
    awake = free_bytes()
    report = engine.sleep()
    assert report.kv_bytes == 30 * GRANULES
    assert free_bytes() - awake >= report.kv_bytes + 0.9 * engine.info.weights_bytes
    asleep = free_bytes()
    assert engine.set_kv_limit(20 * GRANULES) == 20 * GRANULES and free_bytes() == asleep
    engine.wake()
    assert asleep - free_bytes() >= 20 * GRANULES
    ask(engine, 3)
    assert drain(engine) == before
    assert engine.set_kv_limit(25 * GRANULES) == 25 * GRANULES


def test_an_engine_tells_what_it_holds_and_begins_within_its_bytes() -> None:
    before = free_bytes()
    engine = make_engine(kv_cache_bytes=10 * GRANULES + GRANULES // 2)
    info = engine.info
    assert info.kv_cache_bytes == 10 * GRANULES and info.num_kv_blocks == 159
    assert info.kv_granule_bytes == GRANULES and info.kv_most_bytes == GIB
    assert before - free_bytes() >= info.weights_bytes + info.kv_cache_bytes
    assert not any("keeps its size" in note for note in info.notes)


def test_without_bindings_the_cache_keeps_its_size_and_says_why(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    monkeypatch.setattr("memory_efficient_gpt.kv_cache.pool_size._has_cuda_bindings", lambda: True)
    engine = make_engine()
    (note,) = [note for note in engine.info.notes if "keeps its size" in note]
    assert "cuda-bindings can't be imported" in note
    assert sum("keeps its size" in record.getMessage() for record in caplog.records) == 1
    assert engine.info.kv_most_bytes is None and engine.set_kv_limit(0) == engine.info.kv_cache_bytes
    ask(engine, 1)
    assert len(drain(engine)["1"]) == 200


def test_how_long_moves_take() -> None:
    pool = make_pool(10_000, count=32)
    pool.keep_all_but(range(16, 10_000))
    for gib in (1, 4, 16):
        blocks = gib * GIB // pool.block_bytes
        began = time.perf_counter()
        pool.keep_all_but(range(16 + blocks, 10_000))
        torch.cuda.synchronize()
        grown = time.perf_counter() - began
        began = time.perf_counter()
        pool.keep_all_but(range(16, 10_000))
        shrunk = time.perf_counter() - began
        Console().print(f"\n{gib} GiB: mapped in {1e3 * grown:.1f} ms, given back in {1e3 * shrunk:.1f} ms")
        assert grown < gib and shrunk < gib, "slower than reading the model again"


def _other_process(told: Connection) -> None:
    """Take nearly all that is free, and say how much; a message later give it back; again, and end."""
    from memory_efficient_gpt.kv_cache.cuda_driver import load_driver as load

    driver = load(torch.device("cuda", 0))
    told.send("ready")
    while (wanted := told.recv()) is not None:
        handles: list[Any] = []
        try:
            handles.extend(driver.create() for _ in range(wanted // driver.granule_bytes))
        except RuntimeError as error:
            told.send(str(error))
        else:
            told.send("taken")
        told.recv()
        for handle in handles:
            driver.release(handle)
        told.send("released")
    told.close()


def test_another_process_takes_what_was_given_back_and_gives_it_back_again() -> None:
    ours, theirs = multiprocessing.Pipe()
    other = multiprocessing.get_context("spawn").Process(target=_other_process, args=(theirs,))
    other.start()
    theirs.close()  # so that its end is noticed here
    try:
        assert ours.poll(90) and ours.recv() == "ready"
        room = (free_bytes() - 2 * GIB) // GRANULES * GRANULES
        pool = make_pool(room // (GRANULES // 16))
        pool.keep_all_but(())
        part = room // 2
        ours.send(part)
        assert ours.recv().endswith("CUDA_ERROR_OUT_OF_MEMORY"), "it is ours"
        ours.send("release")
        assert ours.recv() == "released"
        kept = pool.num_blocks // 3
        pool.caches[0].key[:kept] = 4.0
        pool.keep_all_but(range(kept, pool.num_blocks))
        ours.send(part)
        assert ours.recv() == "taken"
        with pytest.raises(PoolMemoryError, match="OUT_OF_MEMORY"):
            pool.keep_all_but(())
        ours.send("release")
        assert ours.recv() == "released"
        pool.keep_all_but(())
        assert (pool.caches[0].key[:kept] == 4.0).all() and not pool.caches[0].key[kept + 16 :].any()
        ours.send(None)
    finally:
        other.join(30)
        if other.is_alive():
            other.kill()
    assert other.exitcode == 0

"""Engines that sleep: what they give back, and that they are themselves again afterwards."""

from __future__ import annotations

import gc
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from memory_efficient_gpt.config import EngineConfig
from memory_efficient_gpt.core import Engine
from memory_efficient_gpt.errors import OverloadedError
from memory_efficient_gpt.parking import ParkedStorages, device_storages, held_tensors
from memory_efficient_gpt.request import Request, SamplingParams

linux_only = pytest.mark.skipif(sys.platform != "linux", reason="gives pages back by madvise")
SHAPE: dict[str, Any] = dict(
    vocab_size=96, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=512, initializer_range=0.3, tie_word_embeddings=True,
)  # fmt: skip


def random_engine(**options: Any) -> Engine:
    """Around a small random model, in memory that is no file's."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model: Any = LlamaForCausalLM(LlamaConfig(**SHAPE)).bfloat16().eval()
    options = {"num_kv_blocks": 400, "debug_checks": True} | options
    return Engine.from_model(model, EngineConfig(model="random", **options))


def demo_engine(**options: Any) -> Engine:
    return Engine.load(EngineConfig(model="demo", num_kv_blocks=2000, num_threads=1, **options))


def run(
    engine: Engine, *prompts: tuple[int, ...], max_tokens: int = 12
) -> list[tuple[list[int], list[float]]]:
    """Greedy tokens and their log probabilities, to the last bit."""
    told: dict[str, tuple[list[int], list[float]]] = {str(n): ([], []) for n in range(len(prompts))}
    for number, prompt in enumerate(prompts):
        params = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True, logprobs=1)
        engine.submit(Request(id=str(number), prompt_token_ids=prompt, params=params))
    while engine.has_work:
        for event in engine.step():
            assert event.error is None
            told[event.request_id][0].extend(event.token_ids)
            told[event.request_id][1].extend(entry.logprob for entry in event.logprobs or ())
    return list(told.values())


PROMPTS = tuple(range(5, 60)), (7, 8, 9), tuple(range(90, 40, -1))


def resident_bytes(kind: str) -> int:
    """RssAnon or RssFile of this process."""
    (line,) = [x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(f"{kind}:")]
    return int(line.split()[1]) * 1024


@pytest.mark.parametrize("options", [{}, {"quantization": "int4-g64"}, {"tier": "C"}], ids=str)
def test_an_engine_computes_the_same_after_its_sleep(options: dict[str, Any]) -> None:
    engine = demo_engine(**options)
    before = run(engine, *PROMPTS)
    report = engine.sleep()
    assert report.parked_bytes == report.device_bytes == 0, "weights are on the host"
    asleep = engine.asleep
    engine.wake()
    assert (asleep, engine.asleep) == (True, False)
    assert run(engine, *PROMPTS) == before


def test_the_prefix_cache_is_lost_and_all_blocks_are_free() -> None:
    engine = random_engine()
    run(engine, *PROMPTS)
    assert engine.stats().num_cached_blocks > 0
    engine.sleep()
    assert engine.stats().num_cached_blocks == 0 and engine.stats().num_free_blocks == 400
    engine.wake()
    hits = engine.stats().prefix_hits_tokens
    run(engine, *PROMPTS)
    assert engine.stats().prefix_hits_tokens == hits, "a block was found whose content is gone"
    engine._scheduler.check_integrity()


def test_only_an_idle_engine_sleeps_and_a_sleeping_one_takes_no_request() -> None:
    engine = random_engine()
    request = Request(id="r", prompt_token_ids=(5, 6), params=SamplingParams(max_tokens=3))
    engine.submit(request)
    with pytest.raises(OverloadedError, match="has work"):
        engine.sleep()
    engine.step()
    engine.abort("r")
    assert not engine.has_work
    report = engine.sleep()
    assert engine.sleep() == report, "twice is once"
    with pytest.raises(OverloadedError, match="sleeps; call wake"):
        engine.submit(request)
    engine.wake()
    engine.wake()
    engine.submit(request)


@linux_only
def test_an_elastic_cache_tells_what_it_had_and_wakes_with_the_limit_it_was_told_asleep() -> None:
    fixed = random_engine()
    before = run(fixed, *PROMPTS)
    engine = random_engine(num_kv_blocks=100, kv_reserve_bytes=fixed.info.kv_cache_bytes)
    block_bytes = fixed.info.kv_cache_bytes // 401
    assert run(engine, *PROMPTS) == before
    assert 0 < engine.sleep().kv_bytes <= 101 * block_bytes, "more than it could have"
    told = [engine.set_kv_limit(blocks * block_bytes) for blocks in (301, 51)]
    assert told == [301 * block_bytes, 51 * block_bytes]
    engine.wake()
    assert engine.stats().num_kv_blocks == engine.stats().num_free_blocks == 50
    assert run(engine, *PROMPTS) == before
    assert engine.sleep().kv_bytes <= 51 * block_bytes


@linux_only
def test_the_kv_cache_really_leaves_memory() -> None:
    engine = random_engine(num_kv_blocks=20_000, max_num_seqs=64)
    for cache in engine._sleepable._pool.caches:  # type: ignore[union-attr]
        cache.key.fill_(1.0)
        cache.value.fill_(1.0)
    before = resident_bytes("RssAnon")
    report = engine.sleep()
    assert report.kv_bytes > 0.99 * engine.info.kv_cache_bytes > 50e6
    assert before - resident_bytes("RssAnon") > 0.95 * report.kv_bytes
    assert float(engine._sleepable._pool.caches[0].key[9].abs().max()) == 0.0  # type: ignore[union-attr]


@linux_only
def test_weights_that_are_their_files_pages_leave_memory_and_come_back() -> None:
    engine = demo_engine()
    before = run(engine, *PROMPTS)
    resident = resident_bytes("RssFile")
    report = engine.sleep()
    assert 0.9 * engine.info.weights_bytes < report.dropped_bytes
    assert resident - resident_bytes("RssFile") > 0.9 * report.dropped_bytes
    engine.wake()
    assert run(engine, *PROMPTS) == before


@linux_only
def test_weights_that_were_changed_after_their_file_was_mapped_stay() -> None:
    engine = demo_engine()
    weight = next(iter(engine._sleepable._model.parameters()))
    with torch.no_grad():
        weight.add_(1.0)
    changed = weight.clone()
    assert engine.sleep().dropped_bytes == 0
    assert torch.equal(weight, changed)


# ---- parked weights, with the host in the place of a GPU


def park(engine: Engine) -> ParkedStorages:
    model = engine._sleepable
    assert model._pool is not None
    return ParkedStorages(
        device_storages(model._model, torch.device("cpu"), without=model._pool.tensors())
    )  # fmt: skip


@pytest.mark.parametrize(
    "quantization", [None, "int4-g64", "int8", "int4-asym-g64", "fp8", "bnb-nf4-dq", "bnb-int8"]
)
@pytest.mark.parametrize("native", [True, False], ids=["packed", "stored"])
def test_parked_weights_take_nothing_and_are_the_same_tensors_afterwards(
    quantization: str | None, native: bool, tmp_path: Path
) -> None:
    if quantization is not None and quantization.startswith("bnb"):
        pytest.importorskip("bitsandbytes")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForCausalLM(LlamaConfig(**SHAPE)).bfloat16().save_pretrained(tmp_path)
    engine = Engine.load(
        EngineConfig(model=str(tmp_path), num_kv_blocks=60, quantization=quantization, native_kernels=native)
    )
    model = engine._sleepable._model
    for tensor in list(held_tensors(model)):  # as on a GPU: no file's pages, which can't be resized
        if not tensor.untyped_storage().resizable():
            tensor.data = tensor.data.clone()
    before = run(engine, *PROMPTS)
    engine._runner.forget_addresses()  # as before each sleep
    pool = engine._sleepable._pool
    assert pool is not None
    tensors = [t for t in held_tensors(model) if all(t is not other for other in pool.tensors())]
    sizes = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}
    parked = park(engine)
    assert parked.num_bytes == sum(sizes.values()) >= engine.info.weights_bytes
    assert all(t.untyped_storage().nbytes() == 0 for t in tensors)
    parked.restore()
    assert parked.num_bytes == 0
    again = [t for t in held_tensors(model) if all(t is not other for other in pool.tensors())]
    assert list(map(id, again)) == list(map(id, tensors)), "a tensor was replaced"
    assert {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in again} == sizes
    assert run(engine, *PROMPTS) == before


@pytest.mark.parametrize("quantization", [None, "int4-g64", "int8"])
def test_no_tensor_of_an_engine_is_overlooked(quantization: str | None) -> None:
    gc.collect()
    earlier = {t.untyped_storage()._cdata for t in _all_tensors()}
    engine = demo_engine(quantization=quantization)
    run(engine, *PROMPTS)
    engine._runner.forget_addresses()  # as before each sleep
    gc.collect()
    sleepable = engine._sleepable
    assert sleepable._pool is not None
    known = {s._cdata for s in device_storages(sleepable._model, torch.device("cpu"))}
    known |= {t.untyped_storage()._cdata for t in sleepable._pool.tensors()}
    lost = [
        t.untyped_storage().nbytes()
        for t in _all_tensors()
        if t.untyped_storage()._cdata not in known | earlier and t.device.type == "cpu"
    ]
    assert sum(lost) < 40_000, f"tensors that would stay on the device: {sorted(lost)[-5:]}"


def _all_tensors() -> list[torch.Tensor]:
    return [thing for thing in gc.get_objects() if type(thing) in (torch.Tensor, torch.nn.Parameter)]


def test_a_host_without_room_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = random_engine()
    before = run(engine, *PROMPTS)

    def refuse(*_: object, **__: object) -> None:
        raise MemoryError

    monkeypatch.setattr("memory_efficient_gpt.parking.np.empty", refuse)
    with pytest.raises(MemoryError):
        park(engine)
    monkeypatch.undo()
    assert run(engine, *PROMPTS) == before

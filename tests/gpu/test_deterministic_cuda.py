"""`deterministic` on a CUDA device: the same bits alone, in a batch, in chunks and from the prefix cache."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from memory_efficient_gpt.assembly import DETERMINISTIC_NOTE
from memory_efficient_gpt.attention.context import StepContext
from memory_efficient_gpt.attention.torch_backend import TorchBackend
from memory_efficient_gpt.attention.triton import TritonBackend
from memory_efficient_gpt.config import EngineConfig
from memory_efficient_gpt.core import Engine
from memory_efficient_gpt.errors import ConfigError
from memory_efficient_gpt.quantization.layers import find_layers
from memory_efficient_gpt.quantization.model import quantize_model
from memory_efficient_gpt.quantization.plans import uniform_plan
from memory_efficient_gpt.quantization.rounding import quantize_weight
from memory_efficient_gpt.quantization.scheme import parse_scheme
from memory_efficient_gpt.quantization.triton_weights import pack_for_triton
from memory_efficient_gpt.request import Request, SamplingParams, TokenLogprob
from tests.engine.attention.oracle import PagedStep, Shape, make_step
from tests.engine.attention.test_torch_backend import FEATURES, options_for
from tests.gpu.test_triton_attention import on_device

pytestmark = pytest.mark.gpu

VOCAB = 512
SHAPE: dict[str, Any] = dict(
    vocab_size=VOCAB, hidden_size=256, intermediate_size=384, num_hidden_layers=3, num_attention_heads=8,
    num_key_value_heads=2, max_position_embeddings=2048, initializer_range=0.08, bos_token_id=1,
    eos_token_id=2, pad_token_id=0,
)  # fmt: skip
ROWS = (1, 2, 7, 8, 9, 16, 17, 31, 33, 64, 65, 129, 300)
ALONE = 16
"""Of 64 requests those that are computed alone, too."""
Output = tuple[list[int], list[TokenLogprob]]


def random_model(kind: str) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if kind == "llama":
            return LlamaForCausalLM(LlamaConfig(**SHAPE))
        if kind == "qwen3":
            return Qwen3ForCausalLM(Qwen3Config(**SHAPE, head_dim=32))
        if kind == "mixtral":
            return MixtralForCausalLM(MixtralConfig(**SHAPE, num_local_experts=4))
        return Gemma3ForCausalLM(Gemma3TextConfig(**SHAPE, head_dim=32, sliding_window=64))


def make_engine(kind: str, scheme: str | None = None, **options: Any) -> Engine:
    model = random_model(kind).to("cuda", torch.bfloat16).eval()
    if scheme is not None:
        quantize_model(model, uniform_plan(find_layers(model), parse_scheme(scheme)))
    settings: dict[str, Any] = dict(
        model=kind, device="cuda", deterministic=True, max_num_seqs=64, num_kv_blocks=400, max_model_len=1024
    )
    return Engine.from_model(model, EngineConfig(**(settings | options)))


def requests(count: int) -> list[Request]:
    """Greedy and drawn, some with logprobs; some prompts begin alike for more than two blocks."""
    rng = random.Random(0)
    beginning = tuple(rng.randint(3, VOCAB - 1) for _ in range(150))
    made = []
    for number in range(count):
        own = tuple(rng.randint(3, VOCAB - 1) for _ in range(rng.choice((1, 5, 30, 140, 300))))
        sampling: dict[str, Any] = rng.choice(
            [dict(temperature=0.0), dict(temperature=1.0, seed=number), dict(top_p=0.9, seed=number)]
        )
        params = SamplingParams(
            max_tokens=rng.choice((8, 16, 90)), ignore_eos=True, logprobs=number % 3 or None, **sampling
        )
        prompt = beginning[: rng.choice((0, 0, 130, 150))] + own
        made.append(Request(id=str(number), prompt_token_ids=prompt, params=params))
    return made


def run(engine: Engine, asked: list[Request]) -> dict[str, Output]:
    outputs: dict[str, Output] = {request.id: ([], []) for request in asked}
    for request in asked:
        engine.submit(request)
    while engine.has_work:
        for event in engine.step():
            assert event.error is None
            outputs[event.request_id][0].extend(event.token_ids)
            outputs[event.request_id][1].extend(event.logprobs or ())
    return outputs


CASES = [
    *[(kind, None, "auto") for kind in ("llama", "qwen3", "gemma3")],
    *[("llama", scheme, "auto") for scheme in ("int4-g128", "int4-asym-g64", "int8", "fp8", "fp8-dynamic")],
    ("qwen3", "int4-g128", "int8"),
    ("llama", None, "fp8"),
]


@pytest.mark.parametrize(("kind", "scheme", "kv"), CASES, ids=str)
def test_a_request_gives_the_same_bits_however_it_is_computed(kind: str, scheme: str | None, kv: Any) -> None:
    asked = requests(64)
    base: dict[str, Any] = dict(kv_cache_dtype=kv)
    engine = make_engine(kind, scheme, **base, prefix_cache=False, cuda_graphs=False)
    assert DETERMINISTIC_NOTE in engine.info.notes
    alone = {name: output for each in asked[:ALONE] for name, output in run(engine, [each]).items()}
    engine.close()
    ways: dict[str, dict[str, Any]] = {
        "in a batch": dict(cuda_graphs=False),
        "in a batch, captured": dict(),
        "in small chunks": dict(max_batched_tokens=37),
        "preempted": dict(num_kv_blocks=24, max_batched_tokens=256),
    }
    for way, options in ways.items():
        engine = make_engine(kind, scheme, **(base | options))
        for time in ("first", "second, from the prefix cache and by graphs"):
            got = run(engine, asked)
            assert {name: got[name] for name in alone} == alone, (way, time)
        assert engine.stats().prefix_hits_tokens > 0
        assert way != "preempted" or engine.stats().num_preemptions > 0
        engine.close()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("shape", [(96, 136), (4096, 1024), (300, 2048), (130, 4112)])
def test_a_rows_dense_product_does_not_depend_on_the_number_of_rows(
    dtype: torch.dtype, shape: tuple[int, int]
) -> None:
    from memory_efficient_gpt.triton_kernels.dense import Scales, few_rows_linear, takes

    outputs, inputs = shape[0], shape[1] // 16 * 16
    weight = torch.randn(outputs, inputs, device="cuda").to(dtype)
    x = torch.randn(ROWS[-1], inputs, device="cuda").to(dtype)
    assert takes(ROWS[-1], weight, deterministic=True)
    scales, result = None, dtype
    if dtype is torch.float8_e4m3fn:
        scales = Scales(torch.rand(ROWS[-1], device="cuda") + 0.5, torch.rand(outputs, device="cuda") + 0.5)
        result = torch.bfloat16
    bias = torch.randn(outputs, device="cuda", dtype=result)

    def product(rows: int) -> torch.Tensor:
        own = Scales(scales.rows[-rows:].contiguous(), scales.outputs) if scales is not None else None
        return few_rows_linear(x[-rows:], weight, bias, scales=own, dtype=result, deterministic=True)

    whole = product(ROWS[-1])
    want = x.double() @ weight.double().t()
    if scales is not None:
        want = want * scales.rows.double()[:, None] * scales.outputs.double()
    want += bias.double()
    assert float((whole.double() - want).norm() / want.norm()) < 6e-3
    for rows in ROWS:
        assert torch.equal(product(rows), whole[-rows:]), rows


@pytest.mark.parametrize("name", ["int4-g128", "int4-g32", "int4-asym-g64", "int8", "int8-asym", "fp8"])
@pytest.mark.parametrize("shape", [(256, 1024), (4224, 640)])
def test_a_rows_quantized_product_does_not_depend_on_the_number_of_rows(
    name: str, shape: tuple[int, int]
) -> None:
    from memory_efficient_gpt.triton_kernels.linear import quantized_linear

    outputs, inputs = shape
    weight = quantize_weight(torch.randn(outputs, inputs, device="cuda") * 0.05, parse_scheme(name))
    packed = replace(pack_for_triton(weight), deterministic=True)
    x = torch.randn(ROWS[-1], inputs, device="cuda", dtype=torch.bfloat16)
    bias = torch.randn(outputs, device="cuda", dtype=torch.bfloat16)
    whole = quantized_linear(x, packed, bias)
    want = x.float() @ weight.dequantize().float().t() + bias.float()
    assert float((whole.float() - want).norm() / want.norm()) < 1e-2
    for rows in ROWS:
        assert torch.equal(quantized_linear(x[-rows:], packed, bias), whole[-rows:]), rows


def part(step: PagedStep, row: int, start: int, count: int, backend: TritonBackend) -> StepContext:
    """Tokens start .. start + count of a step's row, by themselves."""
    whole = step.context
    length = int(whole.query_starts[row + 1] - whole.query_starts[row])
    seen = int(whole.context_lens[row]) - length + start + count
    return StepContext(
        backend, whole.slots, whole.block_tables[row : row + 1],
        torch.tensor([0, count], dtype=torch.int32, device="cuda"),
        torch.tensor([seen], dtype=torch.int32, device="cuda"), count, seen, [count], [seen],
    )  # fmt: skip


ATTENTION = [
    *[((8, 2), feature, cache) for feature in FEATURES for cache in (torch.bfloat16, torch.int8)],
    *[((8, 2), "everything", cache) for cache in (torch.float8_e4m3fn, torch.float32)],
    *[(heads, "plain", torch.bfloat16) for heads in ((4, 4), (40, 1), (71, 1))],
    ((71, 1), "plain", torch.int8),
]


@pytest.mark.parametrize(("heads", "feature", "cache"), ATTENTION, ids=str)
def test_a_prompts_token_has_the_bits_of_a_decoding_row(
    heads: tuple[int, int], feature: str, cache: torch.dtype
) -> None:
    backend = TritonBackend(deterministic=True)
    dtype = torch.float32 if cache is torch.float32 else torch.bfloat16
    shape = Shape(*heads, key_dim=64, value_dim=64)
    step = make_step(
        TorchBackend(), [1, 150, 1, 40], [300, 460, 1, 4120], shape=shape, dtype=dtype, cache_dtype=cache,
        block_size=64,
    )  # fmt: skip  # 4,096: longer splits from there on
    options = options_for(feature, heads[0])
    on_device(step)
    for name in ("sinks", "alibi_slopes"):
        if (tensor := getattr(options, name)) is not None:
            object.__setattr__(options, name, tensor.cuda())
    together = step.run(backend, options)
    for row, first, length in ((1, 1, 150), (3, 152, 40)):
        for cut in (1, 7, 64):
            for start in range(0, length, cut):
                count = min(cut, length - start)
                query = step.query[first + start : first + start + count]
                got = backend.attend(query, step.cache, part(step, row, start, count, backend), options)
                assert torch.equal(got, together[first + start : first + start + count]), (row, cut, start)


@pytest.mark.parametrize(
    ("options", "cause"),
    [
        ({"dtype": torch.float32}, r"\d+ linear layers"),
        ({"kind": "mixtral"}, r"\d+ MixtralTopKRouter layers .*; \d+ layers of routed experts"),
    ],
    ids=str,
)
def test_what_can_not_keep_it_is_refused_with_the_cause(options: dict[str, Any], cause: str) -> None:
    model = random_model(options.get("kind", "llama")).to("cuda", options.get("dtype", torch.bfloat16)).eval()
    config = EngineConfig(model="m", device="cuda", deterministic=True, num_kv_blocks=60)
    with pytest.raises(ConfigError, match=f"can't be deterministic on cuda: {cause}"):
        Engine.from_model(model, config)


def test_a_model_that_was_merged_for_speed_is_refused() -> None:
    model = random_model("qwen3").to("cuda", torch.bfloat16).eval()
    config = EngineConfig(model="m", device="cuda", num_kv_blocks=60)
    Engine.from_model(model, config).close()
    with pytest.raises(ConfigError, match="merged for speed"):
        Engine.from_model(model, EngineConfig(model="m", device="cuda", num_kv_blocks=60, deterministic=True))

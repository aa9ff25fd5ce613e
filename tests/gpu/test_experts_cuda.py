"""Routed experts on a GPU: against float64, for every tile, captured, and in whole models."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from memory_efficient_gpt.config import EngineConfig
from memory_efficient_gpt.core import Engine
from memory_efficient_gpt.quantization.rounding import quantize_weight
from memory_efficient_gpt.quantization.scheme import parse_scheme
from memory_efficient_gpt.quantization.triton_weights import pack_for_triton
from memory_efficient_gpt.request import Request, SamplingParams
from tests.engine.architectures.configs import CASES
from tests.engine.triton_kernels import routed_reference

pytestmark = pytest.mark.gpu

SHAPES = [(4, 2, 80, 48), (8, 2, 256, 384), (16, 8, 128, 40), (128, 8, 64, 96), (5, 1, 300, 72)]
"""Experts, choices, hidden and inner size."""
TOKENS = (1, 2, 7, 33, 130, 300)
TOLERANCES = {torch.float32: 2e-6, torch.bfloat16: 1.2e-2, torch.float16: 1.6e-3}
"""Of the norm: roundings of two products, of the gate and of the weighted ones."""
SCHEMES = [
    "int4", "int4-g64", "int4-g128", "int4-channel", "int4-asym-g32", "int4-asym-g128", "int4-asym-channel",
    "int8", "int8-g64", "int8-asym", "int8-asym-g64", "fp8",
]  # fmt: skip


def kernels() -> Any:
    from memory_efficient_gpt.triton_kernels import experts

    return experts


def drawn(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(*shape, generator=generator, device="cuda").to(dtype)


def chosen(tokens: int, experts: int, choices: int) -> torch.Tensor:
    generator = torch.Generator("cuda").manual_seed(tokens)
    return torch.rand(tokens, experts, generator=generator, device="cuda").topk(choices).indices


def shares(tokens: int, choices: int, dtype: torch.dtype) -> torch.Tensor:
    return drawn(tokens, choices, seed=tokens).softmax(-1).to(dtype)


def weights(experts: int, hidden: int, inner: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    return (
        drawn(experts, 2 * inner, hidden, seed=1, dtype=dtype) / hidden**0.5,
        drawn(experts, hidden, inner, seed=2, dtype=dtype) / inner**0.5,
    )


def distance(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm())


def expected(x: torch.Tensor, *arguments: Any) -> torch.Tensor:
    """As the plain reference has it, without its last rounding."""
    stacks = [routed_reference.Stack(s.weight, s.num_experts, s.bias) for s in arguments[2:4]]
    gate = arguments[4]
    plain = routed_reference.Gate(gate.activation, gate.interleaved, gate.limit, gate.alpha)
    index, given = arguments[:2]
    return routed_reference.routed_mlp(x.double(), index, given, stacks[0], stacks[1], plain)


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_float_experts_give_what_the_reference_gives(
    shape: tuple[int, int, int, int], dtype: torch.dtype
) -> None:
    experts, choices, hidden, inner = shape
    k = kernels()
    gate_up, down = (k.Stack(w, experts) for w in weights(experts, hidden, inner, dtype))
    for tokens in TOKENS:
        x = drawn(tokens, hidden, seed=3, dtype=dtype)
        routing = chosen(tokens, experts, choices), shares(tokens, choices, dtype)
        got = k.routed_mlp(x, *routing, gate_up, down, k.Gate())
        assert got.dtype is dtype
        assert distance(got, expected(x, *routing, gate_up, down, k.Gate())) < TOLERANCES[dtype], tokens


@pytest.mark.parametrize("name", SCHEMES)
def test_quantized_experts_give_what_their_dequantized_weights_give(name: str) -> None:
    k = kernels()
    for experts, choices, hidden, inner in (SHAPES[1], SHAPES[4]):
        stacks = []
        for weight in weights(experts, hidden, inner, torch.float32):
            stored = quantize_weight(weight.flatten(0, 1), parse_scheme(name), rounding="nearest")
            stacks.append(k.Stack(pack_for_triton(stored), experts))
        for dtype in (torch.bfloat16, torch.float16):
            for tokens in TOKENS if dtype is torch.bfloat16 else (7, 300):
                x = drawn(tokens, hidden, seed=3, dtype=dtype)
                routing = chosen(tokens, experts, choices), shares(tokens, choices, dtype)
                got = k.routed_mlp(x, *routing, *stacks, k.Gate())
                want = expected(x, *routing, *stacks, k.Gate())
                assert distance(got, want) < TOLERANCES[dtype], (experts, tokens, dtype)


@pytest.mark.parametrize("table", ["FLOAT_TILES", "QUANTIZED_TILES"])
def test_every_tile_gives_what_the_reference_gives_for_any_number_of_tokens(table: str) -> None:
    from memory_efficient_gpt.triton_kernels import expert_tiles

    k, (experts, choices, hidden, inner) = kernels(), SHAPES[1]
    stacks = [k.Stack(w, experts) for w in weights(experts, hidden, inner, torch.bfloat16)]
    if table == "QUANTIZED_TILES":
        scheme = parse_scheme("int4-g64")
        stored = [quantize_weight(s.weight.float().flatten(0, 1), scheme, rounding="nearest") for s in stacks]
        stacks = [k.Stack(pack_for_triton(weight), experts) for weight in stored]
    for tile in getattr(expert_tiles, table).values():
        for tokens in (1, 2, 40, 200):
            x = drawn(tokens, hidden, seed=3, dtype=torch.bfloat16)
            routing = chosen(tokens, experts, choices), shares(tokens, choices, torch.float32)
            got = k.routed_mlp(x, *routing, *stacks, k.Gate(), tiles=(tile, tile))
            want = expected(x, *routing, *stacks, k.Gate())
            assert distance(got, want) < TOLERANCES[torch.bfloat16], (tile, tokens)


def test_one_expert_may_get_all_tokens_and_some_choices_may_be_none() -> None:
    k, experts, hidden, inner = kernels(), 8, 128, 64
    stacks = [k.Stack(w, experts) for w in weights(experts, hidden, inner, torch.float32)]
    for tokens in (1, 9, 200):
        x, given = drawn(tokens, hidden, seed=3), shares(tokens, 2, torch.float32)
        for index in (
            torch.tensor([[5, 2]], device="cuda").expand(tokens, 2),
            torch.tensor([[experts, 3]], device="cuda").expand(tokens, 2),
            torch.full((tokens, 2), experts, device="cuda"),
        ):
            got = k.routed_mlp(x, index, given, *stacks, k.Gate())
            want = expected(x, index, given, *stacks, k.Gate())
            assert float((got.double() - want).abs().max()) < 1e-5


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_biases_limits_and_interleaved_transposed_weights(dtype: torch.dtype) -> None:
    k, experts, hidden, inner = kernels(), 4, 96, 80
    gate_up = drawn(experts, hidden, 2 * inner, seed=1, dtype=dtype) / hidden**0.5
    down = drawn(experts, inner, hidden, seed=2, dtype=dtype) / inner**0.5
    biases = drawn(experts, 2 * inner, seed=4, dtype=dtype), drawn(experts, hidden, seed=5, dtype=dtype)
    stacks = k.Stack(gate_up.mT, experts, biases[0]), k.Stack(down.mT, experts, biases[1])
    gate = k.Gate("sigmoid", interleaved=True, limit=1.0, alpha=1.702)
    for tokens in TOKENS:
        x = drawn(tokens, hidden, seed=3, dtype=dtype)
        routing = chosen(tokens, experts, 2), shares(tokens, 2, dtype)
        got = k.routed_mlp(x, *routing, *stacks, gate)
        assert distance(got, expected(x, *routing, *stacks, gate)) < TOLERANCES[dtype], tokens


@pytest.mark.parametrize("quantized", [False, True])
def test_a_row_gives_the_same_bits_whatever_its_neighbours_are(quantized: bool) -> None:
    k, (experts, choices, hidden, inner) = kernels(), SHAPES[1]
    stacks = [k.Stack(w, experts) for w in weights(experts, hidden, inner, torch.bfloat16)]
    if quantized:
        scheme = parse_scheme("int4")
        stored = [quantize_weight(s.weight.float().flatten(0, 1), scheme, rounding="nearest") for s in stacks]
        stacks = [k.Stack(pack_for_triton(weight), experts) for weight in stored]
    for tokens in (2, 33, 130):
        x, other = (drawn(tokens, hidden, seed=s, dtype=torch.bfloat16) for s in (3, 9))
        index, others = chosen(tokens, experts, choices), chosen(tokens + 1, experts, choices)[1:].clone()
        given = shares(tokens, choices, torch.bfloat16)
        got = k.routed_mlp(x, index, given, *stacks, k.Gate())
        other[0], others[0] = x[-1], index[-1]  # in another place, among others
        moved = given.clone()
        moved[0] = given[-1]
        assert torch.equal(k.routed_mlp(other, others, moved, *stacks, k.Gate())[0], got[-1])
        assert torch.equal(k.routed_mlp(x, index, given, *stacks, k.Gate()), got)


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
@pytest.mark.parametrize("tokens", [1, 6, 100])
def test_a_captured_step_routes_new_tokens_and_nothing_waits_for_the_device(tokens: int) -> None:
    k, (experts, choices, hidden, inner) = kernels(), SHAPES[1]
    stacks = [k.Stack(w, experts) for w in weights(experts, hidden, inner, torch.bfloat16)]
    x, given = drawn(tokens, hidden, seed=3, dtype=torch.bfloat16), shares(tokens, choices, torch.float32)
    index = chosen(tokens, experts, choices)
    k.routed_mlp(x, index, given, *stacks, k.Gate())
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = k.routed_mlp(x, index, given, *stacks, k.Gate())
    for seed in (5, 6):
        x.copy_(drawn(tokens, hidden, seed=seed))
        index.copy_(chosen(tokens + seed, experts, choices)[:tokens])
        graph.replay()
        want = expected(x, index, given, *stacks, k.Gate())
        assert distance(out, want) < TOLERANCES[torch.bfloat16]
    torch.cuda.set_sync_debug_mode("error")
    try:
        k.routed_mlp(x, index, given, *stacks, k.Gate())
    finally:
        torch.cuda.set_sync_debug_mode("default")


MODELS = ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "gpt_oss", "glm4_moe")


def run(engine: Engine) -> dict[str, list[int]]:
    rng, tokens = random.Random(0), dict[str, list[int]]()
    for number in range(6):
        prompt = tuple(rng.randint(2, 60) for _ in range(5 + 13 * number))
        params = SamplingParams(temperature=0.0, max_tokens=16, ignore_eos=True)
        engine.submit(Request(id=str(number), prompt_token_ids=prompt, params=params))
    while engine.has_work:
        for event in engine.step():
            assert event.error is None
            tokens.setdefault(event.request_id, []).extend(event.token_ids)
    return tokens


def make_engine(name: str, device: str, **options: Any) -> Engine:
    model = torch.nn.Module.to(CASES[name].model(), device)
    config = EngineConfig(model=name, num_kv_blocks=80, block_size=16, debug_checks=True, **options)
    return Engine.from_model(model, config)


@pytest.mark.parametrize("name", MODELS)
def test_a_captured_model_gives_the_tokens_of_the_cpu(name: str) -> None:
    want = run(make_engine(name, "cpu", native_kernels=False))
    engine = make_engine(name, "cuda", max_batched_tokens=64)
    notes = "\n".join(engine.info.notes)
    assert engine.info.tier == "A" and "CUDA graphs" in engine.info.notes, notes
    assert " experts" in notes, notes
    assert not any("experts" in note.partition("kept torch for")[2] for note in engine.info.notes), notes
    assert run(engine) == want
    assert run(engine) == want  # by graphs that the first run has captured


@pytest.mark.parametrize("scheme", ["int4", "int8"])
def test_a_quantized_mixture_is_captured(scheme: str) -> None:
    from memory_efficient_gpt.fusion.apply import fuse
    from memory_efficient_gpt.quantization.layers import find_layers
    from memory_efficient_gpt.quantization.model import quantize_model
    from memory_efficient_gpt.quantization.plans import uniform_plan

    model: Any = torch.nn.Module.to(CASES["qwen3_moe"].model(), "cuda", torch.bfloat16)
    quantize_model(model, uniform_plan(find_layers(model), parse_scheme(scheme)))
    ids = torch.arange(2, 40, device="cuda").view(1, -1)
    with torch.no_grad():
        want = model(ids).logits.float()
        report = fuse(model)
        got = model(ids).logits.float()
    kept = [kind for kind, _ in report.dropped if kind in ("experts", "quantized")]
    assert report.replaced["experts"] and not kept, report.summary()
    assert float((got - want).norm() / want.norm()) < 0.05
    config = EngineConfig(model="m", num_kv_blocks=80, block_size=16, prefix_cache=False)
    engine = Engine.from_model(model, config)
    assert engine.info.tier == "A", engine.info.notes
    assert run(engine) == run(engine)

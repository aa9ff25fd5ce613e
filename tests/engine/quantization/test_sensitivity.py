"""Sensitivity: the measured is the real divergence, groups are whole, and weights come back bit for bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional

from memory_efficient_gpt.quantization import sensitivity
from memory_efficient_gpt.quantization.calibration import logits_of, second_moments
from memory_efficient_gpt.quantization.groups import LayerGroup, bits_range, group_layers
from memory_efficient_gpt.quantization.layers import find_layers
from memory_efficient_gpt.quantization.model import quantize_model
from memory_efficient_gpt.quantization.plans import bits_per_weight, pins, uniform_plan
from memory_efficient_gpt.quantization.rounding import quantize_weight
from memory_efficient_gpt.quantization.scheme import INT4, INT8, UNQUANTIZED, parse_scheme
from memory_efficient_gpt.quantization.sensitivity import (
    Quantizer,
    Reference,
    Sensitivity,
    measure,
    replaced_weights,
)
from tests.engine.quantization.test_model import tiny

IDS = (torch.arange(96).view(6, 16) * 7) % 99
COARSE = parse_scheme("int4-g128")
OPTIONS = (COARSE, INT4, INT8)


def groups_of(model: Any, **options: Any) -> dict[str, LayerGroup]:
    return {group.name: group for group in group_layers(find_layers(model), **options)}


def kl(model: Any, before: torch.Tensor) -> float:
    """Nats per token, in float64."""
    want, got = before.double().log_softmax(-1), logits_of(model, IDS).double().log_softmax(-1)
    return float((want.exp() * (want - got)).sum(-1).mean())


def test_layers_that_kernels_fuse_are_one_group() -> None:
    groups = groups_of(tiny("llama"))
    assert list(groups)[:5] == [
        "model.embed_tokens",
        "model.layers.0.self_attn.q_proj+k_proj+v_proj",
        "model.layers.0.self_attn.o_proj",
        "model.layers.0.mlp.gate_proj+up_proj",
        "model.layers.0.mlp.down_proj",
    ]
    assert len(groups) == 2 + 2 * 4
    assert len(groups_of(tiny("llama"), tied=False)) == 16
    assert "model.layers.0.mlp.experts.gate_up_proj" in groups_of(tiny("mixtral"))
    assert all(len(group.layers) == 1 for group in groups_of(tiny("gpt2")).values())


@pytest.mark.parametrize("name", ["llama-tied", "gpt2", "mixtral"])
def test_every_layer_is_in_one_group_whose_bits_are_those_of_the_plan(name: str) -> None:
    layers = find_layers(tiny(name))
    groups = group_layers(layers)
    assert sorted(layer.name for group in groups for layer in group.layers) == sorted(x.name for x in layers)
    least, most = bits_range(groups, OPTIONS)
    plans = [{layer.name: scheme for layer in layers} for scheme in (COARSE, INT8)]
    assert [least, most] == pytest.approx([bits_per_weight(layers, plan) for plan in plans])


def test_a_pin_takes_its_layers_out_of_their_group() -> None:
    layers = find_layers(tiny("llama"))
    groups = {
        g.name: g for g in group_layers(layers, pins(layers, {"*.v_proj": INT8, "lm_head": UNQUANTIZED}))
    }
    assert groups["model.layers.1.self_attn.q_proj+k_proj"].schemes(OPTIONS) == OPTIONS
    assert groups["model.layers.1.self_attn.v_proj"].schemes(OPTIONS) == (INT8,)
    assert groups["lm_head"].schemes(OPTIONS) == (UNQUANTIZED,)


def test_the_divergence_is_that_of_all_predictions(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("llama")
    before = logits_of(model, IDS)
    reference = Reference(model, IDS)
    assert (reference.num_tokens, reference.divergence()) == (96, 0.0)
    monkeypatch.setattr(sensitivity, "LOGIT_BYTES_AT_ONCE", 1)
    one_by_one = Reference(model, IDS)
    assert len(one_by_one.batches) == 6
    quantize_model(model, uniform_plan(find_layers(model), INT4))
    assert reference.divergence() == pytest.approx(kl(model, before), rel=1e-3)
    assert one_by_one.divergence() == pytest.approx(kl(model, before), rel=1e-3)


def test_predictions_kept_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("llama")
    assert Reference(model, IDS, most_tokens=40).num_tokens == 32
    assert Reference(model, IDS, most_tokens=1).num_tokens == 16, "one text at least"
    monkeypatch.setattr(sensitivity, "REFERENCE_BYTES", 3 * 16 * 99 * 4)
    assert Reference(model, IDS).num_tokens == 48


@pytest.mark.parametrize("name", ["llama-tied", "gpt2", "mixtral", "gpt_oss"])
def test_measuring_a_group_is_quantizing_it(name: str) -> None:
    """For every layer: also a tied, a transposed and a stacked one."""
    model = tiny(name)
    before = logits_of(model, IDS)
    for measured in measure(Reference(model, IDS), group_layers(find_layers(model)), (COARSE,)):
        changed = tiny(name)
        quantize_model(changed, {layer.name: COARSE for layer in measured.group.layers})
        want = kl(changed, before)
        assert measured.candidates[0].divergence == pytest.approx(want, rel=0.01, abs=1e-7), (
            measured.group.name
        )
        assert want > 1e-6


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["llama-tied", "gpt2", "mixtral"])
def test_weights_come_back_bit_for_bit(name: str, dtype: torch.dtype, exact: bool) -> None:
    model = tiny(name, dtype)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    measure(Reference(model, IDS), group_layers(find_layers(model)), OPTIONS, exact=exact)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(after[key], tensor) for key, tensor in before.items())
    if name == "llama-tied":
        assert model.lm_head.weight is model.model.embed_tokens.weight


def test_weights_come_back_when_measuring_is_interrupted(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("llama")
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    reference = Reference(model, IDS)

    def interrupted() -> float:
        raise KeyboardInterrupt

    monkeypatch.setattr(reference, "divergence", interrupted)
    with pytest.raises(KeyboardInterrupt):
        measure(reference, group_layers(find_layers(model)), OPTIONS)
    assert all(torch.equal(model.state_dict()[key], tensor) for key, tensor in before.items())


def test_replaced_weights_are_what_the_model_computes_with() -> None:
    model = tiny("gpt2")
    layer = next(layer for layer in find_layers(model) if layer.name.endswith("c_fc"))
    with replaced_weights([layer], [torch.zeros(layer.shape)]):
        assert not model.transformer.h[0].mlp.c_fc.weight.any()
        assert layer.weight().shape == layer.shape
    assert model.transformer.h[0].mlp.c_fc.weight.any()


def test_errors_are_weighted_by_importance() -> None:
    model = tiny("llama")
    layer = next(layer for layer in find_layers(model) if layer.name.endswith("up_proj"))
    importance = torch.linspace(0.1, 5.0, 64)
    _, error, square = Quantizer(importances={layer.name: importance})(layer, INT4)
    weight = layer.weight().double()
    wrong = quantize_weight(layer.weight(), INT4, importance=importance).dequantize(torch.float64) - weight
    assert error == pytest.approx(float((wrong.square() * importance).sum()), rel=1e-4)
    assert square == pytest.approx(float((weight.square() * importance).sum()), rel=1e-4)


def by_scheme(measured: Sensitivity) -> dict[Any, Any]:
    return {candidate.scheme: candidate for candidate in measured.candidates}


def test_one_measurement_is_carried_over_by_errors_and_exact_ones_agree() -> None:
    model = tiny("llama-tied")
    quantizer = Quantizer(importances=second_moments(model, IDS))
    reference, groups = Reference(model, IDS), group_layers(find_layers(model))
    cheap = measure(reference, groups, OPTIONS, quantizer)
    exact = measure(reference, groups, OPTIONS, quantizer, exact=True)
    for one, all_of_them in zip(cheap, exact, strict=True):
        scaled, real = by_scheme(one), by_scheme(all_of_them)
        assert scaled[COARSE].divergence == real[COARSE].divergence, "the coarsest is measured either way"
        assert one.per_error == pytest.approx(scaled[COARSE].divergence / scaled[COARSE].error)
        for scheme in (INT4, INT8):
            assert scaled[scheme].error < scaled[COARSE].error
            assert scaled[scheme].divergence == pytest.approx(one.per_error * scaled[scheme].error)
            assert scaled[scheme].divergence / real[scheme].divergence == pytest.approx(1.0, abs=0.6)
    total = [sum(by_scheme(m)[INT4].divergence for m in each) for each in (cheap, exact)]
    assert total[0] == pytest.approx(total[1], rel=0.15), "over all groups, chance evens out"


def test_what_is_not_quantized_costs_nothing_and_is_not_measured() -> None:
    model = tiny("llama")
    groups = group_layers(find_layers(model), {"lm_head": UNQUANTIZED})
    head = measure(Reference(model, IDS), groups, OPTIONS)[-1]
    assert head.group.name == "lm_head" and head.per_error is None
    assert [(c.scheme, c.bits, c.error, c.divergence) for c in head.candidates] == [
        (UNQUANTIZED, 16 * 99 * 64, 0.0, 0.0)
    ]
    mixed = measure(Reference(model, IDS), groups, (INT4, UNQUANTIZED))[0]
    assert by_scheme(mixed)[UNQUANTIZED].divergence == 0.0 < by_scheme(mixed)[INT4].divergence


def test_the_sum_over_groups_predicts_what_all_of_them_do_together() -> None:
    model = tiny("llama")
    before = logits_of(model, IDS)
    measured = measure(Reference(model, IDS), group_layers(find_layers(model)), (INT4,))
    predicted = sum(m.candidates[0].divergence for m in measured)
    quantize_model(model, {layer.name: INT4 for layer in find_layers(model)})
    assert predicted == pytest.approx(kl(model, before), rel=0.3)


def test_progress_names_groups() -> None:
    model = tiny("llama")
    told: list[tuple[str, float]] = []
    groups = group_layers(find_layers(model))
    measure(Reference(model, IDS), groups, OPTIONS, progress=lambda what, share: told.append((what, share)))
    assert [what for what, _ in told] == [group.name for group in groups]
    assert [share for _, share in told] == [number / len(groups) for number in range(len(groups))]


def test_kl_is_torchs() -> None:
    """The direct computation that these tests compare with."""
    model = tiny("llama")
    before = logits_of(model, IDS)
    with torch.no_grad():
        model.lm_head.weight.mul_(1.1)
    got, want = logits_of(model, IDS).log_softmax(-1), before.log_softmax(-1)
    total = functional.kl_div(got, want, reduction="sum", log_target=True)
    assert kl(model, before) == pytest.approx(float(total) / 96, rel=1e-4)

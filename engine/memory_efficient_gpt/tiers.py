"""Which way a model is served: packed through the paged cache, or alone through transformers' own.

Purpose: prove at load time, on a small clone with random weights, that packed execution of an architecture
is right; or say why not.
Does not know: the checkpoint's weights, devices, requests.
Invariant: fail closed. Whatever raises, differs or is unknown gives tier C, which is slower and always right.

    tier B   packed steps, paged attention       tier C   one sequence at a time, transformers' cache
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal

import torch

from memory_efficient_gpt import tier_proofs
from memory_efficient_gpt.errors import UnsupportedModelError
from memory_efficient_gpt.kv_cache.geometry import LayerKV, causal_model_class, probe_geometry
from memory_efficient_gpt.kv_cache.host_reads import rope_length_limit
from memory_efficient_gpt.tier_probe.packed_replay import (
    TOLERANCE,
    NotCausalError,
    PlainRun,
    packed_error,
    plain_run,
    randomize,
)
from memory_efficient_gpt.tier_probe.small_clone import small_clones

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

logger = logging.getLogger(__name__)

MAX_CLONE_PARAMETERS: Final = 40_000_000
_SEEDS: Final = (0, 1)
"""A second draw of weights is tried when the first differs: a router's near tie may fall either way."""

_RECURRENT_KINDS: Final = frozenset(
    ("linear_attention", "mamba", "mamba2", "recurrent", "conv", "hybrid", "hybrid_sliding")
)

Tier = Literal["A", "B", "C"]
"""A is B with CUDA graphs: for the device to find out (assembly.py), not for the probe."""


@dataclass(frozen=True, slots=True)
class TierDecision:
    """How a model is served, and why.

    layers: the KV geometry, for tier B. max_model_len: positions up to which the decision holds; None: all.
    notes: what a user should know beyond the reason. error: the probe's largest relative difference.
    """

    tier: Tier
    reason: str
    layers: list[LayerKV] | None = None
    max_model_len: int | None = None
    notes: tuple[str, ...] = ()
    error: float | None = None


def decide_tier(
    config: PreTrainedConfig,
    *,
    forced: Tier | None = None,
    max_model_len: int | None = None,
    remembers: bool = False,
) -> TierDecision:
    """The best tier for the architecture that `config` describes; takes about a second, reads no weights.

    forced: "C" skips the probe; "B" makes a failed probe an error. max_model_len: the context length asked
    for; one beyond what tier B can do exactly (see `TierDecision.max_model_len`) gives tier C. remembers:
    whether a proof of another process will do (see tier_proofs.py): not for a model that may have code of its
    own. `config` and the state of torch's random numbers are left as they are.
    Raises UnsupportedModelError for models that do not generate text from left to right, and when tier B is
    forced in vain.
    """
    causal_model_class(config)
    if forced == "C":
        return TierDecision("C", "tier C was asked for")
    decision = _probe(config, max_model_len, remembers=remembers)
    logger.info("%s: tier %s: %s", type(config).__name__, decision.tier, decision.reason)
    if forced == "B" and decision.tier != "B":
        raise UnsupportedModelError(f"tier B was asked for, but {decision.reason}. Leave the tier open.")
    return decision


def _probe(config: PreTrainedConfig, max_model_len: int | None, *, remembers: bool) -> TierDecision:
    limit = rope_length_limit(config)
    if limit is not None and max_model_len is not None and max_model_len > limit:
        return TierDecision(
            "C",
            f"beyond {limit} positions this model's RoPE depends on each sequence's length, and "
            f"max_model_len is {max_model_len}: packed sequences would change each other",
        )
    recurrent = _recurrent_kinds(config)
    if recurrent:
        return TierDecision(
            "C", f"it has {recurrent} layers, whose state runs through all tokens of a packed row"
        )
    try:
        proof = _proof(config, remembers=remembers)
    except NotCausalError:
        raise
    except UnsupportedModelError as failure:
        _refuse_if_not_causal(config)
        return TierDecision("C", failure.message.rstrip("."))
    if not proof.error < TOLERANCE:
        reason = (
            f"packed execution differs from transformers' own by {proof.error:.1e} (limit {TOLERANCE:.0e})"
        )
        return TierDecision("C", reason, error=proof.error)
    notes: tuple[str, ...] = ()
    if limit is not None:
        notes = (
            f"context limited to {limit} tokens, where this model's RoPE does not depend on a sequence's "
            "length; set max_model_len to serve longer ones, one at a time",
        )
    return TierDecision(
        "B",
        f"packed execution equals transformers' own (relative error {proof.error:.1e})",
        proof.layers,
        limit,
        notes,
        proof.error,
    )


def _proof(config: PreTrainedConfig, *, remembers: bool) -> tier_proofs.Proof:
    """Of this process, or of one before. Raises UnsupportedModelError when there is none."""
    if remembers and (kept := tier_proofs.recall(config)) is not None:
        return kept
    proof = tier_proofs.Proof(probe_geometry(config), _packed_error(config))
    if remembers and proof.error < TOLERANCE:
        tier_proofs.keep(config, proof)
    return proof


def _recurrent_kinds(config: PreTrainedConfig) -> str:
    """Names of the config's layer kinds known to carry a state from token to token; "" for none.

    Only a shortcut to a clearer reason: the replay refuses the others.
    """
    text_config = config.get_text_config()
    kinds = [
        str(kind)
        for name in ("layer_types", "layers_block_type", "block_types")
        for kind in getattr(text_config, name, None) or ()
    ]
    return ", ".join(sorted(_RECURRENT_KINDS.intersection(kinds)))


def _packed_error(config: PreTrainedConfig) -> float:
    """The probe's error on a small clone. Raises UnsupportedModelError when it cannot be measured."""
    error = float("inf")
    for seed in _SEEDS:
        model, plain = _run_clone(config, seed)
        try:
            error = packed_error(model, probe_geometry(model.config), plain)
        except UnsupportedModelError:
            raise
        except Exception as failure:  # any model code may run here
            raise UnsupportedModelError(f"packed execution failed with {_describe(failure)}") from failure
        if error < TOLERANCE:
            break
    return error


def _refuse_if_not_causal(config: PreTrainedConfig) -> None:
    """Raises NotCausalError where a clone shows it; a model without a clone gets the benefit of the doubt."""
    try:
        _run_clone(config, _SEEDS[0])
    except NotCausalError:
        raise
    except UnsupportedModelError as error:
        logger.info("%s: causality was not checked: %s", type(config).__name__, error.message)


def _run_clone(config: PreTrainedConfig, seed: int) -> tuple[PreTrainedModel, PlainRun]:
    """The smallest clone that runs, and its plain run. Raises UnsupportedModelError when none does."""
    failure = ""
    for clone in small_clones(config):
        try:
            model = _build(clone, seed)
            return model, plain_run(model, clone.vocab_size)
        except NotCausalError:
            raise
        except Exception as error:  # noqa: BLE001  # this clone is impossible: the next one is shrunk less
            failure = failure or _describe(error)  # the smallest one's tells most
    raise UnsupportedModelError(f"no small clone of {type(config).__name__} could be run: {failure}")


def _build(config: PreTrainedConfig, seed: int) -> PreTrainedModel:
    """A float32 model with random weights on the CPU. Raises OverflowError if it would not be small."""
    from transformers import AutoModelForCausalLM

    from_config: Callable[..., PreTrainedModel] = AutoModelForCausalLM.from_config
    with torch.device("meta"):
        size = sum(p.numel() for p in from_config(copy.deepcopy(config)).parameters())
    if size > MAX_CLONE_PARAMETERS:
        raise OverflowError(f"{size:,} parameters are more than the limit of {MAX_CLONE_PARAMETERS:,}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = from_config(config, attn_implementation="eager", dtype=torch.float32)
    randomize(model, seed)
    return model


def _describe(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__

"""What `megpt top` knows at one moment, and what lies between two moments.

Purpose: one reading of a server, and rates from a pair of readings.
Does not know: how it is shown.
Invariant: a rate is never negative: a counter that fell (the server was started anew) counts from zero.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from memory_efficient_gpt_server.commands.variant_rows import summed

if TYPE_CHECKING:
    from prometheus_client.metrics_core import Metric

    from memory_efficient_gpt_server.commands.admin_client import AdminClient

PROMPT_TOKENS: Final = "megpt_prompt_tokens_total"
GENERATED_TOKENS: Final = "megpt_generation_tokens_total"
EVICTIONS: Final = "megpt_model_evictions_total"
MEMORY: Final = "megpt_memory_bytes"


@dataclass(frozen=True, slots=True)
class Reading:
    """at_s: of a monotonic clock. models: with all their variants added up. held_bytes: by model. tokens: by
    counter, model. evictions: by reason.
    """

    at_s: float
    models: list[dict[str, Any]]
    devices: Mapping[str, Mapping[str, int]]
    held_bytes: Mapping[str, float]
    tokens: Mapping[str, Mapping[str, float]]
    evictions: Mapping[str, float]

    @property
    def waiting(self) -> int:
        """Requests that wait for any model."""
        return sum(model["waiting"] for model in self.models)


def read(client: AdminClient, clock: Callable[[], float] = time.monotonic) -> Reading:
    """A reading of the server. Raises ServerRefusedError."""
    from prometheus_client.parser import text_string_to_metric_families

    models, devices, text = map(summed, client.models()), client.memory()["devices"], client.metrics()
    at_s = clock()
    families = list(text_string_to_metric_families(text))
    held = _sums(families, MEMORY, "model_name")
    tokens = {name: _sums(families, name, "model_name") for name in (PROMPT_TOKENS, GENERATED_TOKENS)}
    return Reading(at_s, list(models), devices, held, tokens, _sums(families, EVICTIONS, "reason"))


def per_second(before: Reading | None, now: Reading, counter: str, model_id: str) -> float | None:
    """Tokens a second of a model between two readings; None without an earlier one."""
    if before is None or now.at_s <= before.at_s:
        return None
    new, old = (reading.tokens[counter].get(model_id, 0.0) for reading in (now, before))
    return (new - old if new >= old else new) / (now.at_s - before.at_s)


def _sums(families: Iterable[Metric], name: str, label: str) -> dict[str, float]:
    sums: defaultdict[str, float] = defaultdict(float)
    for family in families:
        for sample in family.samples:
            if sample.name == name and label in sample.labels:
                sums[sample.labels[label]] += sample.value
    return dict(sums)

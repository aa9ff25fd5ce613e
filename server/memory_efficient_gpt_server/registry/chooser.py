"""From a wish to a variant whose checkpoint was looked at.

Purpose: choose by what is known of the model, and find out whether the chosen variant can be had at all.
Does not know: what is loaded, what fits.
Invariant: a variant that comes back has a provision, unless it is the model as configured.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping

from memory_efficient_gpt.errors import ConfigError, InvalidRequestError, UnsupportedModelError
from memory_efficient_gpt_server.errors import LoadFailedError
from memory_efficient_gpt_server.registry.choice import Wish, choose
from memory_efficient_gpt_server.registry.hosted import HostedModel
from memory_efficient_gpt_server.registry.planning import Candidate
from memory_efficient_gpt_server.registry.provisions import Provisions
from memory_efficient_gpt_server.registry.variants import VariantKey


class Chooser:
    """Chooses among the variants of `models` (by id)."""

    def __init__(self, models: Mapping[str, HostedModel], provisions: Provisions) -> None:
        self._models = models
        self._provisions = provisions

    async def choose(self, model: HostedModel, wish: Wish) -> VariantKey:
        """The variant of `model` that does what is wished for.

        Raises LoadFailedError if the checkpoint is unusable; InvalidRequestError for what is not allowed, or
        can't be done with this checkpoint on this device.
        """
        if not wish:
            return model.key
        facts = (await self._provisions.of(model.key)).facts
        key = choose(model.key, facts, model.choices, wish, self._others(model, wish))
        if key != model.key:
            await self._require_possible(key, wish)
        return key

    async def _require_possible(self, key: VariantKey, wish: Wish) -> None:
        try:
            facts = (await self._provisions.of(key)).facts
        except LoadFailedError as error:
            if not isinstance(error.__cause__, ConfigError | UnsupportedModelError):
                raise
            raise InvalidRequestError(error.message, param="optimizations") from error
        if not wish.fulfilled_by(facts):  # transformers' own cache, for one, has no type to choose
            raise InvalidRequestError(
                f"Model {key.model_id} can't be served as {wish}: it would be {facts}. Leave the field out.",
                param="optimizations",
            )

    async def candidates(self, keys: Iterable[VariantKey]) -> tuple[Candidate, ...]:
        """Those of the variants that can be had at all, for a plan."""
        found = []
        for key in keys:
            with contextlib.suppress(LoadFailedError):
                found.append(Candidate(str(key), key, (await self._provisions.of(key)).estimate))
        return tuple(found)

    def _others(self, model: HostedModel, wish: Wish) -> list[str]:
        """Models that would do as they are configured, of those that are known."""
        known = {other.id: self._provisions.known(other.key) for other in self._models.values()}
        return [i for i, p in known.items() if i != model.id and p is not None and wish.fulfilled_by(p.facts)]

"""The bodies that administrators send.

Purpose: one strict schema per body of /admin.
Does not know: models, the registry.
Invariant: as in schemas.py: every field is used, numbers are finite, nothing is coerced.
"""

from __future__ import annotations

from typing import Any, Final, Literal, Self

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from memory_efficient_gpt_server.schemas import LoadOptions, StrictModel

MOST_LOADS: Final = 64
"""Of one plan."""


class LoadBody(StrictModel):
    """Body of POST /admin/models/{id}/load. wait: whether the answer waits until the model is ready.

    optimizations: the variant, as requests choose it; None: the model as configured. So in all these bodies.
    evict: whether idle models may leave or sleep for it; never: it is refused if they would have to.
    """

    optimizations: LoadOptions | None = None
    wait: bool = False
    evict: Literal["auto", "never"] = "auto"


class SleepBody(StrictModel):
    """Body of POST /admin/models/{id}/sleep and /wake. wait: whether the answer waits until it is done."""

    optimizations: LoadOptions | None = None
    wait: bool = False


class UnloadBody(StrictModel):
    """Body of POST /admin/models/{id}/unload. deadline_s: for drain, seconds until requests are cut."""

    optimizations: LoadOptions | None = None
    mode: Literal["drain", "abort", "if_idle"] = "drain"
    deadline_s: float | None = Field(None, ge=0)
    wait: bool = False

    @model_validator(mode="after")
    def _check_deadline(self) -> Self:
        if self.deadline_s is not None and self.mode != "drain":
            text = "deadline_s is only for mode drain; leave it out."
            raise PydanticCustomError("sentence", "{text}", {"text": text, "param": "deadline_s"})
        return self


class PlannedLoadBody(StrictModel):
    """One of several loads of a plan."""

    model: str
    optimizations: LoadOptions | None = None


class PlanBody(StrictModel):
    """Body of POST /admin/plan: one `model`, with its `optimizations`, or several `loads` together."""

    model: str | None = None
    optimizations: LoadOptions | None = None
    loads: tuple[PlannedLoadBody, ...] | None = Field(None, strict=False, min_length=1, max_length=MOST_LOADS)

    @model_validator(mode="after")
    def _check_which(self) -> Self:
        text, param = "", "loads"
        if self.model is None and self.loads is None:
            text, param = "model is required, or loads.", "model"
        elif self.loads is not None and (self.model is not None or self.optimizations is not None):
            other = "optimizations" if self.model is None else "model"
            text = f"loads is instead of model and optimizations. Leave {other} out, or put it into loads."
        if text:
            raise PydanticCustomError("sentence", "{text}", {"text": text, "param": param})
        return self


class PatchModelBody(StrictModel):
    """Body of PATCH /admin/models/{id}: what is to change; the rest stays. Times in seconds.

    pinned: whether it stays loaded once it is. ttl_s: idle seconds after which it is unloaded; null: never.
    min_residency_s: seconds after a load in which it is not evicted for others. priority: greater ones are
    loaded first and evicted last. kv_soft_limit_bytes: KV cache that it keeps when others want some, and
    begins with when it is loaded next; null: what it was loaded with. kv_hard_limit_bytes: most that its KV
    cache may have; null: no limit of its own.
    """

    pinned: bool = False
    ttl_s: float | None = Field(None, gt=0)
    min_residency_s: float = Field(0.0, ge=0)
    priority: int = Field(0, ge=-(1 << 31), lt=1 << 31)
    kv_soft_limit_bytes: int | None = Field(None, ge=1, lt=1 << 62)
    kv_hard_limit_bytes: int | None = Field(None, ge=1, lt=1 << 62)

    @model_validator(mode="after")
    def _check_any(self) -> Self:
        if not self.model_fields_set:
            text = f"Nothing is to change. Give at least one of {', '.join(type(self).model_fields)}."
            raise PydanticCustomError("sentence", "{text}", {"text": text})
        return self

    @property
    def settings(self) -> dict[str, Any]:
        """Those that were given."""
        return {name: getattr(self, name) for name in self.model_fields_set}


class PatchMemoryBody(StrictModel):
    """Body of PATCH /admin/memory: a device of GET /admin/memory, and what models may take there."""

    device: str
    budget_bytes: int = Field(ge=1, lt=1 << 62)

"""The bodies that administrators send.

Purpose: one strict schema per body of /admin.
Does not know: models, the registry.
Invariant: as in schemas.py: every field is used, numbers are finite, nothing is coerced.
"""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from memory_efficient_gpt_server.schemas import LoadOptions, StrictModel


class LoadBody(StrictModel):
    """Body of POST /admin/models/{id}/load. wait: whether the answer waits until the model is ready.

    optimizations: the variant, as requests choose it; None: the model as configured. So in all these bodies.
    """

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


class PlanBody(StrictModel):
    """Body of POST /admin/plan."""

    model: str
    optimizations: LoadOptions | None = None

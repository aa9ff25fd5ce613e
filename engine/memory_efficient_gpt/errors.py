"""Every error a user of the library or the server can meet.

Purpose: one tree of exceptions, each with a stable machine-readable `code`.
Does not know: HTTP. The server maps these classes to statuses in one table.
Invariant: a message says what is wrong, the limit, the value and the remedy.

    MegptError
     +-- InvalidRequestError          a field of a request is wrong
     |    +-- ContextLengthError      prompt + max_tokens does not fit the model or its cache
     +-- ConfigError                  settings are wrong; lists every problem at once
     +-- ModelNotFoundError           no such model here
     +-- ModelLoadError               a model cannot be loaded
     |    +-- CheckpointError         a file of the checkpoint is missing or damaged
     |    +-- UnsupportedModelError   the architecture (or an option for it) is not supported
     +-- OverloadedError              full, draining or starting: try again later
     +-- EngineFailedError            the engine died or a step failed
     +-- SamplingFailedError          the model produced no usable logits for this request
"""

from __future__ import annotations

from collections.abc import Sequence


class MegptError(Exception):
    """Base of all errors that users meet. `code` is stable; `param` names the offending field."""

    code = "internal_error"

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param


class InvalidRequestError(MegptError):
    """A field of a request has a wrong type, value or combination."""

    code = "invalid_value"


class ContextLengthError(InvalidRequestError):
    """The request needs more positions than the model or its cache has."""

    code = "context_length_exceeded"


class ConfigError(MegptError):
    """Settings are wrong. `problems` holds one sentence for each, all of them at once."""

    code = "invalid_config"

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = tuple(problems)


class ModelNotFoundError(MegptError):
    """No model of that name is known here."""

    code = "model_not_found"


class ModelLoadError(MegptError):
    """A model cannot be loaded."""

    code = "model_load_failed"


class CheckpointError(ModelLoadError):
    """A checkpoint file is missing, truncated or does not match the config."""

    code = "invalid_checkpoint"


class UnsupportedModelError(ModelLoadError):
    """The architecture, or an option for it, is not supported."""

    code = "unsupported_model"


class OverloadedError(MegptError):
    """No room now; `retry_after_s` says when to try again."""

    code = "overloaded"

    def __init__(self, message: str, *, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class EngineFailedError(MegptError):
    """The engine (or its worker process) stopped while the request was aboard."""

    code = "engine_failed"


class SamplingFailedError(MegptError):
    """The model gave NaN or infinite logits for this request; nothing else in the batch is affected."""

    code = "sampling_failed"

"""A language model in little memory, for those who know transformers.

Purpose: one object around an ordinary transformers model: quantized, called as usual, generating text; and
the two functions that give it flash attention and the paged KV cache where they work.
Does not know: HTTP, worker processes, how weights are quantized.
Invariant: outside of `generate`, `model.model` is a module as transformers made it, with other weights; the
paged cache holds it only while it generates.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, SupportsIndex, Unpack, cast, overload

import torch

from memory_efficient_gpt.api import Completion
from memory_efficient_gpt.assembly import cpu_kernels
from memory_efficient_gpt.attention.flash import use_flash
from memory_efficient_gpt.choice import Choice
from memory_efficient_gpt.config import EngineConfig
from memory_efficient_gpt.engine_info import EngineInfo
from memory_efficient_gpt.errors import InvalidRequestError
from memory_efficient_gpt.fusion.apply import fuse
from memory_efficient_gpt.generation_options import GenerationOptions
from memory_efficient_gpt.id_batches import appended, check_ids, padding_mask, without_padding
from memory_efficient_gpt.lent_module import LentModule
from memory_efficient_gpt.progress import load_bar
from memory_efficient_gpt.quantization.checkpoint import save_quantized
from memory_efficient_gpt.quantization.folders import written_whole
from memory_efficient_gpt.quantization.model import QuantizationReport, present_schemes
from memory_efficient_gpt.quantization.own_saving import save_as_stored
from memory_efficient_gpt.quantization.rounding import Rounding
from memory_efficient_gpt.quantization.scheme import UNQUANTIZED, Scheme
from memory_efficient_gpt.quantization.wishes import wish
from memory_efficient_gpt.quantized_loading import engine_config, load, load_tokenizer, quantize
from memory_efficient_gpt.tokenizer import Tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


class QuantizedModel:
    """A transformers model whose weights take few bits. Made by `from_pretrained` or `from_model`.

    model: the transformers module; report: what quantizing did to its bytes.

    >>> model = QuantizedModel.from_pretrained("demo", bits=4)
    >>> model.generate("Hello, I am a language model.", max_new_tokens=40)
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: Tokenizer | None,
        report: QuantizationReport,
        config: EngineConfig,
        folder: Path | None = None,
    ) -> None:
        self.model = model
        self.report = report
        save_as_stored(model)
        self._lent = LentModule(model, tokenizer, config, folder)
        if present_schemes(model) and cpu_kernels(config, model.device) is not None:
            fuse(model)  # at once, so that calls give the same before and after the paged cache is asked for

    def __reduce_ex__(self, protocol: SupportsIndex) -> Any:
        """Raises TypeError: what generates holds memory, and compiled code, of this process."""
        raise TypeError(
            "a QuantizedModel can't be copied or pickled. Copy its `model` (copy.deepcopy) and give it to "
            "QuantizedModel.from_model, or save it with save_pretrained(folder)."
        )

    @classmethod
    def from_pretrained(
        cls,
        name: str | os.PathLike[str],
        *,
        bits: int | None = None,
        scheme: str | None = None,
        dtype: str | torch.dtype = "auto",
        device: str = "auto",
        rounding: Rounding = "search",
        rules: Mapping[str, str | Scheme] | None = None,
        progress: bool = True,
        **config: Any,
    ) -> QuantizedModel:
        """Load a bundled model's name, a Hugging Face folder, or a hub id, and quantize it.

        bits: 4, 8, or 16 for none; scheme: a name such as "int4-g128" instead. Without both: 4 bits, or what
        the folder has if it is quantized. rules: pattern of layer names -> scheme, before the others.
        config: EngineConfig's other fields, for generating.
        Raises ConfigError, ModelNotFoundError, CheckpointError or UnsupportedModelError.
        """
        wanted = wish(bits, scheme, rounding, rules)
        settings = engine_config(os.fspath(name), config, dtype=dtype, device=device)
        with load_bar(settings.model) if progress else nullcontext() as bar:
            model, folder, report = load(settings, wanted, bar)
        return cls(model, load_tokenizer(folder), report, settings, folder)

    @classmethod
    def from_model(
        cls,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | Tokenizer | None = None,
        *,
        bits: int | None = None,
        scheme: str | None = None,
        rounding: Rounding = "search",
        rules: Mapping[str, str | Scheme] | None = None,
        **config: Any,
    ) -> QuantizedModel:
        """Around a transformers model that is loaded already; quantizing changes it in place.

        Its weights stay as they are unless `bits`, `scheme` or `rules` say otherwise; see `from_pretrained`.
        """
        _require_transformers(model)
        wanted = wish(bits, scheme, rounding, rules)
        name = model.name_or_path or type(model).__name__
        settings = engine_config(name, config, device=str(model.device))
        report = quantize(model, wanted, settings, default=UNQUANTIZED)
        wrapped = tokenizer if isinstance(tokenizer, Tokenizer | None) else Tokenizer(tokenizer)
        return cls(model, wrapped, report, settings)

    def __repr__(self) -> str:
        report, info = self.report, self.info
        return (
            f"<QuantizedModel {info.model!r}: {info.architecture}, {info.quantization or 'not quantized'}, "
            f"{report.bytes_before / 1e6:,.1f} MB became {report.bytes_after / 1e6:,.1f} MB "
            f"({report.saved:.0%} saved), {info.dtype} on {info.device}>"
        )

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        """The transformers tokenizer; None if the model came without one."""
        tokenizer = self._lent.tokenizer
        return tokenizer.wrapped if tokenizer is not None else None

    @property
    def info(self) -> EngineInfo:
        """How `generate` runs the model. Raises what building an engine raises, if the module was changed."""
        self._lent.follow_changes()
        return self._lent.info

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The transformers module's own output, for ids `[B, T]` and its other arguments."""
        return self.model(*args, **kwargs)

    __call__ = forward

    @overload
    def generate(self, inputs: str, **options: Unpack[GenerationOptions]) -> str: ...
    @overload
    def generate(
        self, inputs: list[str] | tuple[str, ...], **options: Unpack[GenerationOptions]
    ) -> list[str]: ...
    @overload
    def generate(
        self,
        inputs: torch.Tensor | None = None,
        *,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        **options: Unpack[GenerationOptions],
    ) -> torch.Tensor: ...
    def generate(
        self,
        inputs: str | list[str] | tuple[str, ...] | torch.Tensor | None = None,
        *,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        **options: Unpack[GenerationOptions],
    ) -> str | list[str] | torch.Tensor:
        """Continue a text (returns a text), several (a list), or token ids `[B, T]` (ids `[B, T + new]`).

        What is returned begins with what was given, as in transformers. Padding of ids is recognised by
        `attention_mask`, else by the padding token. options: see `GenerationOptions`.
        Raises InvalidRequestError naming the option, ContextLengthError when the context is too short.
        """
        if inputs is not None and input_ids is not None:
            raise InvalidRequestError("inputs and input_ids were given; give one.", param="input_ids")
        given = inputs if inputs is not None else input_ids
        if isinstance(given, torch.Tensor):
            return self._continue_ids(given, attention_mask, options)
        texts = [given] if isinstance(given, str) else given
        if not isinstance(texts, list | tuple) or not all(isinstance(text, str) for text in texts):
            raise InvalidRequestError(
                f"generate takes a text, several, or a tensor of token ids, got {type(given).__name__}.",
                param="inputs",
            )
        if attention_mask is not None:
            raise InvalidRequestError("attention_mask is for token ids, not text.", param="attention_mask")
        completions = self._complete(self._lent.encode(texts), options)
        results = [text + done.text for text, done in zip(texts, completions, strict=True)]
        return results[0] if isinstance(given, str) else results

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write weights as they are stored, config and tokenizer; `from_pretrained(folder)` loads them back.

        Raises ConfigError if the folder is a file or holds something already, MegptError if it can't be
        written.
        """
        target, source, model = Path(folder), self._lent.folder, cast(Any, self.model)
        model.config.dtype = model.dtype
        if not present_schemes(model):
            with written_whole(target) as place:
                for part in filter(None, (model, self.tokenizer)):
                    part.save_pretrained(place)
            return
        companions = () if source is not None else filter(None, (model.generation_config, self.tokenizer))
        save_quantized(model, target, source=source, companions=tuple(companions))

    def _continue_ids(
        self, ids: torch.Tensor, mask: torch.Tensor | None, options: GenerationOptions
    ) -> torch.Tensor:
        check_ids(ids, mask)
        pad = self._pad_token_id()
        if mask is None:
            mask = padding_mask(ids, pad, self._lent.info.eos_token_ids)
        completions = self._complete(without_padding(ids, mask), options)
        choices = [completion.choices[0] for completion in completions]
        new = [[*c.token_ids, *([c.stop] if isinstance(c.stop, int) else [])] for c in choices]
        return appended(ids, new, pad if pad is not None else next(iter(self._lent.info.eos_token_ids), 0))

    def _complete(self, prompts: list[list[int]], options: GenerationOptions) -> list[Completion]:
        if not all(prompts):
            raise InvalidRequestError("a prompt is empty; give at least one token.", param="inputs")
        return self._lent.complete(prompts, options)

    def _pad_token_id(self) -> int | None:
        sources = (getattr(self.model, "generation_config", None), self.model.config.get_text_config())
        named = (getattr(source, "pad_token_id", None) for source in sources)
        return next((token_id for token_id in named if isinstance(token_id, int)), None)


def use_flash_attention_if_available(model: QuantizedModel | PreTrainedModel) -> Choice:
    """Let the model compute attention with the best flash kernel that works; says which, or why none does.

    Changes the model's attention implementation. With the paged KV cache, `generate` has attention of its
    own, which the answer is about; calls of the module take what was chosen here.
    """
    module = model.model if isinstance(model, QuantizedModel) else _require_transformers(model)
    choice = use_flash(module)
    if isinstance(model, QuantizedModel) and model._lent.is_paged:
        name = model.info.attention_backend
        note = next((note for note in model.info.notes if note.startswith("attention by")), name)
        choice = Choice(name, name != "torch", f"{note} in generate; outside of it {choice}")
    logger.info("flash attention: %s", choice)
    return choice


def use_paged_kv_cache_if_available(model: QuantizedModel | PreTrainedModel) -> Choice:
    """Let `generate` keep keys and values in pages and compute lists of texts together, if that is right.

    A test on a small clone of the architecture decides. The weights are not copied, and the module stays
    usable by itself. Raises ConfigError when the settings don't fit the model or the memory.
    """
    if isinstance(model, QuantizedModel):
        choice = model._lent.use_paged_kv_cache()
    else:
        _require_transformers(model)
        choice = Choice(
            "transformers",
            False,
            f"generate of {type(model).__name__} is transformers' own, with a cache of its own; wrap the "
            "model: QuantizedModel.from_model(model, tokenizer)",
        )
    logger.info("paged KV cache: %s", choice)
    return choice


def _require_transformers(model: object) -> PreTrainedModel:
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        raise InvalidRequestError(
            f"model must be a QuantizedModel or a transformers model, got {type(model).__name__}.",
            param="model",
        )
    return model

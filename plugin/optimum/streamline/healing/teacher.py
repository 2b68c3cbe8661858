"""The outputs of the original that distillation trains towards, and their cache on disk.

The original gives the same outputs in every pass over the text and in every trial training. With a cache it runs on
each window once. The cache holds all logits, or for large vocabularies some tokens of each next-token distribution.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from optimum.streamline.errors import StreamlineError
from optimum.streamline.models.architectures import architecture_of, decoder_layers, layer_output
from optimum.streamline.recipe.recipe import Recipe
from optimum.streamline.system.distributed import is_main, wait_for_all
from optimum.streamline.text.windows import Windows

from .settings import distillation_weights

LIMIT = 4 * 2**30
"""The size in bytes up to which all outputs are cached by default."""
CACHE_FOLDER = "original"
"""The folder of the cache in that of the training checkpoints."""

Layers = dict[int, torch.Tensor]
"""The raw outputs `[windows, length, width]` of layers, before any final norm, by layer number."""


class Target(Protocol):
    """The next-token distributions of the original, or what is known of them."""

    def divergence(self, logits: torch.Tensor) -> torch.Tensor:
        """KL(original || model) in nats per token, the mean over all tokens: a scalar with gradient.

        Args:
            logits: The model's logits `[windows, length, vocabulary]`.
        """


@dataclass(frozen=True)
class AllLogits:
    """All logits `[windows, length, vocabulary]` of the original, so that the divergence is exact."""

    logits: torch.Tensor

    def divergence(self, logits: torch.Tensor) -> torch.Tensor:
        """As `Target.divergence`."""
        log_target, log_model = self.logits.log_softmax(-1).flatten(0, 1), logits.log_softmax(-1).flatten(0, 1)
        return nn.functional.kl_div(log_model, log_target, reduction="batchmean", log_target=True)


@dataclass(frozen=True)
class TopTokens:
    """The most probable tokens of each distribution. All other tokens count as one.

    The divergence is that of the distributions over these tokens and the rest, which is never larger than the exact
    one. It tells nothing about the tokens of the rest.

    Args:
        tokens: Token ids `[windows, length, tokens]`.
        log_probabilities: Their log-probabilities, of the same shape, in nats.
    """

    tokens: torch.Tensor
    log_probabilities: torch.Tensor

    def divergence(self, logits: torch.Tensor) -> torch.Tensor:
        """As `Target.divergence`."""
        whole = logits.logsumexp(-1)
        named = self._terms(self.log_probabilities, logits.gather(-1, self.tokens) - whole[..., None]).sum(-1)
        rest = (1 - self.log_probabilities.exp().sum(-1)).clamp(min=0)
        others = logits.scatter(-1, self.tokens, -torch.inf).logsumexp(-1) - whole
        return (named + self._terms(rest.log(), others)).mean()

    @staticmethod
    def _terms(log_target: torch.Tensor, log_model: torch.Tensor) -> torch.Tensor:
        # A probability of zero adds zero. Its logarithm would make the gradient nan, so it is replaced first.
        zero = log_target.isneginf()
        return log_target.exp() * (log_target.masked_fill(zero, 0) - log_model.masked_fill(zero, 0))


@dataclass(frozen=True)
class SampledTokens:
    """Tokens drawn from each distribution with replacement, which estimate the divergence without bias.

    Source: random sampling distillation (Anshumann et al., arXiv 2503.16870).

    Args:
        tokens: Token ids `[windows, length, draws]`.
        entropy: The entropy of each distribution `[windows, length]`, in nats.
    """

    tokens: torch.Tensor
    entropy: torch.Tensor

    def divergence(self, logits: torch.Tensor) -> torch.Tensor:
        """As `Target.divergence`; single values can be below zero."""
        drawn = logits.gather(-1, self.tokens) - logits.logsumexp(-1, keepdim=True)
        return (-drawn.mean(-1) - self.entropy).mean()


def logits_of(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    """The logits `[windows, length, vocabulary]` of token ids `[windows, length]`, in fp32."""
    logits: torch.Tensor = model(input_ids=ids, use_cache=False).logits
    return logits.float()


@contextmanager
def layer_outputs(model: PreTrainedModel, numbers: Sequence[int]) -> Iterator[Layers]:
    """Yield a dictionary that a forward pass in the block fills with the raw outputs of layers `numbers`."""
    outputs: Layers = {}
    layers = decoder_layers(model, architecture_of(model.config))

    def keep(number: int) -> Callable[..., None]:
        return lambda _, args, output: outputs.update({number: layer_output(output)})

    hooks = [layers[number].register_forward_hook(keep(number)) for number in dict.fromkeys(numbers)]
    try:
        yield outputs
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def outputs_of(model: PreTrainedModel, ids: torch.Tensor, numbers: Sequence[int]) -> tuple[Target, Layers]:
    """The distributions of token ids `[windows, length]`, and the outputs of layers `numbers`."""
    with layer_outputs(model, numbers) as states:
        return AllLogits(logits_of(model, ids)), states


@dataclass(frozen=True)
class CacheForm:
    """What a cache holds of each next-token distribution.

    Args:
        kind: All logits, the most probable tokens, or drawn tokens.
        tokens: The number of tokens of a distribution; 0 for all.
    """

    kind: Literal["full", "top", "sample"]
    tokens: int = 0

    @classmethod
    def parse(cls, value: str) -> CacheForm | None:
        """The form that a value of `heal_cache` names; `None` for `none`."""
        if value == "none":
            return None
        kind, _, tokens = value.partition("-")
        return cls(kind, int(tokens or 0))  # type: ignore[arg-type]  # the recipe has checked the value

    def arrays(self, text: Windows, config: PreTrainedConfig, hidden: bool) -> dict[str, Array]:
        """The shapes and types of the arrays of a cache, by name. `done` says of which windows it has the outputs."""
        windows, length = text.ids.shape
        token = (windows, length)
        arrays = {"done": Array((windows,), "|b1")}
        if self.kind == "full":
            arrays["logits"] = Array((*token, config.vocab_size), "<f4")
        else:
            arrays["tokens"] = Array((*token, self.tokens), "<i4")
        if self.kind == "top":
            arrays["log_probabilities"] = Array((*token, self.tokens), "<f4")
        if self.kind == "sample":
            arrays["entropy"] = Array(token, "<f4")
        if hidden:
            arrays["hidden"] = Array((windows, config.num_hidden_layers, length, config.hidden_size), "<f4")
        return arrays


@dataclass(frozen=True)
class Array:
    """The shape and the NumPy type of an array."""

    shape: tuple[int, ...]
    dtype: str

    @property
    def bytes(self) -> int:
        """Its size in bytes."""
        return int(np.prod(self.shape, dtype=np.int64)) * np.dtype(self.dtype).itemsize


class OutputCache:
    """The outputs of the original on the windows of a text, in memory-mapped files. Each is computed when first asked.

    Args:
        folder: The folder of the files. Files of the same form that an interrupted run left in it are used.
        text: The healing windows.
        config: The config of the original.
        form: What is kept of each distribution.
        hidden: Whether the outputs of all layers are kept.
        seed: The seed of drawn tokens.

    Raises:
        StreamlineError: the disk has too little room.
    """

    def __init__(
        self, folder: Path, text: Windows, config: PreTrainedConfig, form: CacheForm, hidden: bool, seed: int = 0
    ) -> None:
        self._form, self._hidden, self._seed = form, hidden, seed
        self._number = {row.numpy().tobytes(): number for number, row in enumerate(text.ids)}
        arrays = form.arrays(text, config, hidden)
        if is_main():
            _make_files(folder, arrays)
        wait_for_all()
        self._arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r+") for name in arrays}

    def outputs(self, model: PreTrainedModel, ids: torch.Tensor, numbers: Sequence[int]) -> tuple[Target, Layers]:
        """As `outputs_of`, on windows of the text. The model runs only if the cache lacks one of them.

        Args:
            model: The original, in evaluation mode.
            ids: Token ids `[windows, length]`, each row a window of the text.
            numbers: The layers whose outputs are asked for; none if the cache does not keep them.
        """
        places = [self._number[row.cpu().numpy().tobytes()] for row in ids]
        if not self._arrays["done"][places].all():
            self._fill(model, ids, places)

        def read(name: str, *of: Any) -> torch.Tensor:
            return torch.from_numpy(np.asarray(self._arrays[name][(places, *of)])).to(ids.device)

        states = {number: read("hidden", number) for number in numbers}
        if self._form.kind == "full":
            return AllLogits(read("logits")), states
        if self._form.kind == "top":
            return TopTokens(read("tokens").long(), read("log_probabilities")), states
        return SampledTokens(read("tokens").long(), read("entropy")), states

    @torch.no_grad()
    def _fill(self, model: PreTrainedModel, ids: torch.Tensor, places: Sequence[int]) -> None:
        numbers = range(model.config.num_hidden_layers) if self._hidden else ()
        with layer_outputs(model, numbers) as states:
            logits = logits_of(model, ids)
        values = self._kept(logits, places)
        if self._hidden:
            values["hidden"] = torch.stack([states[number] for number in numbers], dim=1).float()
        for name, value in values.items():
            self._arrays[name][places] = value.cpu().numpy()
            self._arrays[name].flush()
        self._arrays["done"][places] = True  # last, so that an interrupted run leaves no window half written
        self._arrays["done"].flush()

    def _kept(self, logits: torch.Tensor, places: Sequence[int]) -> dict[str, torch.Tensor]:
        if self._form.kind == "full":
            return {"logits": logits}
        log_probabilities = logits.log_softmax(-1)
        if self._form.kind == "top":
            top = log_probabilities.topk(self._form.tokens, dim=-1)
            return {"tokens": top.indices, "log_probabilities": top.values}
        probabilities, drawn = log_probabilities.exp(), list[torch.Tensor]()
        for place, rows in zip(places, probabilities, strict=True):  # the draws of a window are the same in any batch
            generator = torch.Generator(rows.device).manual_seed(self._seed * 1_000_003 + place)
            drawn.append(torch.multinomial(rows, self._form.tokens, replacement=True, generator=generator))
        return {"tokens": torch.stack(drawn), "entropy": -(probabilities * log_probabilities).sum(-1)}


def _make_files(folder: Path, arrays: dict[str, Array]) -> None:
    """Make the files that are missing, or that have another shape. All are empty then: the outputs belong together."""
    if all(_fits(folder / f"{name}.npy", array) for name, array in arrays.items()):
        return
    folder.mkdir(parents=True, exist_ok=True)
    needed, free = sum(array.bytes for array in arrays.values()), shutil.disk_usage(folder).free
    if needed > free:
        raise StreamlineError(
            f"heal-cache: the outputs of the original take {needed / 1e9:.1f} GB in {folder}, where {free / 1e9:.1f} "
            "GB are free; give heal-cache top-64, or none"
        )
    for name, array in arrays.items():
        file = folder / f"{name}.npy"
        np.lib.format.open_memmap(file, mode="w+", dtype=array.dtype, shape=array.shape)
        if hasattr(os, "posix_fallocate"):  # a disk that another program fills would end a write to a map by a signal
            with file.open("r+b") as opened:
                os.posix_fallocate(opened.fileno(), 0, file.stat().st_size)


def _fits(file: Path, array: Array) -> bool:
    try:
        found: Any = np.load(file, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError):
        return False
    return bool(found.shape == array.shape and found.dtype == np.dtype(array.dtype))


@contextmanager
def output_cache(
    recipe: Recipe, text: Windows, config: PreTrainedConfig, workspace: Path | None, trials: bool
) -> Iterator[OutputCache | None]:
    """Provide the cache of a run's distillations inside the `with` block.

    Args:
        recipe: The recipe.
        text: The healing windows.
        config: The config of the original.
        workspace: The folder of the training checkpoints, of which the cache is a part, so that an interrupted run
            computes nothing twice. `None` for a temporary folder.
        trials: Whether plans are compared by trial trainings, which read the text again.

    Yields:
        The cache, or `None` if the recipe distils without one (`cache_form`).

    Raises:
        StreamlineError: the cache does not fit the model, or the disk has too little room.
    """
    form = cache_form(recipe, text, config, trials)
    if form is None:
        yield None
        return
    hidden = distillation_weights(recipe)[1] > 0
    with nullcontext(workspace) if workspace else TemporaryDirectory() as folder:
        yield OutputCache(Path(folder) / CACHE_FOLDER, text, config, form, hidden, recipe.seed)


def cache_form(recipe: Recipe, text: Windows, config: PreTrainedConfig, trials: bool) -> CacheForm | None:
    """What the distillations of a recipe cache; `None` for nothing. The arguments are those of `output_cache`.

    Raises:
        StreamlineError: the vocabulary has no more tokens than are asked for.
    """
    if "distill" not in recipe.resolved_trainings:
        return None
    if recipe.healing.cache is not None:
        form = CacheForm.parse(recipe.healing.cache)
        if form is not None and form.kind == "top" and form.tokens >= config.vocab_size:
            raise StreamlineError(
                f"heal-cache {recipe.healing.cache!r}: the vocabulary has {config.vocab_size} tokens; give full"
            )
        return form
    form = CacheForm("full")
    arrays = form.arrays(text, config, distillation_weights(recipe)[1] > 0)
    read_again = recipe.healing.epochs > 1 or trials
    return form if read_again and sum(array.bytes for array in arrays.values()) <= LIMIT else None

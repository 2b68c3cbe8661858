"""The cache of the original's outputs on disk, which distillation reads in place of running the original again.

The original gives the same outputs in every trial training, and in every pass that reads the text as it was given. With
a cache, it runs on each window once. The cache holds all logits, or some tokens of each next-token distribution.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import numpy as np
import torch
from transformers import PreTrainedConfig, PreTrainedModel

from optimum.streamline.errors import StreamlineError
from optimum.streamline.recipe.recipe import Recipe
from optimum.streamline.system.disk import free_bytes, reserve
from optimum.streamline.system.distributed import from_main, is_main
from optimum.streamline.system.progress import progress_bar
from optimum.streamline.text.windows import Windows, logit_batch, window_generator

from .losses import (
    AllLogits,
    LayerOutputs,
    SampledTokens,
    Target,
    TopTokens,
    layer_outputs,
    logits_of,
    outputs_of,
)
from .settings import distillation_weights

DEFAULT_BYTES = 4 * 2**30
"""The size up to which all outputs are cached by default, in bytes."""
CACHE_FOLDER = "original"
"""The folder of the cache, in the folder of the training checkpoints."""


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
    def size(self) -> int:
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
        StreamlineError: the disk has too little room, or a file cannot be made.
    """

    def __init__(
        self, folder: Path, text: Windows, config: PreTrainedConfig, form: CacheForm, hidden: bool, seed: int = 0
    ) -> None:
        self._form, self._hidden, self._seed, self._ids = form, hidden, seed, text.ids
        self._places = {row.numpy().tobytes(): place for place, row in enumerate(text.ids)}
        arrays = form.arrays(text, config, hidden)
        _make_files(folder, arrays)
        self._arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r+") for name in arrays}

    def outputs(
        self, model: PreTrainedModel | None, ids: torch.Tensor, numbers: Sequence[int]
    ) -> tuple[Target, LayerOutputs]:
        """As `outputs_of`. The model runs on windows of the text that the cache lacks, and on other windows.

        Args:
            model: The original, in evaluation mode; `None` after `complete`.
            ids: Token ids `[windows, length]`.
            numbers: The layers whose outputs are asked for; none if the cache does not keep them.
        """
        found = [self._places.get(row.numpy().tobytes()) for row in ids.cpu()]
        places = [place for place in found if place is not None]
        if len(places) < len(found):  # another text, such as one with replaced tokens
            assert model is not None, "the original is kept for other text"
            return outputs_of(model, ids, numbers)
        missing = [row for row, place in enumerate(places) if not self._arrays["done"][place]]
        if missing:
            assert model is not None, "`complete` has run"
            self._fill(model, ids[missing], [places[row] for row in missing])

        def read(name: str, *of: Any) -> torch.Tensor:
            return torch.from_numpy(np.asarray(self._arrays[name][(places, *of)])).to(ids.device)

        states = {number: read("hidden", number) for number in numbers}
        if self._form.kind == "full":
            return AllLogits(read("logits")), states
        if self._form.kind == "top":
            return TopTokens(read("tokens").long(), read("log_probabilities")), states
        return SampledTokens(read("tokens").long(), read("entropy")), states

    def complete(self, model: PreTrainedModel) -> None:
        """Run the model on all windows that the cache lacks, so that it is not needed any more.

        Args:
            model: The original, in evaluation mode.
        """
        at_once = logit_batch(self._ids.shape[1], model.config.vocab_size)
        missing = torch.from_numpy(np.flatnonzero(~self._arrays["done"]))
        with progress_bar("running the original", len(missing)) as bar:
            for places in missing.split(at_once):
                if len(places):
                    self._fill(model, self._ids[places].to(model.device), places.tolist())
                    bar.advance(len(places))

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
            generator = window_generator(self._seed, place, rows.device)
            drawn.append(torch.multinomial(rows, self._form.tokens, replacement=True, generator=generator))
        return {"tokens": torch.stack(drawn), "entropy": -(probabilities * log_probabilities).sum(-1)}


def _make_files(folder: Path, arrays: dict[str, Array]) -> None:
    """Make the files, unless an earlier run left all of them. The main process does it, for all.

    Raises:
        StreamlineError: the disk has too little room, or a file cannot be made.
    """
    refusal: StreamlineError | None = None
    if is_main() and not all(_fits(folder / f"{name}.npy", array) for name, array in arrays.items()):
        try:
            _make_anew(folder, arrays)
        except StreamlineError as error:
            refusal = error
    refusal = from_main(refusal)
    if refusal is not None:
        raise refusal


def _make_anew(folder: Path, arrays: dict[str, Array]) -> None:
    needed, free = sum(array.size for array in arrays.values()), free_bytes(folder)
    if needed > free:
        raise StreamlineError(
            f"heal-cache: the outputs of the original take {needed / 1e9:.1f} GB in {folder.parent}, where "
            f"{free / 1e9:.1f} GB are free; give heal-cache none, or top-64 and heal-hidden 0"
        )
    try:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        for name, array in sorted(arrays.items(), key=lambda each: each[0] == "done"):  # that one last
            file = folder / f"{name}.npy"
            np.lib.format.open_memmap(file, mode="w+", dtype=array.dtype, shape=array.shape)
            reserve(file)
    except OSError as error:
        raise StreamlineError(
            f"heal-cache: cannot write the outputs of the original to {folder.parent} ({error.strerror}); give "
            "heal-cache none"
        ) from error


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
            computes nothing twice. With `None`, a cache that the recipe asks for is in a temporary folder.
        trials: Whether plans are compared by trial trainings, which read the text again.

    Yields:
        The cache; `None` if the recipe distils without one (`cache_form`).

    Raises:
        StreamlineError: the disk has too little room, or a file cannot be made.
    """
    form = cache_form(recipe, text, config, workspace, trials)
    if form is None:
        yield None
        return
    hidden = distillation_weights(recipe)[1] > 0
    with nullcontext(workspace) if workspace else TemporaryDirectory() as folder:
        yield OutputCache(Path(folder) / CACHE_FOLDER, text, config, form, hidden, recipe.seed)


def cache_form(
    recipe: Recipe, text: Windows, config: PreTrainedConfig, workspace: Path | None, trials: bool
) -> CacheForm | None:
    """What the distillations of a recipe cache; `None` for nothing. The arguments are those of `output_cache`.

    By default all outputs are cached if there is a folder for training checkpoints, the text is read more than once,
    the outputs take at most `DEFAULT_BYTES`, and the disk has twice their room.
    """
    kl, hidden = distillation_weights(recipe)
    if "distill" not in recipe.resolved_trainings:
        return None
    if recipe.healing.cache is not None:
        return CacheForm.parse(recipe.healing.cache)
    read_again = trials or (recipe.healing.epochs > 1 and not recipe.resolved_replace)
    if workspace is None or not kl or not read_again:
        return None
    form = CacheForm("full")
    size = sum(array.size for array in form.arrays(text, config, hidden > 0).values())
    room = free_bytes(workspace) // 2
    if (workspace / CACHE_FOLDER).is_dir():  # an interrupted run has it already
        room = size
    return from_main(form if size <= min(DEFAULT_BYTES, room) else None)  # the processes must agree

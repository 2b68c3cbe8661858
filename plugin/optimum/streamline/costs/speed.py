"""How fast this machine works on a model: measured on one of its layers and on a few, with random weights.

What a step takes on more layers follows from the two: a part outside the layers, and a part for each layer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from time import monotonic
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from optimum.streamline.checkpoints.loading import load_on_disk, load_stock
from optimum.streamline.checkpoints.read_back import read_back
from optimum.streamline.checkpoints.saving import save_model, save_weights
from optimum.streamline.editing.apply import planned_config
from optimum.streamline.editing.plan import Plan
from optimum.streamline.healing.losses import Distillation, HealingLoss, LayerOutputs, NextToken, Target, outputs_of
from optimum.streamline.healing.settings import distillation_weights, model_settings
from optimum.streamline.healing.trainable_parts import train_model
from optimum.streamline.model_files.source import ModelSource, fingerprint
from optimum.streamline.models.architectures import architecture_of, decoder_layers
from optimum.streamline.models.linear_modules import meta_model
from optimum.streamline.models.offloaded_weights import copy_in_memory, copy_sharing_disk, device_of, is_offloaded
from optimum.streamline.models.skipped_sublayers import mark_skipped
from optimum.streamline.quantization.compact_copy import compact_copy
from optimum.streamline.recipe.recipe import Recipe
from optimum.streamline.scoring.loss import window_losses
from optimum.streamline.text.windows import BATCH, Windows

EMBEDDED = 1 << 26
"""The most numbers in the embedding of what is measured. A larger vocabulary is cut, and its part scaled up."""
WORK = 1e11
"""About how many operations of one layer are timed at a time: a second or two on two cores."""
LAYERS, NUMBERS = 8, 1 << 27
"""The most layers that are measured, and the most weights in them if they are more than two."""
IMPORTS = 60
"""The seconds below which the first measurement is repeated: it also imports libraries."""
LONG = 5
"""The seconds from which a measurement is not repeated."""
UPDATES = 4
"""The number of updates of a training that are timed."""


@dataclass(frozen=True)
class Types:
    """The number types of the weights of a model: in its files, while it is scored, and in the result's files."""

    stored: torch.dtype
    computing: torch.dtype
    result: torch.dtype


@dataclass(frozen=True)
class Line:
    """The seconds of something that takes `outside`, and `layer` more for each layer."""

    outside: float
    layer: float

    def of(self, layers: float) -> float:
        """The seconds for so many layers."""
        return self.outside + self.layer * layers


@dataclass(frozen=True)
class Speed:
    """How fast a machine works on a model, in seconds by the number of its layers.

    Args:
        load: Loading the model.
        write: Writing it as a checkpoint, and reading that back.
        window: Running a window through it. What is outside the layers is the head, with the loss.
        original: Running a window through the original in the form that distillation keeps it in.
        update: A window's share of an update of a training, without the original's part; zero without training.
        token: Running one token through it.
        export: Exporting it; zero without `export`.
    """

    load: Line
    write: Line
    window: Line
    original: Line
    update: Line
    token: Line
    export: Line


def measure_speed(
    recipe: Recipe,
    config: PreTrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    types: Types,
    on_disk: bool,
    device: str,
    export: Callable[[Path, Path], object] | None = None,
) -> Speed:
    """Measure how fast this machine works on a model. It takes some seconds, and the memory of `measured_layers`.

    Args:
        recipe: The recipe.
        config: The model's config, without quantization.
        tokenizer: Its tokenizer.
        types: The types of its weights.
        on_disk: Whether its weights stay on disk.
        device: The device on which it is scored and edited.
        export: A function that exports a checkpoint into a folder, if the recipe exports.
    """

    def measured(layers: int) -> dict[str, float]:
        with TemporaryDirectory(prefix="streamline-") as scratch:
            few = _few_layers(config, layers)
            return _measured(recipe, few, tokenizer, types, Path(scratch), on_disk, device, export)

    begun, one = monotonic(), measured(1)
    if monotonic() - begun < IMPORTS:
        one = measured(1)
    few = measured_layers(config, on_disk)
    more, share = measured(few), config.vocab_size / _vocabulary(config)
    # Outside the layers an export takes the time of its program, whatever the vocabulary.
    shares = {name: 1.0 if name == "export" else share for name in one}
    return Speed(**{name: _line(one[name], more[name], few, shares[name]) for name in one})


def measured_layers(config: PreTrainedConfig, on_disk: bool) -> int:
    """How many layers are measured: two, or up to `LAYERS` of small ones, of which a single one tells little.

    Args:
        config: The model's config.
        on_disk: Whether the weights stay on disk. Then there is little memory, so two layers are measured.
    """
    if on_disk:
        return 2
    [layer, *_] = decoder_layers(meta_model(config), architecture_of(config))
    size, layers = sum(each.numel() for each in layer.parameters()), int(config.num_hidden_layers)
    return max(2, min(LAYERS, layers, NUMBERS // size))


def _line(one: float, more: float, layers: int, share: float) -> Line:
    """The line through what one layer and several layers took.

    Args:
        one: The seconds of one layer.
        more: Those of several.
        layers: How many that are.
        share: By how much the part outside the layers grows, because the vocabulary was cut.
    """
    layer = max(more - one, 0.0) / (layers - 1)
    return Line(max(one - layer, 0.0) * share, layer)


def _vocabulary(config: PreTrainedConfig) -> int:
    vocabulary: int = config.vocab_size
    return min(vocabulary, max(1024, EMBEDDED // int(config.hidden_size)))


def _few_layers(config: PreTrainedConfig, count: int) -> PreTrainedConfig:
    """The config of a model with layers from the middle only, and with a part of the vocabulary if it is large."""
    total = config.num_hidden_layers
    first = min(total // 2, total - count)
    kept = range(first, first + count)
    few = planned_config(config, Plan(total, tuple(layer for layer in range(total) if layer not in kept), "none"))
    few.vocab_size = _vocabulary(config)
    mark_skipped(few, {})  # which random weights would contradict
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):  # which may be outside of it
        setattr(few, name, None)
    return few


def _measured(
    recipe: Recipe,
    config: PreTrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    types: Types,
    folder: Path,
    on_disk: bool,
    device: str,
    export: Callable[[Path, Path], object] | None,
) -> dict[str, float]:
    """The seconds of each field of `Speed` for a model of this config."""
    original, scratch, out = folder / "original", folder / "scratch", folder / "out"
    scratch.mkdir()
    with torch.random.fork_rng():
        save_weights(AutoModelForCausalLM.from_config(config, dtype=types.stored), original)
    source = ModelSource(str(original))

    def load() -> PreTrainedModel:
        fingerprint(source)
        if on_disk:
            return load_on_disk(source, scratch, types.computing, device)
        return load_stock(source, types.computing, device)

    def write() -> None:
        saved = copy_sharing_disk(model)  # reading back frees the weights
        save_model(saved, tokenizer, types.result, out)
        read_back(out, saved, tokenizer, None)
        fingerprint(ModelSource(str(out)))

    seconds, model = _timed(load)
    found = {"load": seconds}
    found["window"] = found["original"] = _window(model, recipe.length)
    found["update"] = 0.0
    if trainings := [each for each in recipe.resolved_trainings if each != "hidden-mse"]:
        found["update"] = _update(recipe, _trainable(recipe, model), trainings[-1])
        if recipe.healing.original != "fp32":
            found["original"] = _window(compact_copy(model, recipe.healing.original, recipe.device), recipe.length)
    found["token"] = _token(model)
    found["write"] = _timed(write)[0]
    found["export"] = 0.0 if export is None else _timed(lambda: export(out, folder / "export"), 1)[0]
    return found


def _trainable(recipe: Recipe, model: PreTrainedModel) -> PreTrainedModel:
    """The model to train: a copy in memory of one on disk, unless adapters are trained on a compact copy of it."""
    if recipe.healing.lora_base != "fp32" or not is_offloaded(model):
        return model
    copied: Any = copy_in_memory(model)
    trained: PreTrainedModel = copied
    return trained


def _timed(work: Callable[[], Any], repeats: int = 3) -> tuple[float, Any]:
    """The median seconds of some work that is repeated unless it is long, and its last result."""
    seconds = list[float]()
    while not seconds or (len(seconds) < repeats and sum(seconds) < LONG):
        start = monotonic()
        result = work()
        seconds.append(monotonic() - start)
    return median(seconds), result


def _windows_at_once(model: PreTrainedModel, length: int, wanted: int) -> int:
    """How many windows make about `WORK`."""
    [layer, *_] = decoder_layers(model, architecture_of(model.config))
    weights = sum(each.numel() for each in layer.parameters())
    return max(1, min(wanted, int(WORK / (2 * weights * length))))


def _text(model: PreTrainedModel, windows: int, length: int) -> Windows:
    """Random text."""
    generator = torch.Generator().manual_seed(0)
    return Windows(torch.randint(model.config.vocab_size, (windows, length), generator=generator), "random")


@torch.inference_mode()
def _window(model: PreTrainedModel, length: int) -> float:
    """The seconds that a window takes, in a batch as the searches have."""
    ids = _text(model, _windows_at_once(model, length, BATCH), length).ids.to(device_of(model))
    return _timed(lambda: window_losses(model, ids).cpu(), 4)[0] / len(ids)


@torch.inference_mode()
def _token(model: PreTrainedModel) -> float:
    ids = torch.zeros(1, 1, dtype=torch.long, device=device_of(model))

    def run() -> torch.Tensor:
        logits: torch.Tensor = model(ids, use_cache=False).logits
        return logits.cpu()

    return _timed(run, 9)[0]


class _TimedLoss:
    """A loss that notes when each update begins. Held-out losses are not computed."""

    def __init__(self, loss: HealingLoss) -> None:
        self._loss = loss
        self.begun: list[float] = []

    def loss(self, model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
        """The loss of an update."""
        if not torch.is_grad_enabled():
            return torch.ones(())
        self.begun.append(monotonic())
        return self._loss.loss(model, ids)


def _update(recipe: Recipe, model: PreTrainedModel, stage: str) -> float:
    """The seconds of an update of training `stage` for each of its windows."""
    at_once = recipe.healing.micro_batch or recipe.heal_batch(stage)
    batch = _windows_at_once(model, recipe.length, at_once)
    text = _text(model, (UPDATES + 1) * batch + 1, recipe.length)
    kind = "distill" if stage == "distill" else "lm"
    settings = replace(model_settings(recipe, model, kind), batch=batch, micro_batch=None, epochs=1, minutes=None)
    timed = _TimedLoss(_loss(recipe, model, text.ids[:batch], kind))
    train_model(model, timed, text, settings, title="timing an update", device=recipe.device)
    return median(after - before for before, after in zip(timed.begun, timed.begun[1:], strict=False)) / batch


def _loss(recipe: Recipe, model: PreTrainedModel, ids: torch.Tensor, stage: str) -> HealingLoss:
    """The loss of a training, whose original has given its outputs before."""
    if stage == "lm":
        return NextToken()
    layers = range(model.config.num_hidden_layers)
    given: tuple[Target, LayerOutputs] = outputs_of(model, ids.to(device_of(model)), layers)

    def outputs(ids: torch.Tensor, numbers: Sequence[int]) -> tuple[Target, LayerOutputs]:
        return given

    return Distillation(outputs, tuple(layer + 1 for layer in layers), *distillation_weights(recipe))

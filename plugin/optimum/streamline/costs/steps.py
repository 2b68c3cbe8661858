"""What each step of a recipe takes: memory, room on the disk, and time, estimated before any work is done.

`ci/bench scale` puts the estimates beside what it measures.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedConfig

from optimum.streamline.checkpoints.loading import DTYPES
from optimum.streamline.checkpoints.saving import OFFLOADED_SHARD
from optimum.streamline.editing.plan import TRAINED
from optimum.streamline.evaluation.latency import DECODE_TOKENS, PROMPT_LENGTH, ROUNDS, WARMUP_ROUNDS
from optimum.streamline.healing.output_cache import Array, cache_form
from optimum.streamline.healing.settings import EVALUATIONS, distillation_weights, held_out_windows, scope_of
from optimum.streamline.methods.auto import makes_trials
from optimum.streamline.models.architectures import architecture_of, decoder_layers
from optimum.streamline.models.linear_modules import meta_model
from optimum.streamline.quantization.quantizers import NONE, QUANTIZERS
from optimum.streamline.recipe.quantities import parse_size
from optimum.streamline.recipe.recipe import Recipe
from optimum.streamline.scoring.ablation import STREAMS
from optimum.streamline.scoring.loss import VOCABULARY_SLICE
from optimum.streamline.text.windows import BATCH, Windows

from .choosing_work import BACKWARD, REMOVALS, choosing_work, compared_recipes
from .healing_memory import healing_memory, inner_width, layers_removed
from .speed import Speed, Types

FP32 = 4  # bytes
IN_RUNTIME = 3
"""The memory of an export, as a multiple of its weights, if so much is free; else it takes what is free.

It is the exporters' own (`onnx.export`), whose packages are an extra.
"""
START = 5
"""The seconds in which a process starts that times a model."""
TRIALS = 1.325
"""The updates of all trial trainings and of the rest of the last one, over those of one training (`healing.trials`)."""


@dataclass(frozen=True)
class StepCost:
    """What a step takes.

    Args:
        name: The step.
        memory: The memory of the process while it runs, in bytes, with the program.
        gpu: The memory of the GPU, in bytes.
        disk: The room that its files take, in bytes, those that it deletes again too.
        seconds: Its time; `None` if unknown.
    """

    name: str
    memory: int
    gpu: int
    disk: int
    seconds: float | None


@dataclass(frozen=True)
class ModelSize:
    """How many weights a model has.

    Args:
        whole: The original's.
        layer: Those of one of its layers.
        outputs: Those of the output projections of one of its layers.
        mlp_outputs: Those of the MLP's among them.
        largest: Those of its largest tensor.
        left: The pruned model's.
        layers: The number of the original's layers.
        kept: The number of the pruned model's layers.
    """

    whole: int
    layer: int
    outputs: int
    mlp_outputs: int
    largest: int
    left: int
    layers: int
    kept: int


def model_size(recipe: Recipe, config: PreTrainedConfig) -> ModelSize:
    """The size of a model and of what a recipe leaves of it."""
    model = meta_model(config)
    architecture = architecture_of(config)
    layers = decoder_layers(model, architecture)
    removed = layers_removed(recipe, len(layers))
    layer = sum(each.numel() for each in layers.parameters()) // len(layers)

    def numbers(modules: tuple[str, ...]) -> int:
        named = ((name.partition(".")[2], each) for name, each in layers.named_parameters())
        return sum(each.numel() for name, each in named if name.startswith(modules)) // len(layers)

    mlp_outputs = numbers(tuple(architecture.mlp_out))
    outputs = numbers((architecture.attention_out,)) + mlp_outputs
    whole = sum(each.numel() for each in model.parameters())
    largest = max(each.numel() for each in model.parameters())
    return ModelSize(
        whole, layer, outputs, mlp_outputs, largest, whole - removed * layer, len(layers), len(layers) - removed
    )


@dataclass(frozen=True)
class Circumstances:
    """What the costs of a recipe depend on besides the recipe and the model's config.

    Args:
        types: The types of the model's weights.
        on_disk: Whether its weights stay on disk.
        scored_on: The device on which layers are scored and edited.
        largest_file: The size of its largest weight file, in bytes.
        program: The memory of the process before any work, in bytes.
        free: The memory that the process may take, in bytes.
        folder: The folder beside the output in which healing keeps its files.
        speed: The speed of the machine; `None` if unknown.
        processes: How many processes share the weights while they heal.
        quantized: The bytes of the original's weight files if they are quantized; they are loaded as they are.
        pickled: The bytes of the original's weight files if they are `.bin` files. Weights that stay on disk are then
            written to a scratch folder.
    """

    types: Types
    on_disk: bool
    scored_on: str
    largest_file: int
    program: int
    free: int
    folder: Path
    speed: Speed | None
    processes: int = 1
    quantized: int | None = None
    pickled: int = 0


def step_costs(
    recipe: Recipe, config: PreTrainedConfig, around: Circumstances, validates: bool = False
) -> list[StepCost]:
    """What each step of `prune` takes, or of `run`.

    Args:
        recipe: The recipe.
        config: The original's config.
        around: All else that matters.
        validates: Whether the recipe is run: exported and validated too.
    """
    estimates = _Estimates(recipe, config, model_size(recipe, config), around)
    steps = [estimates.load(), estimates.choose(), *estimates.heal(), estimates.write()]
    if validates:
        steps += [*estimates.export(), estimates.validate()]
    on_gpu = {"heal", "validate"} if around.scored_on == "cpu" else {"choose", "heal", "write", "validate"}
    costs = []
    for name, work, disk, seconds in steps:
        gpu = work if recipe.device != "cpu" and name in on_gpu else 0
        costs.append(StepCost(name, around.program + work - gpu, gpu, disk, seconds))
    return costs


_Step = tuple[str, int, int, float | None]


@dataclass(frozen=True)
class _Estimates:
    """The estimates of the steps: name, bytes of memory without the program, bytes on disk, seconds."""

    recipe: Recipe
    config: PreTrainedConfig
    size: ModelSize
    around: Circumstances

    def load(self) -> _Step:
        """All weights and, if their type changes, the file that they are read from; from disk one tensor at a time."""
        seconds = self._seconds(lambda speed: speed.load.of(self.size.layers))
        if self.around.on_disk:
            return "load", 2 * self.size.largest * self.around.types.stored.itemsize, self.around.pickled, seconds
        mapped = self.around.largest_file * (self.around.types.stored != self.around.types.computing)
        return "load", self._loaded() + mapped, 0, seconds

    def choose(self) -> _Step:
        """The weights, for `auto` twice, and corrections; or two layers; the hidden states of removals at one depth."""
        size, width, length = self.size, self.config.hidden_size, self.recipe.length
        logits = 2 * FP32 * BATCH * length * min(self.config.vocab_size, VOCABULARY_SLICE)
        windows = BATCH * length * width
        if self.around.on_disk:
            held = 2 * size.layer * self.around.types.computing.itemsize + FP32 * VOCABULARY_SLICE * width
            states = 2 * FP32 * min(STREAMS, windows * size.layers)
        else:
            held = self._loaded() * (1 + (self.recipe.resolved_method == "auto")) + self._corrections()
            states = FP32 * windows * size.layers
        work = choosing_work(self.recipe, self.config)
        seconds = None
        if work is not None:
            layers, heads = work.layers, work.heads
            seconds = self._seconds(lambda speed: layers * speed.window.layer + heads * speed.window.outside)
        if self.recipe.resolved_method == "explicit":
            held = 0 if self.around.on_disk else self._loaded() + self._corrections()
            return "choose", held + self._fit(), self._states_on_disk(), seconds
        return "choose", held + states + logits + self._fit(), self._states_on_disk(), seconds

    def heal(self) -> Iterator[_Step]:
        """The training of the recipe that takes most memory, and the time of all."""
        if not self.recipe.resolved_trainings:
            return
        memory = healing_memory(self.recipe, self.config, self.around.on_disk, self.around.processes)
        trained, moments = memory.gradients // FP32, memory.moments  # of a process, which writes its own
        # Two checkpoints of weights and moments, and the best weights twice while they are replaced.
        checkpoints = 2 * (FP32 * trained + moments) + 2 * FP32 * trained
        # Of other plans: two in the first round, with a checkpoint and the best weights each; one in the second round,
        # with two checkpoints.
        others = 2 * (FP32 * trained + moments) + 2 * FP32 * trained if makes_trials(self.recipe) else 0
        disk = checkpoints + others
        disk = disk * self.around.processes + self._cached() + self._states_of_local()
        trainings = range(len(self.recipe.resolved_trainings))
        seconds = self._seconds(lambda speed: sum(self._training(each, speed) for each in trainings))
        yield "heal", memory.total, disk, seconds

    def write(self) -> _Step:
        """The result, read back beside its file; or one file of it at a time."""
        bytes_of_result = self.size.left * self.around.types.result.itemsize
        if self.around.quantized is not None:
            bytes_of_result = self.around.quantized * self.size.left // self.size.whole
        largest = self.size.largest * self.around.types.result.itemsize
        seconds = self._seconds(lambda speed: speed.write.of(self.size.kept))
        if self.around.on_disk:
            shard = max(parse_size(OFFLOADED_SHARD, "shard"), largest)
            return "write", min(bytes_of_result, shard) + largest, bytes_of_result, seconds
        return "write", max(self._loaded(), 2 * bytes_of_result), bytes_of_result, seconds

    def export(self) -> Iterator[_Step]:
        """The exports of the original and of the pruned model, one after the other."""
        if self.recipe.export.format == "none":
            return
        sizes = self._exports()
        seconds = self._seconds(lambda speed: speed.export.of(self.size.layers) + speed.export.of(self.size.kept))
        quantizes = self.recipe.quantization.quantizer not in (NONE, *QUANTIZERS)  # then there is the float graph too
        disk = sum(sizes) + quantizes * sizes[1]
        yield "export", min(round(IN_RUNTIME * max(sizes)), self.around.free), disk, seconds

    def validate(self) -> _Step:
        """All models in memory at a time if they fit, and again in the processes in which they are timed."""
        models = [(FP32 * self.size.whole, self.size.layers), (FP32 * self.size.left, self.size.kept)]
        if self.recipe.export.format != "none":
            models += zip(self._exports(), (self.size.layers, self.size.kept), strict=True)
        sizes = [weights for weights, _ in models]
        together = sum(sizes) <= self.around.free
        seconds = self._seconds(lambda speed: sum(self._validation(layers, speed) for _, layers in models))
        logits: int = FP32 * self.recipe.evaluation.samples * self.recipe.length * self.config.vocab_size
        return "validate", sum(sizes) if together else max(sizes), 0 if together else logits, seconds

    def _validation(self, layers: int, speed: Speed) -> float:
        """The seconds in which one model is loaded twice, judged and timed."""
        recipe = self.recipe
        prompt = PROMPT_LENGTH / recipe.length * speed.window.of(layers)
        timed = (ROUNDS + WARMUP_ROUNDS) * (prompt + DECODE_TOKENS * speed.token.of(layers))
        return 2 * speed.load.of(layers) + recipe.evaluation.samples * speed.window.of(layers) + timed + START

    def _exports(self) -> tuple[int, int]:
        """The bytes of the exports of both models, in float."""
        itemsize = DTYPES[self.recipe.dtype or "fp32"].itemsize
        return self.size.whole * itemsize, self.size.left * itemsize

    def _seconds(self, of: Callable[[Speed], float | None]) -> float | None:
        return None if self.around.speed is None else of(self.around.speed)

    def _loaded(self) -> int:
        if self.around.quantized is not None:
            return self.around.quantized
        return self.size.whole * self.around.types.computing.itemsize

    def _compared(self) -> list[Recipe]:
        return compared_recipes(self.recipe, self.config)

    def _states_on_disk(self) -> int:
        """Files of hidden states while layers are chosen, of merged layers, and of corrections."""
        return max(map(self._states_on_disk_of, self._compared())) if self.around.on_disk else 0

    def _states_on_disk_of(self, recipe: Recipe) -> int:
        count = self.size.layers - self.size.kept
        states: int = FP32 * recipe.calibration.samples * recipe.length * self.config.hidden_size
        if recipe.resolved_method == "shortened-taylor":
            return states * self.size.layers
        if recipe.resolved_method.startswith("come") or recipe.resolved_method == "average":
            return FP32 * self.size.layer * count
        return 6 * states + self._corrections_of(recipe) if recipe.resolved_replacement == "corrected" else 0

    def _fit(self) -> int:
        """The memory of fitting corrections: a matrix in float64, twice, a layer, and hidden states if not on disk."""
        if not any(each.resolved_replacement == "corrected" for each in self._compared()):
            return 0
        width: int = self.config.hidden_size
        inner = inner_width(self.config)
        states = FP32 * self.recipe.calibration.samples * self.recipe.length * width
        return 2 * 8 * inner**2 + (FP32 * self.size.layer if self.around.on_disk else 4 * states)

    def _corrections(self) -> int:
        return max(map(self._corrections_of, self._compared()))

    def _corrections_of(self, recipe: Recipe) -> int:
        """Of all output projections that stay, with what these become; or two of an MLP for each removal in a race."""
        if recipe.resolved_replacement != "corrected":
            return 0
        compared = REMOVALS.get(recipe.resolved_method, 0) * self.size.layers
        return 2 * FP32 * max(self.size.outputs * self.size.kept, self.size.mlp_outputs * compared)

    def _windows(self) -> tuple[int, int]:
        """The windows that are trained on, and those held out."""
        windows = self.recipe.healing.tokens // self.recipe.length
        held_out = held_out_windows(windows)
        return windows - held_out, held_out

    def _cached(self) -> int:
        return sum(each.size for each in self._cache().values())

    def _cache(self) -> dict[str, Array]:
        recipe = self.recipe
        text = Windows(torch.empty(sum(self._windows()), recipe.length, device="meta"), "")
        if self.around.processes > 1 or "distill" not in recipe.resolved_trainings:
            return {}
        form = cache_form(recipe, text, self.config, self.around.folder, makes_trials(recipe))
        if form is None:
            return {}
        return form.arrays(text, self.config, distillation_weights(recipe)[1] > 0)

    def _states_of_local(self) -> int:
        if "local" not in self.recipe.resolved_trainings:
            return 0
        width: int = self.config.hidden_size
        return 2 * FP32 * sum(self._windows()) * self.recipe.length * width

    def _training(self, number: int, speed: Speed) -> float:
        """The seconds of one training."""
        recipe, size = self.recipe, self.size
        stage, (windows, held_out) = recipe.resolved_trainings[number], self._windows()
        trained = windows * recipe.healing.epochs
        scope = scope_of(recipe, number, recipe.resolved_replacement in TRAINED)
        original, window = speed.original.of(size.layers), speed.window.of(size.kept)
        measured = (1 + EVALUATIONS) * held_out
        if stage == "local":  # the original runs once on the text; then each cut layer is trained
            cut = size.layers - size.kept
            return (windows + held_out) * original + cut * (
                trained * speed.update.layer + measured * speed.window.layer
            )
        if stage == "hidden-mse":  # the original runs up to the block, which is anywhere
            return trained * (original / 2 + speed.update.layer) + measured * original / 2
        update = speed.update.of(size.kept)
        if scope == "replacement":
            update = window + (BACKWARD - 1) * window / 2
        own = trained * update + measured * window
        if stage == "lm":
            return own
        return own * (TRIALS if makes_trials(recipe) else 1) + self._runs_of_original() * original

    def _runs_of_original(self) -> int:
        """How many windows run through the original for distillation."""
        (windows, held_out), passes = self._windows(), self.recipe.healing.epochs
        first = windows + held_out if self._cache() else windows + (1 + EVALUATIONS) * held_out
        if self.recipe.resolved_replace:  # it draws the tokens once, and reads them in each later pass
            return first + windows + held_out + windows * (passes - 1)
        return first if self._cache() else first + windows * (passes - 1)

"""How much memory healing takes, estimated from the recipe and the config before any work is done."""

from __future__ import annotations

from dataclasses import astuple, dataclass

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from optimum.streamline.editing.plan import TRAINED
from optimum.streamline.errors import StreamlineError
from optimum.streamline.healing.settings import needs_original, scope_of
from optimum.streamline.methods.auto import makes_trials
from optimum.streamline.models.architectures import architecture_of, decoder_layers
from optimum.streamline.models.linear_modules import meta_model
from optimum.streamline.recipe.quantities import memory_limit, parse_layers, parse_remove
from optimum.streamline.recipe.recipe import Recipe
from optimum.streamline.reporting.numbers import size
from optimum.streamline.system.distributed import process_count, sharding
from optimum.streamline.system.memory import free_memory, taken_memory
from optimum.streamline.text.windows import LOGITS

FP32 = 4  # bytes
COMPACT: dict[str, float] = {"bf16": 2, "int8": 1, "nf4": 0.52}
"""The bytes of a weight in a matrix of a compact copy; in 4 bits, 64 weights share a scale of 8 bits."""
IN_BF16 = 0.65
"""What the layers keep in mixed precision, as a share of what they keep in fp32 (measured on Llama)."""


@dataclass(frozen=True)
class HealingMemory:
    """The memory of a process that heals, in bytes, without the program itself.

    Args:
        weights: The model's weights, in fp32, and in mixed precision their copies in bf16.
        original: Those of the original, if a training compares with it.
        gradients: The gradients of what is trained.
        moments: The two moments of AdamW.
        activations: What the layers keep for the gradient, and logits.
    """

    weights: int
    original: int
    gradients: int
    moments: int
    activations: int

    @property
    def total(self) -> int:
        """The sum."""
        return sum(astuple(self))


def healing_memory(
    recipe: Recipe, config: PreTrainedConfig, on_disk: bool = False, processes: int = 1
) -> HealingMemory:
    """Estimate the memory of the training of a recipe that takes most.

    A layer keeps about 12 x width + 4 x inner width numbers a token for the gradient (counted on Llama, Qwen3 and
    GPT-2; mixtures of experts keep more). Logits take about five numbers a token and entry of the vocabulary.

    Args:
        recipe: A recipe with trainings.
        config: The original's config.
        on_disk: Whether weights stay on disk, but for those of the layer that is trained, or that processes share.
        processes: How many processes share the weights, if this is not one of them.
    """
    if sharding() is not None:
        processes = process_count()
    shares = processes > 1 and "local" not in recipe.resolved_trainings
    model = meta_model(config)
    whole, removed = _numbers(model), layers_removed(recipe, config.num_hidden_layers)
    layers = decoder_layers(model, architecture_of(config))
    left = whole - removed * _numbers(layers) // len(layers)
    most = max(
        (
            _of_training(recipe, number, model, whole, left, len(layers) - removed, on_disk and not shares)
            for number in range(len(recipe.resolved_trainings))
        ),
        key=lambda memory: memory.total,
    )
    return _shared(most, whole - _numbers(layers), _numbers(layers[0]), processes) if shares else most


def _shared(memory: HealingMemory, outside: int, layer: int, processes: int) -> HealingMemory:
    """The memory of one of the processes that share the weights.

    Args:
        memory: That of a process which holds all of them.
        outside: The number of weights outside the decoder layers, which are whole while the model runs.
        layer: The number of weights of a layer, of which two are whole at a time.
        processes: The number of processes.
    """
    gathered = FP32 * (outside + 2 * layer)
    return HealingMemory(
        weights=memory.weights // processes + gathered,
        original=memory.original // processes + gathered * bool(memory.original),
        gradients=memory.gradients // processes,
        moments=memory.moments // processes,
        activations=memory.activations,
    )


def warning(recipe: Recipe, config: PreTrainedConfig, on_disk: bool = False) -> str:
    """A line for the user if healing seems to take more memory than there is; empty if there is enough.

    Args:
        recipe: The recipe.
        config: The original's config.
        on_disk: As in `healing_memory`.

    Raises:
        StreamlineError: it takes more than the recipe's `max_memory`.
    """
    if not recipe.resolved_trainings:
        return ""
    needed = healing_memory(recipe, config, on_disk).total
    advice = "lora, heal-optimizer adamw-8bit, heal-micro-batch 1 and gradient-checkpointing take less"
    limit = memory_limit(recipe.max_memory) if recipe.device == "cpu" else None
    if limit is not None and needed + taken_memory() > limit:
        raise StreamlineError(
            f"max-memory {recipe.max_memory!r}: healing takes about {size(needed + taken_memory())} with the program; "
            f"give so much, or heal none; {advice}"
        )
    if recipe.device == "cpu":
        free, needed = free_memory(), needed * process_count()
    elif torch.cuda.is_available():
        free = torch.cuda.mem_get_info()[0]
    else:  # which loading the model refuses
        return ""
    return f"healing takes about {size(needed)} of memory, and {size(free)} are free; {advice}" if needed > free else ""


def _of_training(
    recipe: Recipe, number: int, model: PreTrainedModel, whole: int, left: int, layers: int, on_disk: bool
) -> HealingMemory:
    """The memory of one training.

    Args:
        recipe: The recipe.
        number: The number of the training in `Recipe.resolved_trainings`.
        model: The original, on the meta device.
        whole: The number of its weights.
        left: The number of the pruned model's weights.
        layers: The number of its layers.
        on_disk: Whether weights stay on disk, but for those of the layer that is trained.
    """
    config, stage = model.config, recipe.resolved_trainings[number]
    one_layer = _numbers(decoder_layers(model, architecture_of(config))[0])
    trained = left
    if scope_of(recipe, number, recipe.resolved_replacement in TRAINED) != "model":
        trained = one_layer
    elif recipe.healing.lora:
        matrices = (each for each in decoder_layers(model, architecture_of(config)).parameters() if each.ndim > 1)
        trained = recipe.healing.lora_rank * sum(sum(each.shape[-2:]) for each in matrices)
        left += trained
    if recipe.healing.lora_base == "fp32":
        resident = one_layer if stage == "hidden-mse" or on_disk else left
        weights = FP32 * resident + _bf16_copies(recipe, stage, resident, trained)
    else:  # the weights themselves stay, in memory or on disk
        copied = _copy(recipe.healing.lora_base, model, (layers, left - trained))
        weights = FP32 * (trained if on_disk else left) + copied
    return HealingMemory(
        weights=weights,
        original=_original(recipe, stage, model, whole, on_disk),
        gradients=FP32 * trained,
        moments=2 * trained * (1 if recipe.healing.optimizer == "adamw-8bit" else FP32),
        activations=_activations(recipe, stage, config, 1 if stage in ("hidden-mse", "local") else layers),
    )


def _original(recipe: Recipe, stage: str, model: PreTrainedModel, whole: int, on_disk: bool) -> int:
    """The bytes of the original's weights that are kept beside those of the model that is trained."""
    if stage == "distill" and recipe.healing.original != "fp32":
        return _copy(recipe.healing.original, model, (model.config.num_hidden_layers, whole))
    # By default there may be a cache, but only if the disk has room for it.
    needed = stage == "hidden-mse" or needs_original(recipe, recipe.healing.cache not in (None, "none"))
    return FP32 * whole * ((needed or makes_trials(recipe)) and not on_disk)


def _copy(form: str, model: PreTrainedModel, size: tuple[int, int]) -> int:
    """The bytes of a compact copy.

    Args:
        form: Its form.
        model: The original, on the meta device.
        size: The number of layers, and of all weights.
    """
    layers, weights = size
    all_layers = decoder_layers(model, architecture_of(model.config))
    matrices = sum(each.numel() for each in all_layers.parameters() if each.ndim == 2) * layers // len(all_layers)
    return round(COMPACT[form] * matrices + COMPACT["bf16"] * (weights - matrices))


def _bf16_copies(recipe: Recipe, stage: str, weights: int, trained: int) -> int:
    """The bytes of the copies of the weights in bf16 that mixed precision holds beside the gradients."""
    if recipe.healing.dtype != "bf16":
        return 0
    if not recipe.healing.gradient_checkpointing:
        return 2 * weights
    # A forward pass holds the copies of all trained weights until its end. Only that of the first windows of an update
    # finds no gradients, which are larger.
    own, at_once = _windows_of_update(recipe, stage)
    return 2 * trained if at_once < own else 0


def _windows_of_update(recipe: Recipe, stage: str) -> tuple[int, int]:
    """The windows of an update that a process computes, and how many of them at a time."""
    batch = min(recipe.heal_batch(stage), recipe.healing.tokens // recipe.length * recipe.healing.epochs)
    own = -(-batch // process_count())
    return own, min(own, recipe.healing.micro_batch or own)


def _activations(recipe: Recipe, stage: str, config: PreTrainedConfig, layers: int) -> int:
    """What `layers` layers keep of the windows that are computed at a time, and the logits."""
    tokens = _windows_of_update(recipe, stage)[1] * recipe.length
    width = config.hidden_size
    layer = round((12 * width + 4 * inner_width(config)) * FP32 * (IN_BF16 if recipe.healing.dtype == "bf16" else 1))
    kept = layers * width * FP32 + layer if recipe.healing.gradient_checkpointing else layers * layer
    if stage in ("hidden-mse", "local"):
        return int(tokens * kept)
    originals = config.vocab_size + config.num_hidden_layers * width if stage == "distill" else 0
    return int(tokens * (kept + originals * FP32) + 5 * FP32 * min(LOGITS, tokens * config.vocab_size))


def inner_width(config: PreTrainedConfig) -> int:
    """The inner width of an MLP."""
    given = getattr(config, "intermediate_size", None) or getattr(config, "ffn_dim", None)
    return int(given or 4 * config.hidden_size)


def layers_removed(recipe: Recipe, layers: int) -> int:
    """The number of layers that the model loses; none where only the method knows."""
    if recipe.pruning.layers is not None:
        return len(parse_layers(recipe.pruning.layers, layers))
    return 0 if recipe.pruning.remove is None else parse_remove(recipe.pruning.remove, layers)


def _numbers(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())

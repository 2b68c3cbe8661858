"""Replacement `corrected`: after a removal, the output projections of what is left are fitted again, in closed form.

The corrections need no training and add nothing to the model. `fit_corrections` finds them before the edit, and
`apply.apply_plan` adds them to the weights (after SPRINT, arXiv 2506.03510).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import TypeAlias

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from optimum.streamline.errors import StreamlineError
from optimum.streamline.models.architectures import (
    architecture_of,
    can_pack,
    decoder_layers,
    has_norms_after,
    residual_scale,
    submodule,
)
from optimum.streamline.models.kept_tensor import KeptTensor
from optimum.streamline.models.offloaded_weights import changing, device_of, in_memory
from optimum.streamline.models.removed_sublayers import SublayerKey, SublayerSet, whole_layer
from optimum.streamline.models.skipped_sublayers import ATTENTION, MLP, skipped_of
from optimum.streamline.system.progress import progress_bar
from optimum.streamline.text.windows import BATCH, Windows

from .linear_map import NormalEquations
from .packing import look_ahead
from .plan import Plan
from .residual_stream import embeddings, run_layer

# The default ridge strength. Perplexities over the dense model's, measured on the reference model (16 layers) with
# corrections fitted on 24 windows of 256 tokens, on other text. Without the 4 layers that `auto` removes, and with a
# correction of the first MLP after each gap alone 1.169; with all, of strength 0.03: 1.130; 0.1: 1.123; 0.3: 1.117; 1:
# 1.114. Without 8 layers 1.678; 0.03: 1.507; 0.1: 1.492; 0.3: 1.484; 1: 1.501. Where each sublayer aims at the stream
# after itself, 0.3 gives 1.121 and 1.549.
STRENGTH = 0.3

Corrections: TypeAlias = Mapping[SublayerKey, KeptTensor]
"""What is added to the weight of a sublayer's output projection, `[inner, width]` in fp32, by the sublayer."""


@torch.inference_mode()
def fit_corrections(
    model: PreTrainedModel, removed: SublayerSet, windows: Windows, strength: float = STRENGTH
) -> Corrections:
    """Fit the output projections of the sublayers that stay again, from the one before the first gap on.

    A gap is a run of removed sublayers. Take a sublayer that stays. Let X `[tokens, inner]` be what its output
    projection reads in the pruned model, times the residual scale of the architecture, which is 1 for most. Let y
    `[tokens, width]` be the residual stream after the sublayer there, and h the residual stream of the original just
    before the next sublayer that stays: after the same sublayer, or after the gap behind it. Then

        D = argmin |y + X D - h|^2 + lambda |D|^2,    lambda = strength * trace(X^T X) / inner,

    with the solution D = (X^T X + lambda I)^-1 X^T (h - y), is added to the weight. So the ridge pulls the weight
    toward the original one. All tokens count alike, and biases stay as they are. Sublayers are fitted from the first to
    the last. X and y come from the pruned model whose earlier sublayers are corrected already, while h comes from the
    original. So each correction also reduces the errors that earlier ones leave. If a gap starts the model, the first
    sublayer that stays is the first to be corrected.

    It takes about the time of four forward passes and of one X^T X for each sublayer. Memory holds one matrix X^T X in
    float64 twice while it is solved, and all D. The hidden states of all windows at about four depths are in memory. If
    the weights are on disk, the states and all D are there too, and each layer is read for all windows at a time.

    Args:
        model: The original, in fp32 and in evaluation mode; it is unchanged.
        removed: The sublayers to remove, and those that the model skips already.
        windows: The text to fit on.
        strength: lambda as a multiple of the mean diagonal entry of X^T X.

    Returns:
        D, by the sublayer with the number of its layer in the original (`packing.look_ahead`).

    Raises:
        StreamlineError: no correction can be fitted to this model (`check_corrected`), or an output projection reads
            only zeros or numbers that are not finite.
    """
    check_corrected(model.config)
    skipped = skipped_of(model.config)
    targets = look_ahead(model.config.num_hidden_layers, removed, skipped)
    if not targets:
        return {}
    original = _Stream.of_embeddings(model, windows, skipped)
    original.move_to(min(removed.union(targets))[0])
    pruned = replace(original, removed=removed | skipped)
    corrections: dict[SublayerKey, KeptTensor] = {}
    with progress_bar("correcting attentions and MLPs", len(targets)) as bar:
        for sublayer, target in targets.items():
            pruned.move_to(sublayer[0], corrections)
            places = zip(pruned.batches, pruned.entering, original.after(target), strict=True)
            corrections[sublayer] = fit_projection(model, sublayer, places, pruned.removed, corrections, strength)
            bar.advance(1)
    return corrections


def fit_projection(
    model: PreTrainedModel,
    sublayer: SublayerKey,
    places: Iterable[tuple[torch.Tensor, KeptTensor, KeptTensor]],
    removed: SublayerSet,
    corrections: Corrections,
    strength: float,
) -> KeptTensor:
    """D of `fit_corrections` for one sublayer.

    Args:
        model: The original.
        sublayer: The sublayer.
        places: For each batch its token ids `[windows, length]`, the input of the sublayer's layer and h, both
            `[windows, length, width]`.
        removed: The sublayers that the pruned model lacks.
        corrections: The earlier corrections.
        strength: As in `fit_corrections`.

    Raises:
        StreamlineError: X has only zeros, or there are numbers that are not finite.
    """
    number, kind = sublayer
    projection, layer = _projection(model, sublayer), decoder_layers(model, architecture_of(model.config))[number]
    equations = NormalEquations.of_sizes(*_sizes(projection), device_of(model))
    scale, read = residual_scale(model.config), list[torch.Tensor]()
    reading = projection.register_forward_pre_hook(lambda _, args: read.append(args[0]))
    behind = removed | {(number, MLP)} if kind == ATTENTION else removed
    with in_memory(layer), corrected(model, of_layer(corrections, number)), reading:
        for ids, hidden, target in places:
            missing = target.read() - run_layer(model, ids, number, hidden.read(), behind)
            equations.add(read.pop() * scale, missing)
    fault = (
        f"replacement 'corrected': the {kind} of layer {number} computes only zeros or numbers that are not finite; "
        "use replacement none"
    )
    return KeptTensor(model, equations.solve(strength, fault).float().cpu())  # there may be many


def check_corrected(config: PreTrainedConfig) -> None:
    """Refuse an architecture that cannot be corrected.

    Raises:
        StreamlineError: the MLPs may be mixtures of experts, a norm stands between a sublayer and the residual stream,
            or attention and MLP read the same hidden state.
    """
    fault = ""
    if architecture_of(config).experts:
        fault = "has mixtures of experts, whose output is no linear function of one weight"
    elif has_norms_after(config):
        fault = "has a norm between its MLP and the residual stream"
    elif not can_pack(config):
        fault = "has parallel residual connections, so no MLP follows an attention"
    if fault:
        raise StreamlineError(
            f"replacement 'corrected': architecture {config.model_type!r} {fault}; use replacement none"
        )


def check_something_corrected(plan: Plan) -> None:
    """Refuse a plan with replacement `corrected` that corrects nothing.

    Raises:
        StreamlineError: the plan removes nothing but what the original skips already.
    """
    if plan.replacement == "corrected" and not plan.corrected:
        raise StreamlineError(
            f"replacement 'corrected': what is removed adds nothing in the original ({plan.describe()}), so nothing "
            "can be corrected; use replacement none"
        )


def of_layer(corrections: Corrections, layer: int) -> Corrections:
    """The corrections of one layer, of which there may be none."""
    return {sublayer: correction for sublayer, correction in corrections.items() if sublayer[0] == layer}


@contextmanager
def corrected(model: PreTrainedModel, corrections: Corrections) -> Iterator[None]:
    """Add corrections to the weights of `model` inside the `with` block, and restore the weights afterwards.

    Args:
        model: The model. Those of its layers that are corrected are in memory (`offloaded_weights.in_memory`).
        corrections: The corrections.
    """
    originals: list[tuple[nn.Module, nn.Parameter]] = []
    try:
        for sublayer, correction in corrections.items():
            projection = _projection(model, sublayer)
            weight = projection.get_parameter("weight")
            originals.append((projection, weight))
            projection.weight = nn.Parameter(weight + _laid_out(projection, correction.read()), requires_grad=False)
        yield
    finally:
        for projection, weight in originals:
            projection.weight = weight


@torch.no_grad()
def add_corrections(model: PreTrainedModel, corrections: Corrections) -> None:
    """Add corrections to the weights of `model`, in place."""
    for sublayer, correction in corrections.items():
        projection = _projection(model, sublayer)
        with changing(projection, ["weight"]):
            projection.get_parameter("weight").add_(_laid_out(projection, correction.read()))


def _projection(model: PreTrainedModel, sublayer: SublayerKey) -> nn.Module:
    """The output projection of a sublayer."""
    architecture, (layer, kind) = architecture_of(model.config), sublayer
    path = architecture.attention_out if kind == ATTENTION else architecture.mlp_out[0]
    return submodule(decoder_layers(model, architecture)[layer], path)


def _laid_out(projection: nn.Module, correction: torch.Tensor) -> torch.Tensor:
    """A correction `[inner, width]` with the axes in the order of the weight's."""
    weight = correction if isinstance(projection, Conv1D) else correction.T
    return weight.to(projection.get_parameter("weight").device)


def _sizes(projection: nn.Module) -> tuple[int, int]:
    """The numbers of columns that a projection reads and writes."""
    first, second = projection.get_parameter("weight").shape
    return (first, second) if isinstance(projection, Conv1D) else (second, first)


@dataclass
class _Stream:
    """The residual stream of a model without some sublayers, on all windows, as it goes from layer to layer.

    Args:
        model: The original.
        batches: The windows, as batches of token ids `[windows, length]`.
        removed: The sublayers that are left out.
        entering: The input of the layer `layer` on each batch, `[windows, length, width]`.
        layer: The layer before which the stream is.
        middle: The stream between the attention and the MLP of the layer before, if `after` was asked for it.
    """

    model: PreTrainedModel
    batches: Sequence[torch.Tensor]
    removed: SublayerSet
    entering: list[KeptTensor]
    layer: int = 0
    middle: list[KeptTensor] = field(default_factory=list)

    @classmethod
    def of_embeddings(cls, model: PreTrainedModel, windows: Windows, removed: SublayerSet) -> _Stream:
        """The stream before the first layer."""
        batches = [batch.to(device_of(model)) for batch in windows.ids.split(BATCH)]
        return cls(model, batches, removed, [KeptTensor(model, embeddings(model, ids)) for ids in batches])

    def after(self, sublayer: SublayerKey) -> list[KeptTensor]:
        """The stream after a sublayer, which is not left out; each call asks for a later sublayer."""
        layer, kind = sublayer
        self.move_to(layer)
        self.move_to(layer + 1, keep_middle=kind == ATTENTION)
        return self.middle if kind == ATTENTION else self.entering

    def move_to(self, layer: int, corrections: Corrections | None = None, keep_middle: bool = False) -> None:
        """Go on to the input of a layer, through corrected layers; nothing is done if the stream is there already."""
        while self.layer < layer:
            self.middle = []  # files of it are deleted before the next are written
            if not whole_layer(self.layer) <= self.removed:
                self._pass(of_layer(corrections or {}, self.layer), keep_middle)
            self.layer += 1

    def _pass(self, corrections: Corrections, keep_middle: bool) -> None:
        """Run the layer on all batches."""
        architecture = architecture_of(self.model.config)
        layer = decoder_layers(self.model, architecture)[self.layer]
        entering, self.entering = self.entering, []
        # What the norm of an MLP reads is the residual stream between attention and MLP (`check_corrected`).
        norm, seen = submodule(layer, architecture.mlp_norm), list[torch.Tensor]()
        seeing = norm.register_forward_pre_hook(lambda _, args: seen.append(args[0])) if keep_middle else nullcontext()
        with in_memory(layer), corrected(self.model, corrections), seeing:
            for ids, hidden in zip(self.batches, entering, strict=True):
                after = run_layer(self.model, ids, self.layer, hidden.read(), self.removed)
                self.entering.append(KeptTensor(self.model, after))
                self.middle += [KeptTensor(self.model, seen.pop().view_as(after))] if keep_middle else []

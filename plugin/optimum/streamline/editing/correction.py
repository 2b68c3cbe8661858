"""Replacement `corrected`: the output projection of the first MLP after each gap is fitted again, in closed form.

The corrections need no training and add nothing to the model. `fit_corrections` finds them before the edit, and
`apply.apply_plan` adds them to the weights. A greedy search fits those of each candidate (`fit_candidates`), to compare
candidates as they would be delivered (after SPRINT, arXiv 2506.03510).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
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
from optimum.streamline.models.removed_sublayers import SublayerSet
from optimum.streamline.models.skipped_sublayers import MLP, skipped_of
from optimum.streamline.system.progress import progress_bar
from optimum.streamline.text.windows import BATCH, Windows

from .linear_map import NormalEquations
from .packing import mlps_after_gaps
from .plan import Plan
from .residual_stream import embeddings, run_layer

# The default ridge strength. Perplexities over the dense model's, measured on the reference model (16 layers) with
# corrections fitted on 24 windows of 256 tokens, on other text. Without the 4 layers that SLEB removes 1.236; with
# linear maps 1.169; with corrections of strength 0.001: 1.155; 0.01: 1.152; 0.1: 1.143; 0.3: 1.139; 1: 1.142. Without 6
# layers 1.593; linear maps 1.416; 0.001: 1.392; 0.01: 1.387; 0.1: 1.367; 0.3: 1.358; 1: 1.364. Leaving the first 8
# tokens of each window out of the fit, or dividing each row by the norm of its target, changes 1.139 to 1.140.
STRENGTH = 0.3

Corrections: TypeAlias = Mapping[int, KeptTensor]
"""What is added to the weight of an MLP's output projection, `[inner, width]` in fp32, by the number of its layer."""


@dataclass(frozen=True)
class CandidateCorrections:
    """The corrections of several candidate removals.

    Args:
        before: Those of the model without any candidate, which a candidate shares in the layers before its own.
        candidates: Those of the model without each candidate, in order.
    """

    before: Corrections
    candidates: Sequence[Corrections]

    def part(self, indices: Sequence[int]) -> CandidateCorrections:
        """Those of some candidates."""
        return CandidateCorrections(self.before, [self.candidates[index] for index in indices])


@torch.inference_mode()
def fit_corrections(
    model: PreTrainedModel, removed: SublayerSet, windows: Windows, strength: float = STRENGTH
) -> Corrections:
    """Fit the output projection of the first MLP after each gap again.

    A gap is a run of removed sublayers. Take the first MLP after it that stays. Let X `[tokens, inner]` be what its
    output projection reads in the pruned model, times the residual scale of the architecture, which is 1 for most. Let
    y `[tokens, width]` be the residual stream after the MLP there, and h the residual stream at this place in the
    original. Then

        D = argmin |y + X D - h|^2 + lambda |D|^2,    lambda = strength * trace(X^T X) / inner,

    with the solution D = (X^T X + lambda I)^-1 X^T (h - y), is added to the weight. So the ridge pulls the weight
    toward the original one. All tokens count alike, and biases stay as they are. Gaps are fitted from the first to the
    last. X and y come from the model whose earlier gaps are corrected already, while h comes from the original. So each
    correction also reduces the errors that earlier ones leave.

    It takes about the time of three forward passes. Memory holds one matrix X^T X in float64 twice while it is solved.
    The hidden states of all windows at about four depths are in memory, or on disk if the weights are there; then each
    layer is read for all windows at a time.

    Args:
        model: The original, in fp32 and in evaluation mode; it is unchanged.
        removed: The sublayers to remove, and those that the model skips already.
        windows: The text to fit on.
        strength: lambda as a multiple of the mean diagonal entry of X^T X.

    Returns:
        D, by the original number of the MLP's layer. A gap that no MLP follows has none.

    Raises:
        StreamlineError: no correction can be fitted to this model (`check_corrected`), or an MLP computes only zeros or
            numbers that are not finite.
    """
    check_corrected(model.config)
    total = model.config.num_hidden_layers
    walk = _Walk.through(model, windows, removed, strength)
    with progress_bar("correcting MLPs", total) as bar:
        for layer in range(total):
            walk.move_to(layer + 1)
            bar.advance(1)
    return walk.corrections


@torch.inference_mode()
def fit_candidates(
    model: PreTrainedModel, windows: Windows, candidates: Sequence[SublayerSet], removed: SublayerSet
) -> CandidateCorrections:
    """Fit the corrections of several candidate removals, nearly as `fit_corrections` does for one.

    Only the layers from a candidate's first sublayer to the first MLP after its last are fitted for each candidate.
    Corrections of later MLPs are those of the model without any candidate.

    It takes the time of `fit_corrections`, and for each candidate the time of these layers and of one X^T X. The memory
    of the CPU also holds one D for each candidate, or the disk if the weights are there. On the reference model, a step
    of SLEB takes 2.4 times as long with corrections.

    Args:
        model: The original, in fp32 and in evaluation mode; it is unchanged.
        windows: The text to fit on.
        candidates: The sublayers to remove, one set for each candidate; none is empty.
        removed: The sublayers to remove in addition, for every candidate, and those that the model skips already.

    Raises:
        StreamlineError: as in `fit_corrections`.
    """
    check_corrected(model.config)
    walk = _Walk.through(model, windows, removed, STRENGTH)
    own: dict[int, Corrections] = {}
    with progress_bar(f"correcting {len(candidates)} removals", len(candidates)) as bar:
        for index in sorted(range(len(candidates)), key=lambda each: min(candidates[each])):
            walk.move_to(min(candidates[index])[0])
            own[index] = walk.corrections_without(candidates[index])
            bar.advance(1)
    walk.move_to(model.config.num_hidden_layers)
    return CandidateCorrections(
        walk.corrections,
        [
            {
                layer: correction
                for layer, correction in {**walk.corrections, **own[index]}.items()
                if (layer, MLP) not in candidate
            }
            for index, candidate in enumerate(candidates)
        ],
    )


def check_corrected(config: PreTrainedConfig) -> None:
    """Refuse an architecture whose MLPs cannot be corrected.

    Raises:
        StreamlineError: the MLPs may be mixtures of experts, a norm stands between an MLP and the residual stream, or
            attention and MLP read the same hidden state.
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


def check_something_follows(plan: Plan) -> None:
    """Refuse a plan with replacement `corrected` that corrects nothing.

    Raises:
        StreamlineError: no MLP follows what is removed.
    """
    if plan.replacement == "corrected" and not plan.corrected:
        raise StreamlineError(
            f"replacement 'corrected': no MLP is left after what is removed ({plan.describe()}), so nothing can be "
            "corrected; use replacement none, or keep the last layer"
        )


def of_layer(corrections: Corrections, layer: int) -> Corrections:
    """The correction of one layer, or nothing if it has none."""
    return {layer: corrections[layer]} if layer in corrections else {}


@contextmanager
def corrected(model: PreTrainedModel, corrections: Corrections) -> Iterator[None]:
    """Add corrections to the weights of `model` inside the `with` block, and restore the weights afterwards.

    Args:
        model: The model. Those of its layers that are corrected are in memory (`offloaded_weights.in_memory`).
        corrections: The corrections.
    """
    originals: list[tuple[nn.Module, nn.Parameter]] = []
    try:
        for layer, correction in corrections.items():
            projection = _projection(model, layer)
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
    for layer, correction in corrections.items():
        projection = _projection(model, layer)
        with changing(projection, ["weight"]):
            projection.get_parameter("weight").add_(_laid_out(projection, correction.read()))


def _projection(model: PreTrainedModel, layer: int) -> nn.Module:
    """The output projection of the MLP of a layer."""
    architecture = architecture_of(model.config)
    return submodule(decoder_layers(model, architecture)[layer], architecture.mlp_out[0])


def _laid_out(projection: nn.Module, correction: torch.Tensor) -> torch.Tensor:
    """A correction `[inner, width]` with the axes in the order of the weight's."""
    weight = correction if isinstance(projection, Conv1D) else correction.T
    return weight.to(projection.get_parameter("weight").device)


@dataclass
class _Walk:
    """A way through the layers of a model without some sublayers, with all windows, that fits corrections as it goes.

    Args:
        model: The original.
        batches: The windows, as batches of token ids.
        removed: The sublayers that are removed.
        strength: As in `fit_corrections`.
        original: The same way through the original; `None` for the original itself.
        to_fit: The layers whose MLPs are corrected.
        inputs: The input of each layer on each batch `[windows, length, width]`, for the layers that are still needed.
        corrections: The corrections so far.
    """

    model: PreTrainedModel
    batches: Sequence[torch.Tensor]
    removed: SublayerSet
    strength: float
    original: _Walk | None
    to_fit: Sequence[int]
    inputs: dict[int, list[KeptTensor]]
    corrections: dict[int, KeptTensor] = field(default_factory=dict)

    @classmethod
    def through(cls, model: PreTrainedModel, windows: Windows, removed: SublayerSet, strength: float) -> _Walk:
        """A walk from the embeddings on."""
        batches = [batch.to(device_of(model)) for batch in windows.ids.split(BATCH)]
        skipped = skipped_of(model.config)
        embedded = [KeptTensor(model, embeddings(model, ids)) for ids in batches]
        original = cls(model, batches, skipped, strength, None, (), {0: embedded})
        to_fit = mlps_after_gaps(model.config.num_hidden_layers, removed, skipped)
        return cls(model, batches, removed | skipped, strength, original, to_fit, {0: embedded})

    def input_of(self, layer: int) -> list[KeptTensor]:
        """The input of a layer; for the number of layers, the output of the last."""
        for index in range(max(self.inputs), layer):
            if index in self.to_fit:
                self._fit(index)
            entering = zip(self.batches, self.inputs[index], strict=True)
            with in_memory(self._layer(index)):
                self.inputs[index + 1] = [
                    KeptTensor(self.model, self._after(index, ids, hidden.read())) for ids, hidden in entering
                ]
        return self.inputs[layer]

    def move_to(self, layer: int) -> None:
        """Go on to the input of a layer, here and in the original, and free what lies before it."""
        for index in range(min(self.inputs), layer + 1):
            if self.original is not None:
                self.original.move_to(index)
            self.input_of(index)
            self.inputs = {each: inputs for each, inputs in self.inputs.items() if each >= index}

    def corrections_without(self, candidate: SublayerSet) -> Corrections:
        """The corrections of the layers from the first sublayer of a candidate to the first MLP after its last.

        The walk must not be past the candidate.
        """
        total, start = self.model.config.num_hidden_layers, min(candidate)[0]
        after_it = mlps_after_gaps(total, candidate, self.removed)
        after_all = mlps_after_gaps(total, self.removed | candidate, skipped_of(self.model.config))
        branch = _Walk(
            self.model,
            self.batches,
            self.removed | candidate,
            self.strength,
            self.original,
            [layer for layer in after_all if start <= layer <= max(after_it, default=-1)],
            {start: self.input_of(start)},
        )
        if after_it:
            branch.input_of(after_it[-1])
            branch._fit(after_it[-1])
        return branch.corrections

    def _fit(self, layer: int) -> None:
        assert self.original is not None, "the original is not corrected"
        projection, targets = _projection(self.model, layer), self.original.input_of(layer + 1)
        equations = NormalEquations.of_sizes(*_sizes(projection), device_of(self.model))
        scale, read = residual_scale(self.model.config), list[torch.Tensor]()
        reading = projection.register_forward_pre_hook(lambda _, args: read.append(args[0]))
        with in_memory(self._layer(layer)), reading:
            for ids, hidden, target in zip(self.batches, self.inputs[layer], targets, strict=True):
                missing = target.read() - self._after(layer, ids, hidden.read())
                equations.add(read.pop() * scale, missing)
        fault = (
            f"replacement 'corrected': the MLP of layer {layer} computes only zeros or numbers that are not finite; "
            "use replacement none"
        )
        found = equations.solve(self.strength, fault).float().cpu()  # a search holds many
        self.corrections[layer] = KeptTensor(self.model, found)

    def _after(self, layer: int, ids: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """The output of a layer on a batch, given its input."""
        with corrected(self.model, of_layer(self.corrections, layer)):
            return run_layer(self.model, ids, layer, hidden, self.removed)

    def _layer(self, index: int) -> nn.Module:
        return decoder_layers(self.model, architecture_of(self.model.config))[index]


def _sizes(projection: nn.Module) -> tuple[int, int]:
    """The numbers of columns that a projection reads and writes."""
    first, second = projection.get_parameter("weight").shape
    return (first, second) if isinstance(projection, Conv1D) else (second, first)

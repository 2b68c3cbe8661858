"""The corrections of candidate removals in a greedy search with replacement `corrected`.

A search compares candidates with a correction of the first MLP after each gap, because that is cheap. The plan that it
ends with gets all corrections (`correction.fit_corrections`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import nn
from transformers import PreTrainedModel

from optimum.streamline.models.architectures import architecture_of, decoder_layers
from optimum.streamline.models.kept_tensor import KeptTensor
from optimum.streamline.models.offloaded_weights import device_of, in_memory
from optimum.streamline.models.removed_sublayers import SublayerKey, SublayerSet
from optimum.streamline.models.skipped_sublayers import MLP, skipped_of
from optimum.streamline.system.progress import progress_bar
from optimum.streamline.text.windows import BATCH, Windows

from .correction import STRENGTH, Corrections, check_corrected, corrected, fit_projection, of_layer
from .packing import mlps_after_gaps
from .residual_stream import embeddings, run_layer


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
def fit_candidates(
    model: PreTrainedModel, windows: Windows, candidates: Sequence[SublayerSet], removed: SublayerSet
) -> CandidateCorrections:
    """Fit a correction of the first MLP after each gap, for several candidate removals.

    D is that of `fit_corrections` for an MLP, but h is the residual stream of the original after the same MLP, even if
    there is a gap behind it. Nothing else is corrected. A gap that no MLP follows has no correction.

    Only the layers from a candidate's first sublayer to the first MLP after its last are fitted for each candidate.
    Corrections of later MLPs are those of the model without any candidate.

    It takes the time of about three forward passes, and for each candidate the time of these layers and of one X^T X.
    The memory of the CPU also holds one D for each candidate, or the disk if the weights are there. On the reference
    model, a step of SLEB takes 2.4 times as long with corrections.

    Args:
        model: The original, in fp32 and in evaluation mode; it is unchanged.
        windows: The text to fit on.
        candidates: The sublayers to remove, one set for each candidate; none is empty.
        removed: The sublayers to remove in addition, for every candidate, and those that the model skips already.

    Raises:
        StreamlineError: as in `fit_corrections`.
    """
    check_corrected(model.config)
    walk = _Walk.through(model, windows, removed)
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
                sublayer: correction
                for sublayer, correction in {**walk.corrections, **own[index]}.items()
                if sublayer not in candidate
            }
            for index, candidate in enumerate(candidates)
        ],
    )


@dataclass
class _Walk:
    """A way through the layers of a model without some sublayers, with all windows, that fits corrections as it goes.

    Args:
        model: The original.
        batches: The windows, as batches of token ids.
        removed: The sublayers that are removed.
        original: The same way through the original; `None` for the original itself.
        to_fit: The layers whose MLPs are corrected.
        inputs: The input of each layer on each batch `[windows, length, width]`, for the layers that are still needed.
        corrections: The corrections so far.
    """

    model: PreTrainedModel
    batches: Sequence[torch.Tensor]
    removed: SublayerSet
    original: _Walk | None
    to_fit: Sequence[int]
    inputs: dict[int, list[KeptTensor]]
    corrections: dict[SublayerKey, KeptTensor] = field(default_factory=dict)

    @classmethod
    def through(cls, model: PreTrainedModel, windows: Windows, removed: SublayerSet) -> _Walk:
        """A walk from the embeddings on."""
        batches = [batch.to(device_of(model)) for batch in windows.ids.split(BATCH)]
        skipped = skipped_of(model.config)
        embedded = [KeptTensor(model, embeddings(model, ids)) for ids in batches]
        original = cls(model, batches, skipped, None, (), {0: embedded})
        to_fit = mlps_after_gaps(model.config.num_hidden_layers, removed, skipped)
        return cls(model, batches, removed | skipped, original, to_fit, {0: embedded})

    def input_of(self, layer: int) -> list[KeptTensor]:
        """The input of a layer; for the number of layers, the output of the last."""
        for index in range(max(self.inputs), layer):
            if index in self.to_fit:
                self._fit(index)
            entering = zip(self.batches, self.inputs[index], strict=True)
            with in_memory(self._layer(index)), corrected(self.model, of_layer(self.corrections, index)):
                self.inputs[index + 1] = [
                    KeptTensor(self.model, run_layer(self.model, ids, index, hidden.read(), self.removed))
                    for ids, hidden in entering
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
        places = zip(self.batches, self.inputs[layer], self.original.input_of(layer + 1), strict=True)
        fitted = fit_projection(self.model, (layer, MLP), places, self.removed, self.corrections, STRENGTH)
        self.corrections[layer, MLP] = fitted

    def _layer(self, index: int) -> nn.Module:
        return decoder_layers(self.model, architecture_of(self.model.config))[index]

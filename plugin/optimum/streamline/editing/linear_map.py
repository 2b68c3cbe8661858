"""Replacement `linear`: a linear map for each run of removed sublayers, folded into the sublayer before the run.

The maps have a closed form and need no training (ReplaceMe, arXiv 2505.02819). `fit_maps` finds them before the edit,
and `apply.apply_plan` calls `fold` when it removes them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from optimum.streamline.errors import StreamlineError
from optimum.streamline.models.architectures import (
    architecture_of,
    decoder_layers,
    has_norms_after,
    layer_output,
    residual_scale,
    submodule,
)
from optimum.streamline.models.offloaded_weights import changing, device_of
from optimum.streamline.models.removed_sublayers import SublayerKey, SublayerSet, without
from optimum.streamline.models.skipped_sublayers import ATTENTION, MLP, skipped_of
from optimum.streamline.system.progress import progress_bar
from optimum.streamline.text.windows import BATCH, Windows

from .packing import gaps
from .plan import Plan
from .residual_stream import stream_after

# The default ridge strength. Perplexities measured on the reference model (16 layers), with maps fitted on 64 windows
# of 256 tokens, on other text: one block of 4 layers removed without a map 41.7; strength 0: 39.9; 0.01: 39.7; 0.1:
# 39.5; 1: 40.0. A ridge toward zero instead of the identity: 39.6 at 0.1, 40.2 at 1, and above 41.7 for larger
# strengths. 4 scattered layers removed without maps 33.49; strength 0: 31.05; 0.01: 31.04; 0.1: 31.09; 1: 31.44.
STRENGTH = 0.1


@torch.inference_mode()
def fit_maps(
    model: PreTrainedModel, plan: Plan, calibration: Windows, strength: float = STRENGTH
) -> dict[SublayerKey, torch.Tensor]:
    """Fit one linear map T `[width, width]` for each run of removed sublayers (ReplaceMe, arXiv 2505.02819).

    Take a run of removed sublayers, and the sublayer p before it, an attention or an MLP. Let x `[tokens, width]` be
    the residual stream after p, M the part of x that p added, and h the residual stream of the original after the last
    sublayer of the run. Then

        T = argmin |(x - M) + M T - h|^2 + lambda |T - I|^2,    lambda = strength * trace(M^T M) / width,

    with the solution T = I + (M^T M + lambda I)^-1 M^T (h - x). M is the output m of p times the residual scale of the
    architecture, which is 1 for most. M^T M and M^T (h - x) are summed in float64, batch by batch.

    Deviations from ReplaceMe:

    - The ridge pulls T toward the identity, which means plain removal. A ridge toward zero would remove p too in every
      direction that the calibration text says little about.
    - Several runs are allowed, and fitted from the first to the last. x and M come from the model whose earlier runs
      are removed and patched already, while h comes from the original. So each map also corrects the errors of earlier
      ones.
    - A run may begin or end within a layer. ReplaceMe removes layers, so p is the MLP of the layer before.

    Args:
        model: The original, in fp32 and in evaluation mode; it is unchanged.
        plan: The plan, whose `sublayers_removed` the maps replace.
        calibration: The text to fit on.
        strength: lambda as a multiple of the mean diagonal entry of M^T M.

    Returns:
        T in float64, for row vectors (m T), by p.

    Raises:
        StreamlineError: no map can be folded into this model (`check_linear`), no sublayer is before a run, or a p adds
            only zeros or numbers that are not finite.
    """
    check_linear(model.config)
    skipped = skipped_of(model.config)
    removed = frozenset(plan.sublayers_removed) | skipped
    found = gaps(model.config.num_hidden_layers, plan.sublayers_removed, skipped)
    maps: dict[SublayerKey, torch.Tensor] = {}
    width: int = model.config.hidden_size
    with progress_bar("fitting linear maps", len(found) * len(calibration.ids)) as bar:
        for before, run in found:
            if before is None:
                raise StreamlineError(
                    "replacement 'linear': a linear map is folded into what comes before; keep layer 0"
                )
            equations = NormalEquations.of_sizes(width, width, device_of(model))
            for batch in calibration.ids.split(BATCH):
                ids = batch.to(device_of(model))
                written, stream = _patched_stream(model, ids, before, removed, maps)
                equations.add(written, _original_stream(model, ids, run[-1]) - stream)
                bar.advance(len(batch))
            identity = torch.eye(width, dtype=torch.float64, device=device_of(model))
            maps[before] = identity + equations.solve(
                strength,
                f"replacement 'linear': the {before[1]} of layer {before[0]} adds only zeros or numbers that are not "
                "finite; keep what comes after it, or use replacement none",
            )
    return maps


def check_linear(config: PreTrainedConfig) -> None:
    """Refuse an architecture that no linear map can be folded into.

    Raises:
        StreamlineError: the model normalises the output of its MLPs. A map folded into the MLP would then not be a
            linear map of what the MLP adds to the residual stream.
    """
    if has_norms_after(config):
        raise StreamlineError(
            f"replacement 'linear': architecture {config.model_type!r} has a norm between its MLP and the residual "
            "stream; use replacement none or layer"
        )


@torch.no_grad()
def fold(model: PreTrainedModel, of: SublayerKey, transform: torch.Tensor) -> None:
    """Fold a linear map into the output projection of a sublayer, in place: its output m becomes m T.

    Args:
        model: The model.
        of: The sublayer.
        transform: T `[width, width]`, from `fit_maps`.
    """
    module, axes = _output_parameters(model, of)
    with changing(module, [*axes]):
        for name, out_axis in axes.items():
            parameter = module.get_parameter(name)
            exact = torch.tensordot(parameter.double(), transform.to(parameter.device), dims=([out_axis], [0]))
            parameter.copy_(exact.movedim(-1, out_axis))


def _output_parameters(model: PreTrainedModel, of: SublayerKey) -> tuple[nn.Module, dict[str, int]]:
    """The output projection of a sublayer, and for its weight and bias the axis of length `width`."""
    architecture, (index, sublayer) = architecture_of(model.config), of
    layer = decoder_layers(model, architecture)[index]
    for path in (architecture.attention_out,) if sublayer == ATTENTION else architecture.mlp_out:
        parent, _, name = path.rpartition(".")
        with suppress(AttributeError):  # a layer has one of these paths: dense and mixture-of-experts layers differ
            found = getattr(submodule(layer, parent), name)
            if isinstance(found, nn.Parameter):
                return submodule(layer, parent), {name: 1}  # one tensor for all experts: [experts, width, inner]
            return found, {"weight": int(isinstance(found, Conv1D)), **({} if found.bias is None else {"bias": 0})}
    raise ValueError(f"{sublayer} of layer {index}: has no output projection where {architecture} says")


@dataclass
class NormalEquations:
    """The sums X^T X (`gram`) and X^T Y (`cross`) of a least-squares problem, in float64."""

    gram: torch.Tensor
    cross: torch.Tensor

    @classmethod
    def of_sizes(cls, read: int, written: int, device: torch.device) -> NormalEquations:
        """Empty sums, for X `[tokens, read]` and Y `[tokens, written]`."""
        sizes = ((read, read), (read, written))
        return cls(*(torch.zeros(*size, dtype=torch.float64, device=device) for size in sizes))

    def add(self, read: torch.Tensor, missing: torch.Tensor) -> None:
        """Add rows to X and to Y; the last axis of each holds the columns."""
        rows = read.flatten(0, -2).double()
        self.gram += rows.T @ rows
        self.cross += rows.T @ missing.flatten(0, -2).double()

    def solve(self, strength: float, fault: str) -> torch.Tensor:
        """argmin_D |X D - Y|^2 + lambda |D|^2, where lambda is `strength` times the mean diagonal entry of X^T X.

        lambda is added to `gram` in place, because a second matrix of its size may be larger than a layer.

        Returns:
            D `[read, written]`, in float64.

        Raises:
            StreamlineError: X has only zeros, or there are numbers that are not finite; the message is `fault`.
        """
        size = float(self.gram.diagonal().mean())
        if not 0 < size < float("inf") or not bool(self.cross.isfinite().all()):
            raise StreamlineError(fault)
        self.gram.diagonal().add_(strength * size)
        return torch.linalg.solve(self.gram, self.cross)  # type: ignore[no-any-return]


def _original_stream(model: PreTrainedModel, ids: torch.Tensor, last: SublayerKey) -> torch.Tensor:
    """h of `fit_maps`: the residual stream of the original after the sublayer `last`."""
    layer, sublayer = last
    with without(model, frozenset({(layer, MLP)}) if sublayer == ATTENTION else frozenset()):
        return stream_after(model, ids, layer)


def _patched_stream(
    model: PreTrainedModel,
    ids: torch.Tensor,
    before: SublayerKey,
    removed: SublayerSet,
    maps: Mapping[SublayerKey, torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor]:
    """M and x of `fit_maps` for the sublayer p = `before`, without the `removed` ones and with `maps` applied."""
    written: list[torch.Tensor] = []

    def keep(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        written.append(layer_output(output))

    modules = {each: _module(model, each) for each in (*maps, before)}
    with ExitStack() as hooks, without(model, removed):
        for each, transform in maps.items():
            hooks.enter_context(modules[each].register_forward_hook(_mapped_by(transform)))
        hooks.enter_context(modules[before].register_forward_hook(keep))
        stream = stream_after(model, ids, before[0])
    return written[0].reshape(stream.shape) * residual_scale(model.config), stream


def _module(model: PreTrainedModel, of: SublayerKey) -> nn.Module:
    """The module of a sublayer whose output is added to the residual stream."""
    architecture, (layer, sublayer) = architecture_of(model.config), of
    name = architecture.attention if sublayer == ATTENTION else architecture.mlp[-1]
    return submodule(decoder_layers(model, architecture)[layer], name)


def _mapped_by(transform: torch.Tensor) -> Callable[[nn.Module, tuple[Any, ...], Any], Any]:
    def mapped(_: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        result = layer_output(output) @ transform.to(layer_output(output).dtype)
        return (result, *output[1:]) if isinstance(output, tuple) else result

    return mapped

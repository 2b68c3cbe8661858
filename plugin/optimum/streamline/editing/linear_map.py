"""Replacement `linear`: a linear map for each run of removed layers, folded into the MLP of the layer before the run.

The maps have a closed form and need no training (ReplaceMe, arXiv 2505.02819). `fit_maps` finds them before the edit,
and `apply.apply_plan` calls `fold` when it removes the layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from optimum.streamline.errors import StreamlineError
from optimum.streamline.models.architectures import (
    Architecture,
    architecture_of,
    decoder_layers,
    has_norms_after,
    layer_output,
    residual_scale,
    submodule,
)
from optimum.streamline.system.progress import progress_bar
from optimum.streamline.text.windows import BATCH, Windows

from .plan import Plan, runs_of

# The default ridge strength. Perplexities measured on the reference model (16 layers), with maps fitted on 64 windows
# of 256 tokens, on other text: one block of 4 layers removed without a map 41.7; strength 0: 39.9; 0.01: 39.7; 0.1:
# 39.5; 1: 40.0. A ridge toward zero instead of the identity: 39.6 at 0.1, 40.2 at 1, and above 41.7 for larger
# strengths. 4 scattered layers removed without maps 33.49; strength 0: 31.05; 0.01: 31.04; 0.1: 31.09; 1: 31.44.
STRENGTH = 0.1


@torch.inference_mode()
def fit_maps(
    model: PreTrainedModel, plan: Plan, calibration: Windows, strength: float = STRENGTH
) -> dict[int, torch.Tensor]:
    """Fit one linear map T `[width, width]` for each run of removed layers (ReplaceMe, arXiv 2505.02819).

    Take a run of removed layers, and the layer p before it. Let x `[tokens, width]` be the residual stream after p, M
    the part of x that the MLP of p added, and h the residual stream of the original after the last layer of the run.
    Then

        T = argmin |(x - M) + M T - h|^2 + lambda |T - I|^2,    lambda = strength * trace(M^T M) / width,

    with the solution T = I + (M^T M + lambda I)^-1 M^T (h - x). M is the output m of the MLP times the residual scale
    of the architecture, which is 1 for most. M^T M and M^T (h - x) are summed in float64, batch by batch.

    Deviations from ReplaceMe:

    - The ridge pulls T toward the identity, which means plain removal. A ridge toward zero would remove the MLP of p
      too in every direction that the calibration text says little about.
    - Several runs are allowed, and fitted from the first to the last. x and M come from the model whose earlier runs
      are removed and patched already, while h comes from the original. So each map also corrects the errors of earlier
      ones.

    Args:
        model: The original, in fp32 and in evaluation mode; it is unchanged.
        plan: The plan, whose `removed` layers the maps replace.
        calibration: The text to fit on.
        strength: lambda as a multiple of the mean diagonal entry of M^T M.

    Returns:
        T in float64, for row vectors (m T), by the original number of the layer p.

    Raises:
        StreamlineError: no map can be folded into this model (`check_linear`), layer 0 is removed, or the MLP of a
            layer p adds only zeros or numbers that are not finite.
    """
    check_linear(model.config)
    runs = runs_of(plan.removed)
    if 0 in plan.removed:
        raise StreamlineError("replacement 'linear': a linear map is folded into the layer before; keep layer 0")
    maps: dict[int, torch.Tensor] = {}
    width: int = model.config.hidden_size
    with progress_bar("fitting linear maps", len(runs) * len(calibration.ids)) as bar:
        for run in runs:
            layer = run[0] - 1
            equations = NormalEquations.of_sizes(width, width, model.device)
            for batch in calibration.ids.split(BATCH):
                ids = batch.to(model.device)
                written, stream = _patched_stream(model, ids, layer, plan.removed, maps)
                equations.add(written, stream_after(model, ids, run[-1]) - stream)
                bar.advance(len(batch))
            identity = torch.eye(width, dtype=torch.float64, device=model.device)
            maps[layer] = identity + equations.solve(
                strength,
                f"replacement 'linear': the MLP of layer {layer} adds only zeros or numbers that are not finite; keep "
                "the layer after it, or use replacement none",
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
def fold(layer: nn.Module, architecture: Architecture, transform: torch.Tensor) -> None:
    """Fold a linear map into the output projection of a layer's MLP, in place: its output m becomes m T.

    Args:
        layer: A decoder layer.
        architecture: The architecture of its model.
        transform: T `[width, width]`, from `fit_maps`.
    """
    for parameter, out_axis in output_parameters(layer, architecture):
        exact = torch.tensordot(parameter.double(), transform.to(parameter.device), dims=([out_axis], [0]))
        parameter.copy_(exact.movedim(-1, out_axis))


def output_parameters(layer: nn.Module, architecture: Architecture) -> Iterator[tuple[nn.Parameter, int]]:
    """The weight and bias of the MLP's output projection, each with the axis of length `width`."""
    for path in architecture.mlp_out:
        parent, _, name = path.rpartition(".")
        with suppress(AttributeError):  # a layer has one of these paths: dense and mixture-of-experts layers differ
            found = getattr(submodule(layer, parent), name)
            if isinstance(found, nn.Parameter):
                yield found, 1  # one tensor for all experts: [experts, width, inner]
                return
            yield found.weight, 1 if isinstance(found, Conv1D) else 0
            if found.bias is not None:
                yield found.bias, 0
            return


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
        """Add the rows of X and of Y, whose last axis is that of the columns."""
        rows = read.flatten(0, -2).double()
        self.gram += rows.T @ rows
        self.cross += rows.T @ missing.flatten(0, -2).double()

    def solve(self, strength: float, fault: str) -> torch.Tensor:
        """argmin_D |X D - Y|^2 + lambda |D|^2, where lambda is `strength` times the mean diagonal entry of X^T X.

        Returns:
            D `[read, written]`, in float64.

        Raises:
            StreamlineError: X has only zeros, or there are numbers that are not finite; the message is `fault`.
        """
        size = float(self.gram.diagonal().mean())
        if not 0 < size < float("inf") or not bool(self.cross.isfinite().all()):
            raise StreamlineError(fault)
        identity = torch.eye(len(self.gram), dtype=torch.float64, device=self.gram.device)
        return torch.linalg.solve(self.gram + strength * size * identity, self.cross)  # type: ignore[no-any-return]


class _StopForward(Exception):
    """Ends a forward pass early."""


def stream_after(model: PreTrainedModel, ids: torch.Tensor, layer: int) -> torch.Tensor:
    """The raw residual stream `[batch, length, width]` after a layer; the layers after it do not run."""
    seen: list[torch.Tensor] = []

    def keep(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        seen.append(layer_output(output))
        raise _StopForward

    layers = decoder_layers(model, architecture_of(model.config))
    with _hooks_removed_afterwards([layers[layer].register_forward_hook(keep)]), suppress(_StopForward):
        model.base_model(ids, use_cache=False)
    return seen[0]


def _patched_stream(
    model: PreTrainedModel, ids: torch.Tensor, layer: int, removed: Sequence[int], maps: dict[int, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """M and x of `fit_maps` for layer p = `layer`, with the earlier `removed` layers skipped and `maps` applied."""
    architecture = architecture_of(model.config)
    layers = decoder_layers(model, architecture)
    written: list[torch.Tensor] = []

    def keep(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        written.append(layer_output(output))

    hooks = [layers[index].register_forward_hook(_return_input, with_kwargs=True) for index in removed if index < layer]
    hooks += [_mlp(layers[index], architecture).register_forward_hook(_mapped_by(maps[index])) for index in maps]
    hooks.append(_mlp(layers[layer], architecture).register_forward_hook(keep))
    with _hooks_removed_afterwards(hooks):
        stream = stream_after(model, ids, layer)
    return written[0].reshape(stream.shape) * residual_scale(model.config), stream


def _mlp(layer: nn.Module, architecture: Architecture) -> nn.Module:
    return submodule(layer, architecture.mlp[-1])


def _return_input(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    hidden = args[0] if args else kwargs["hidden_states"]
    return (hidden, *output[1:]) if isinstance(output, tuple) else hidden


def _mapped_by(transform: torch.Tensor) -> Callable[[nn.Module, tuple[Any, ...], Any], Any]:
    def mapped(_: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        result = layer_output(output) @ transform.to(layer_output(output).dtype)
        return (result, *output[1:]) if isinstance(output, tuple) else result

    return mapped


@contextmanager
def _hooks_removed_afterwards(hooks: Sequence[Any]) -> Iterator[None]:
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()

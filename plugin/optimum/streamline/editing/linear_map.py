"""Linear maps that stand in for removed layers, found in closed form and folded into the layer before each gap.

ReplaceMe's idea (arXiv 2505.02819): a training-free linear map at the cut. It chooses no layers and moves none: what
is removed is the plan's affair, and `apply.apply_plan` does the removing and calls `fold` here.
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

# Measured on the reference model, fitted on 64 windows of 256 tokens and judged on other text, perplexity there (plain
# removal; strength 0, 0.01, 0.1, 1): one block of 4 of 16 layers 41.7; 39.9, 39.7, 39.5, 40.0. Toward zero instead, at
# 0.1 and 1: 39.6, 40.2, and past plain removal from there on. 4 scattered layers: 33.49; 31.05, 31.04, 31.09, 31.44.
STRENGTH = 0.1


@torch.inference_mode()
def fit_maps(
    model: PreTrainedModel, plan: Plan, calibration: Windows, strength: float = STRENGTH
) -> dict[int, torch.Tensor]:
    """For each layer before a gap, the map T `[width, width]` that makes up best for the layers behind it.

    For every run of removed layers, with p the layer before it, x `[tokens, width]` the stream after p, M the part of x
    that p's MLP wrote (M = s m, with m the MLP's output and s what the architecture multiplies it by), and h the
    original's raw stream after the run's last layer,

        T = argmin |(x - M) + M T - h|^2 + lambda |T - I|^2,    lambda = strength * trace(M^T M) / width,

    which is T = I + (M^T M + lambda I)^-1 M^T (h - x). The pull is toward the identity, which is plain removal, and not
    toward zero, which would remove p's MLP as well: where calibration text says little of a direction, what p did
    there stays. M^T M and M^T (h - x) are summed up in float64, batch by batch; no hidden states are kept.

    Several runs are patched front to back: x and M are those of the model whose earlier runs are removed and patched
    already, while h is always the original's, so that each map also corrects what the ones before it left.

    The map, estimated on calibration text and merged into the layer before the cut, is that of ReplaceMe (arXiv
    2505.02819); the pull toward the identity, its size and the treatment of several runs are this program's.

    Args:
        model: The original, in fp32, in evaluation mode, which stays as it is.
        plan: Its `gone` are the layers removed.
        strength: The ridge's size as a share of the mean square that the MLP writes into a channel.

    Returns:
        T by the original number of the layer whose MLP it is folded into, in float64; row vectors, as in m T.

    Raises:
        StreamlineError: `check_linear`'s, layer 0 is removed, or an MLP writes nothing or nothing finite.
    """
    check_linear(model.config)
    runs = runs_of(plan.gone)
    if 0 in plan.gone:
        raise StreamlineError("replacement 'linear': a linear map needs a layer before each gap; leave layer 0")
    maps: dict[int, torch.Tensor] = {}
    with progress_bar("fitting linear maps", len(runs) * len(calibration.ids)) as bar:
        for run in runs:
            layer = run[0] - 1
            fit = _Fit.of_width(model.config.hidden_size, model.device)
            for batch in calibration.ids.split(BATCH):
                ids = batch.to(model.device)
                written, stream = _patched_stream(model, ids, layer, plan.gone, maps)
                fit.add(written, _stream_after(model, ids, run[-1]) - stream)
                bar.advance(len(batch))
            maps[layer] = fit.solve(layer, strength)
    return maps


def check_linear(config: PreTrainedConfig) -> None:
    """Refuse a model that no linear map can be folded into.

    Raises:
        StreamlineError: a norm stands between the MLP and the residual stream, so that no map of the MLP's output
            projection is a map of what is added.
    """
    if has_norms_after(config):
        raise StreamlineError(
            f"replacement 'linear': architecture {config.model_type!r} has a norm between its MLP and the residual "
            "stream; use replacement none or layer"
        )


@torch.no_grad()
def fold(layer: nn.Module, architecture: Architecture, transform: torch.Tensor) -> None:
    """Make a layer's MLP write m T where it wrote m, in place: into weight and bias of its output projection.

    Args:
        transform: T `[width, width]`, as `fit_maps` gives it.
    """
    for parameter, out_axis in _output_parameters(layer, architecture):
        exact = torch.tensordot(parameter.double(), transform.to(parameter.device), dims=([out_axis], [0]))
        parameter.copy_(exact.movedim(-1, out_axis))


def _output_parameters(layer: nn.Module, architecture: Architecture) -> Iterator[tuple[nn.Parameter, int]]:
    """The parameters whose products make up the MLP's output, each with the axis that is the stream's width."""
    for path in architecture.mlp_out:
        parent, _, name = path.rpartition(".")
        with suppress(AttributeError):  # layers of one architecture differ: each has one of the paths
            found = getattr(submodule(layer, parent), name)
            if isinstance(found, nn.Parameter):
                yield found, 1  # all experts' [experts, width, inner]
                return
            yield found.weight, 1 if isinstance(found, Conv1D) else 0
            if found.bias is not None:
                yield found.bias, 0
            return


@dataclass
class _Fit:
    """Normal equations, summed up in float64."""

    gram: torch.Tensor
    cross: torch.Tensor

    @classmethod
    def of_width(cls, width: int, device: torch.device) -> _Fit:
        return cls(*(torch.zeros(width, width, dtype=torch.float64, device=device) for _ in range(2)))

    def add(self, written: torch.Tensor, missing: torch.Tensor) -> None:
        rows = written.flatten(0, -2).double()
        self.gram += rows.T @ rows
        self.cross += rows.T @ missing.flatten(0, -2).double()

    def solve(self, layer: int, strength: float) -> torch.Tensor:
        size = float(self.gram.diagonal().mean())
        if not 0 < size < float("inf") or not bool(self.cross.isfinite().all()):
            raise StreamlineError(
                f"replacement 'linear': the MLP of layer {layer} writes nothing, or nothing finite, to be mapped; "
                f"remove other layers than those behind it, or use replacement none"
            )
        identity = torch.eye(len(self.gram), dtype=torch.float64, device=self.gram.device)
        solved: torch.Tensor = torch.linalg.solve(self.gram + strength * size * identity, self.cross)
        return identity + solved


class _StopForward(Exception):
    """Ends a forward pass: what comes after is not needed."""


def _stream_after(model: PreTrainedModel, ids: torch.Tensor, layer: int) -> torch.Tensor:
    """The raw stream `[batch, length, width]` after a layer; the layers behind it are not run."""
    seen: list[torch.Tensor] = []

    def keep(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        seen.append(layer_output(output))
        raise _StopForward

    layers = decoder_layers(model, architecture_of(model.config))
    with _removed_afterwards([layers[layer].register_forward_hook(keep)]), suppress(_StopForward):
        model.base_model(ids, use_cache=False)
    return seen[0]


def _patched_stream(
    model: PreTrainedModel, ids: torch.Tensor, layer: int, gone: Sequence[int], maps: dict[int, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """What a layer's MLP adds, and the stream after the layer, with the gaps before it closed and patched."""
    architecture = architecture_of(model.config)
    layers = decoder_layers(model, architecture)
    written: list[torch.Tensor] = []

    def keep(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        written.append(layer_output(output))

    hooks = [layers[index].register_forward_hook(_pass_on, with_kwargs=True) for index in gone if index < layer]
    hooks += [_mlp(layers[index], architecture).register_forward_hook(_mapped_by(maps[index])) for index in maps]
    hooks.append(_mlp(layers[layer], architecture).register_forward_hook(keep))
    with _removed_afterwards(hooks):
        stream = _stream_after(model, ids, layer)
    return written[0].reshape(stream.shape) * residual_scale(model.config), stream


def _mlp(layer: nn.Module, architecture: Architecture) -> nn.Module:
    return submodule(layer, architecture.mlp[-1])


def _pass_on(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    hidden = args[0] if args else kwargs["hidden_states"]
    return (hidden, *output[1:]) if isinstance(output, tuple) else hidden


def _mapped_by(transform: torch.Tensor) -> Callable[[nn.Module, tuple[Any, ...], Any], Any]:
    def mapped(_: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        result = layer_output(output) @ transform.to(layer_output(output).dtype)
        return (result, *output[1:]) if isinstance(output, tuple) else result

    return mapped


@contextmanager
def _removed_afterwards(hooks: Sequence[Any]) -> Iterator[None]:
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()

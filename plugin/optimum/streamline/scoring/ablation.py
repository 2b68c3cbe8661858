"""What the loss would be without some layers or sublayers: tried for many candidates, the model left as it was.

What stands before a candidate computes the same for all that come after it, so it runs once a batch and its output
is kept: trying all L layers one by one costs L/2 forward passes and not L. The model's own forward is what runs, with
stand-ins in its list of layers, so that masks, positions, norms and caps stay its business. Knows no method.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TypeAlias

import torch
from torch import nn
from transformers import PreTrainedModel

from optimum.streamline.models.architectures import Sublayer, architecture_of, decoder_layers
from optimum.streamline.models.skipped_sublayers import ATTENTION, MLP, replace_sublayer
from optimum.streamline.system.progress import progress_bar
from optimum.streamline.text.windows import BATCH, Windows

from .loss import cross_entropy_sum, mean_losses

Parts: TypeAlias = frozenset[tuple[int, Sublayer]]
"""Sublayers, as (layer, sublayer). A layer with both is a whole layer, its norms included."""


class _Stored(nn.Module):
    """Stands in for a layer before a candidate: gives what is known to come out before the candidate."""

    def __init__(self, hidden: torch.Tensor) -> None:
        super().__init__()
        self.hidden = hidden

    def forward(self, hidden_states: torch.Tensor, *_: object, **__: object) -> torch.Tensor:
        """The stored hidden states `[batch, length, width]`, whatever comes in."""
        return self.hidden


class _Passing(nn.Module):
    """Stands in for a layer that is gone."""

    def forward(self, hidden_states: torch.Tensor, *_: object, **__: object) -> torch.Tensor:
        """What comes in: `[batch, length, width]`."""
        return hidden_states


def whole_layer(layer: int) -> Parts:
    """A layer, as parts."""
    return frozenset({(layer, ATTENTION), (layer, MLP)})


def gone_layers(parts: Parts) -> tuple[int, ...]:
    """The layers of which nothing is left without `parts`, rising."""
    return tuple(sorted({layer for layer, _ in parts if whole_layer(layer) <= parts}))


@torch.inference_mode()
def removal_losses(
    model: PreTrainedModel, windows: Windows, candidates: Sequence[Parts], removed: Parts = frozenset()
) -> list[float]:
    """The mean next-token cross-entropy of `model` without `removed` and each of `candidates`, nats per token.

    A sublayer that is out writes nothing into the residual stream, a layer that is out passes it on; those that stay
    keep their own kind (window, rotation, experts). Memory holds the hidden states of one batch at every depth.

    Args:
        candidates: What to try, each on its own, none empty.
        removed: What is out in every trial.

    Returns:
        One loss a candidate, infinite where it is not a number.

    Raises:
        StreamlineError: no candidate's loss is finite.
    """
    starts = [min(layer for layer, _ in candidate) for candidate in candidates]
    total = torch.zeros(len(candidates), dtype=torch.float64)
    with progress_bar(f"trying {len(candidates)} removals", len(windows.ids)) as bar:
        for batch in windows.ids.split(BATCH):
            ids = batch.to(model.device)
            depths = layer_inputs(model, ids, max(starts), removed)
            for index, (candidate, start) in enumerate(zip(candidates, starts, strict=True)):
                with without(model, removed | candidate, start, depths[start]):
                    total[index] += cross_entropy_sum(model, ids).cpu()
            bar.advance(len(batch))
    return mean_losses(total, windows, "whatever is removed")


def layer_inputs(
    model: PreTrainedModel, ids: torch.Tensor, last: int, removed: Parts = frozenset()
) -> list[torch.Tensor]:
    """What goes into layers 0 to `last` without `removed`, each `[windows, length, width]`.

    Nothing beyond is computed.
    """
    layers = decoder_layers(model, architecture_of(model.config))
    beyond = frozenset().union(*(whole_layer(layer) for layer in range(last, len(layers))))
    depths: list[torch.Tensor] = []
    with without(model, removed | beyond), ExitStack() as hooks:
        for layer in layers[: last + 1]:
            hook = layer.register_forward_pre_hook(lambda _, args: depths.append(args[0]))
            hooks.callback(hook.remove)
        model.base_model(ids, use_cache=False)
    return depths


@contextmanager
def without(model: PreTrainedModel, parts: Parts, start: int = 0, hidden: torch.Tensor | None = None) -> Iterator[None]:
    """Take `parts` out of `model`, and all before layer `start`, into which goes `hidden`; put back what was there."""
    architecture = architecture_of(model.config)
    layers = decoder_layers(model, architecture)
    whole = list(layers)
    taken: list[tuple[nn.Module, dict[str, nn.Module]]] = []
    try:
        for index, layer in enumerate(whole):
            if index < start and hidden is not None:
                layers[index] = _Stored(hidden)
            elif whole_layer(index) <= parts:
                layers[index] = _Passing()
            else:
                taken += [(layer, replace_sublayer(layer, architecture, kind)) for at, kind in parts if at == index]
        yield
    finally:
        for index, layer in enumerate(whole):
            layers[index] = layer
        for layer, modules in taken:
            for name, module in modules.items():
                setattr(layer, name, module)

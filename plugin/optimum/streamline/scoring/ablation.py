"""The loss of a model without some of its layers or sublayers, for many candidate removals.

The layers before a candidate compute the same for every candidate. So they run once a batch, and their output is kept:
trying each of L layers costs about L/2 forward passes, not L. The model's own forward runs throughout, with placeholder
modules in its list of layers. Masks, positions, norms and logit caps are therefore the model's own.
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

SublayerSet: TypeAlias = frozenset[tuple[int, Sublayer]]
"""Sublayers, each as (layer number, sublayer). Both sublayers of a layer mean the whole layer, with its norms."""


class _StoredOutput(nn.Module):
    """Placeholder for a layer before the candidate: returns the hidden states that enter the candidate."""

    def __init__(self, hidden: torch.Tensor) -> None:
        super().__init__()
        self.hidden = hidden

    def forward(self, hidden_states: torch.Tensor, *_: object, **__: object) -> torch.Tensor:
        """Return the stored hidden states `[batch, length, width]`; the input is ignored."""
        return self.hidden


class _Identity(nn.Module):
    """Placeholder for a removed layer: returns its input."""

    def forward(self, hidden_states: torch.Tensor, *_: object, **__: object) -> torch.Tensor:
        """Return `hidden_states` `[batch, length, width]`."""
        return hidden_states


def whole_layer(layer: int) -> SublayerSet:
    """Both sublayers of layer number `layer`."""
    return frozenset({(layer, ATTENTION), (layer, MLP)})


def fully_removed_layers(removed: SublayerSet) -> tuple[int, ...]:
    """The layers whose attention and MLP are both in `removed`, in rising order."""
    return tuple(sorted({layer for layer, _ in removed if whole_layer(layer) <= removed}))


@torch.inference_mode()
def removal_losses(
    model: PreTrainedModel, windows: Windows, candidates: Sequence[SublayerSet], removed: SublayerSet = frozenset()
) -> list[float]:
    """The loss of `model` after each of several removals: mean next-token cross-entropy, in nats per token.

    A removed sublayer adds nothing to the residual stream. A removed layer passes the residual stream on. The other
    layers keep their own attention window, rotary embedding and experts. `model` is unchanged afterwards. Memory holds
    the hidden states of one batch after every layer.

    Args:
        model: The model, in evaluation mode.
        windows: The text to compute the loss on.
        candidates: The sublayers to remove, one set for each loss; none is empty.
        removed: Sublayers to remove in addition, for every candidate.

    Returns:
        One loss for each candidate, in order; infinite where the loss is not a number.

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
    return mean_losses(total, windows, "removal")


def layer_inputs(
    model: PreTrainedModel, ids: torch.Tensor, last: int, removed: SublayerSet = frozenset()
) -> list[torch.Tensor]:
    """The input of each of the layers 0 to `last`, in a model without the sublayers `removed`.

    Args:
        model: The model, in evaluation mode; it is unchanged afterwards.
        ids: Token ids `[windows, length]`.
        last: Number of the last layer to run up to; later layers are not computed.
        removed: Sublayers to leave out.

    Returns:
        `last` + 1 tensors of hidden states `[windows, length, width]`.
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
def without(
    model: PreTrainedModel, removed: SublayerSet, start: int = 0, hidden: torch.Tensor | None = None
) -> Iterator[None]:
    """Remove sublayers from `model` inside the `with` block, and restore them afterwards.

    Args:
        model: The model to change in place.
        removed: The sublayers to remove.
        start: The first layer to run, where `hidden` is given; the layers before it are not computed.
        hidden: The input of layer `start`, `[windows, length, width]`.
    """
    architecture = architecture_of(model.config)
    layers = decoder_layers(model, architecture)
    original_layers = list(layers)
    dropped: list[tuple[nn.Module, dict[str, nn.Module]]] = []
    try:
        for index, layer in enumerate(original_layers):
            if index < start and hidden is not None:
                layers[index] = _StoredOutput(hidden)
            elif whole_layer(index) <= removed:
                layers[index] = _Identity()
            else:
                dropped += [
                    (layer, replace_sublayer(layer, architecture, kind)) for number, kind in removed if number == index
                ]
        yield
    finally:
        for index, layer in enumerate(original_layers):
            layers[index] = layer
        for layer, modules in dropped:
            for name, module in modules.items():
                setattr(layer, name, module)

"""The loss of a model without some of its layers or sublayers, for many candidate removals.

The layers before a candidate compute the same for every candidate. So they run once a batch, and their output is kept:
trying each of L layers costs about L/2 forward passes, not L. Where the weights are on disk, all candidates go through
a layer before the next one is read.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack

import torch
from transformers import PreTrainedModel

from optimum.streamline.editing.candidate_corrections import CandidateCorrections
from optimum.streamline.editing.correction import corrected, fit_corrections, of_layer
from optimum.streamline.editing.residual_stream import embeddings, run_layer
from optimum.streamline.models.architectures import architecture_of, decoder_layers
from optimum.streamline.models.offloaded_weights import device_of, in_memory, is_offloaded
from optimum.streamline.models.removed_sublayers import SublayerSet, whole_layer, without
from optimum.streamline.system.progress import progress_bar
from optimum.streamline.text.windows import BATCH, Windows

from .loss import mean_losses, stream_losses, window_losses

STREAMS = 1 << 26
"""The most numbers in the hidden states of all candidates at one depth, but for a single window: 268 MB in fp32."""


@torch.inference_mode()
def removal_losses(
    model: PreTrainedModel,
    windows: Windows,
    candidates: Sequence[SublayerSet],
    removed: SublayerSet = frozenset(),
    corrections: CandidateCorrections | None = None,
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
        corrections: The corrections of the model without each candidate; `None` corrects nothing.

    Returns:
        One loss for each candidate, in order; infinite where the loss is not a number.

    Raises:
        StreamlineError: no candidate's loss is finite.
    """
    total = torch.zeros(len(candidates), dtype=torch.float64)
    with progress_bar(f"trying {len(candidates)} removals", len(windows.ids)) as bar:
        for batch in windows.ids.split(BATCH):
            total += removal_window_losses(model, batch, candidates, removed, corrections).sum(1)
            bar.advance(len(batch))
    return mean_losses(total, windows, "removal")


def corrected_losses(
    model: PreTrainedModel, windows: Windows, removals: Sequence[SublayerSet], fitted_on: Windows
) -> list[float]:
    """The loss of `model` after each of several removals and all its corrections (`correction.fit_corrections`).

    So a removal is judged as it would be delivered. That takes longer than the corrections of a search
    (`candidate_corrections.fit_candidates`).

    Args:
        model: The model, in evaluation mode.
        windows: The text to compute the loss on.
        removals: The sublayers to remove, one set for each loss; none is empty.
        fitted_on: The text that corrections are fitted on.

    Returns:
        As `removal_losses`. Memory holds the corrections of one removal at a time.

    Raises:
        StreamlineError: the loss is not finite.
    """
    return [_corrected_loss(model, windows, removal, fitted_on) for removal in removals]


def _corrected_loss(model: PreTrainedModel, windows: Windows, removal: SublayerSet, fitted_on: Windows) -> float:
    fitted = fit_corrections(model, removal, fitted_on)
    # What is before the removal is corrected too, so these serve there as well.
    return removal_losses(model, windows, [removal], corrections=CandidateCorrections(fitted, [fitted]))[0]


def cross_fitted_losses(model: PreTrainedModel, windows: Windows, removals: Sequence[SublayerSet]) -> list[float]:
    """As `corrected_losses`, where the corrections for each half of `windows` are fitted on the other half."""
    one, other = windows.halves()
    losses = [corrected_losses(model, *each) for each in ((one, removals, other), (other, removals, one))]
    share = len(one.ids) / (len(one.ids) + len(other.ids))
    return [share * first + (1 - share) * second for first, second in zip(*losses, strict=True)]


@torch.inference_mode()
def removal_window_losses(
    model: PreTrainedModel,
    ids: torch.Tensor,
    candidates: Sequence[SublayerSet],
    removed: SublayerSet = frozenset(),
    corrections: CandidateCorrections | None = None,
) -> torch.Tensor:
    """The loss of `model` on each window of one batch, after each of several removals.

    Args:
        model: The model, in evaluation mode; it is unchanged afterwards.
        ids: Token ids `[windows, length]`.
        candidates: The sublayers to remove, one set for each loss; none is empty.
        removed: Sublayers to remove in addition, for every candidate.
        corrections: As in `removal_losses`.

    Returns:
        The summed next-token cross-entropy `[candidates, windows]`, float64, in nats, on the CPU.
    """
    ids = ids.to(device_of(model))
    corrections = corrections or CandidateCorrections({}, [{}] * len(candidates))
    windows = windows_at_once(model, len(candidates), ids.shape[1])
    losses_of = _side_by_side if is_offloaded(model) else _one_after_the_other
    losses = [losses_of(model, some, candidates, removed, corrections) for some in ids.split(windows)]
    return torch.cat(losses, dim=1).cpu()


def _one_after_the_other(
    model: PreTrainedModel,
    ids: torch.Tensor,
    candidates: Sequence[SublayerSet],
    removed: SublayerSet,
    corrections: CandidateCorrections,
) -> torch.Tensor:
    """As `removal_window_losses`; each candidate goes from its own layer to the output."""
    starts = [min(layer for layer, _ in candidate) for candidate in candidates]
    with corrected(model, corrections.before):
        depths = layer_inputs(model, ids, max(starts), removed)
    losses: list[torch.Tensor] = []
    for candidate, start, own in zip(candidates, starts, corrections.candidates, strict=True):
        with corrected(model, own), without(model, removed | candidate, start, depths[start]):
            losses.append(window_losses(model, ids))
    return torch.stack(losses)


def _side_by_side(
    model: PreTrainedModel,
    ids: torch.Tensor,
    candidates: Sequence[SublayerSet],
    removed: SublayerSet,
    corrections: CandidateCorrections,
) -> torch.Tensor:
    """As `removal_window_losses`; all candidates go through one layer after the other, so each layer is read once.

    The losses are the same to the bit.
    """
    starts = [min(layer for layer, _ in candidate) for candidate in candidates]
    common, streams = embeddings(model, ids), dict[int, torch.Tensor]()
    for number, layer in enumerate(list(decoder_layers(model, architecture_of(model.config)))):
        with in_memory(layer):
            for place, candidate in enumerate(candidates):
                if starts[place] <= number:
                    entering = streams.get(place, common)
                    with corrected(model, of_layer(corrections.candidates[place], number)):
                        streams[place] = run_layer(model, ids, number, entering, removed | candidate)
            if number < max(starts):
                with corrected(model, of_layer(corrections.before, number)):
                    common = run_layer(model, ids, number, common, removed)
    return stream_losses(model, ids, [streams[place] for place in range(len(candidates))])


def windows_at_once(model: PreTrainedModel, candidates: int, length: int) -> int:
    """The number of windows of a batch, such that the hidden states of all candidates at one depth fit (`STREAMS`).

    It is at most `BATCH`, and does not depend on where the weights are, so that losses are the same in memory and on
    disk.
    """
    width: int = model.config.hidden_size
    return max(1, min(BATCH, STREAMS // (candidates * length * width)))


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

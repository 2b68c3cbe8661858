"""The next-token cross-entropy of a model on token windows, in nats."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext

import torch
from torch import nn
from transformers import PreTrainedModel

from optimum.streamline.editing.residual_stream import final_stream
from optimum.streamline.errors import StreamlineError
from optimum.streamline.models.architectures import architecture_of, decoder_layers
from optimum.streamline.models.offloaded_weights import only_rows
from optimum.streamline.models.removed_sublayers import without
from optimum.streamline.text.windows import LOGITS, Windows

VOCABULARY_SLICE = 16_384
"""How many tokens of the vocabulary have logits at a time. In fp32, this much of a head of width 4096 takes 268 MB."""


def mean_losses(total: torch.Tensor, windows: Windows, candidate: str) -> list[float]:
    """The mean loss per predicted token of several candidates, from their sums.

    Args:
        total: Summed cross-entropy of each candidate over `windows`, nats, `[candidates]`.
        windows: The windows that the sums are over.
        candidate: The word for a candidate in an error message, such as "removal".

    Returns:
        One loss for each candidate, in nats per token; infinite where the loss is not a number.

    Raises:
        StreamlineError: no candidate has a finite loss.
    """
    losses = (total / windows.ids[:, 1:].numel()).nan_to_num(nan=math.inf, posinf=math.inf)
    if not bool(losses.isfinite().any()):
        raise StreamlineError(f"model: the loss on the calibration text is not finite for any {candidate} tried")
    return [float(loss) for loss in losses]


def cross_entropy_sum(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    """The next-token cross-entropy of `model`, summed over tokens.

    Args:
        model: The model.
        ids: Token ids `[windows, length]`; the first token of each window is not predicted.

    Returns:
        A float64 scalar, in nats.
    """
    return window_losses(model, ids).sum()


def window_losses(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    """The next-token cross-entropy of `model` on each window, summed over its tokens.

    Args:
        model: The model.
        ids: Token ids `[windows, length]`; the first token of each window is not predicted.

    Returns:
        `[windows]`, float64, in nats.
    """
    return stream_losses(model, ids, [final_stream(model, ids)])[0]


def stream_losses(model: PreTrainedModel, ids: torch.Tensor, streams: Sequence[torch.Tensor]) -> torch.Tensor:
    """The next-token cross-entropy on each window, for several outputs of the last layer.

    The final norm and the head run for one slice of the vocabulary after the other, and for few windows at a time. So
    memory never holds all logits (but with gradients, which need them), and of a head on disk one slice.

    Args:
        model: The model, of which only what follows the layers runs.
        ids: Token ids `[windows, length]`; the first token of each window is not predicted.
        streams: Outputs of the last layer, each `[windows, length, width]`.

    Returns:
        `[streams, windows]`, float64, in nats.
    """
    head = model.get_output_embeddings()
    cut = type(head) is nn.Linear and type(head.weight) is nn.Parameter  # quantized weights have no rows
    vocabulary = len(head.weight) if cut else model.config.get_text_config().vocab_size
    step = min(VOCABULARY_SLICE, vocabulary) if cut else vocabulary
    following = ids[:, 1:]
    partition = [torch.full(following.shape, -math.inf, dtype=torch.float64, device=ids.device) for _ in streams]
    chosen = [torch.zeros_like(each) for each in partition]
    for start in range(0, vocabulary, step):
        stop = min(start + step, vocabulary)
        within = (following >= start) & (following < stop)
        places = (following - start).clamp(0, stop - start - 1)
        with only_rows(head, start, stop) if cut else nullcontext():
            for number, stream in enumerate(streams):
                sums, found = _of_slice(model, ids, stream, places, max(1, LOGITS // (ids.shape[1] * step)))
                partition[number] = torch.logaddexp(partition[number], sums)
                chosen[number] = chosen[number] + torch.where(within, found, 0.0)
    return torch.stack([(total - logit).sum(1) for total, logit in zip(partition, chosen, strict=True)])


def _of_slice(
    model: PreTrainedModel, ids: torch.Tensor, stream: torch.Tensor, places: torch.Tensor, windows: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """What the slice of the vocabulary that the head has now adds to the loss, for some `windows` at a time.

    Returns:
        The logarithm of the sum of exp(logit) over the slice, and the logit at `places`; both `[windows, length - 1]`,
        float64.
    """
    sums, found = list[torch.Tensor](), list[torch.Tensor]()
    layers = len(decoder_layers(model, architecture_of(model.config)))
    for some, entering, wanted in zip(ids.split(windows), stream.split(windows), places.split(windows), strict=True):
        with without(model, frozenset(), layers, entering):
            logits = model(some, use_cache=False).logits[:, :-1].float()
        sums.append(logits.logsumexp(-1).double())
        found.append(logits.gather(-1, wanted[..., None])[..., 0].double())
    return torch.cat(sums), torch.cat(found)

"""The next-token cross-entropy of a model on token windows, in nats."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

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
    memory never holds all logits, and of a head on disk one slice. `stream_gradient` gives gradients.

    Args:
        model: The model, of which only what follows the layers runs.
        ids: Token ids `[windows, length]`; the first token of each window is not predicted.
        streams: Outputs of the last layer, each `[windows, length, width]`.

    Returns:
        `[streams, windows]`, float64, in nats.
    """
    partition, chosen = _of_vocabulary(model, ids, streams)
    return torch.stack([(total - logit).sum(1) for total, logit in zip(partition, chosen, strict=True)])


def stream_gradient(model: PreTrainedModel, ids: torch.Tensor, stream: torch.Tensor) -> torch.Tensor:
    """The gradient of the next-token cross-entropy, summed over tokens, by an output of the last layer.

    The head runs as in `stream_losses`, once for the sums over the vocabulary and once for the gradient. Of a logit z_v
    that is exp(z_v) / sum_w exp(z_w), less 1 for the token that follows.

    Args:
        model: The model. None of its weights requires a gradient.
        ids: Token ids `[windows, length]`; the first token of each window is not predicted.
        stream: An output of the last layer, `[windows, length, width]`.

    Returns:
        `[windows, length, width]`, in nats.
    """
    with torch.no_grad():
        [partition], _ = _of_vocabulary(model, ids, [stream])
    total = torch.zeros_like(stream)
    for part in _slices(model, ids):
        within, places = part.find(ids[:, 1:])
        with part.of_head():
            for rows in torch.arange(len(ids)).split(part.windows):
                entering = stream[rows].requires_grad_(True)
                logits = _logits(model, ids[rows], entering)
                gradient = (logits.detach() - partition[rows, :, None].float()).exp_()
                gradient.scatter_add_(-1, places[rows, :, None], -within[rows, :, None].float())
                total[rows] += torch.autograd.grad(logits, entering, gradient)[0]
    return total


def _of_vocabulary(
    model: PreTrainedModel, ids: torch.Tensor, streams: Sequence[torch.Tensor]
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """The logarithm of the sum of exp(logit) over the vocabulary, and the logit of the token that follows.

    Returns:
        One tensor of each for each stream: `[windows, length - 1]`, float64.
    """
    following = ids[:, 1:]
    partition = [torch.full(following.shape, -math.inf, dtype=torch.float64, device=ids.device) for _ in streams]
    chosen = [torch.zeros_like(each) for each in partition]
    for part in _slices(model, ids):
        within, places = part.find(following)
        with part.of_head():
            for number, stream in enumerate(streams):
                sums, found = _of_slice(model, ids, stream, places, part.windows)
                partition[number] = torch.logaddexp(partition[number], sums)
                chosen[number] = chosen[number] + torch.where(within, found, 0.0)
    return partition, chosen


@dataclass(frozen=True)
class _Slice:
    """A part of the vocabulary, whose logits are in memory together.

    Args:
        head: The output head; `None` if it cannot be cut, so that the slice is the whole vocabulary.
        start: The first token.
        stop: The token after the last.
        windows: The number of windows whose logits may be in memory.
    """

    head: nn.Module | None
    start: int
    stop: int
    windows: int

    def of_head(self) -> AbstractContextManager[None]:
        """Let the model compute the logits of this slice alone inside the `with` block."""
        return nullcontext() if self.head is None else only_rows(self.head, self.start, self.stop)

    def find(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Whether each token is in the slice, and its place there; some place if it is not."""
        within = (tokens >= self.start) & (tokens < self.stop)
        return within, (tokens - self.start).clamp(0, self.stop - self.start - 1)


def _slices(model: PreTrainedModel, ids: torch.Tensor) -> list[_Slice]:
    """The slices of the vocabulary for token ids `[windows, length]`."""
    head = model.get_output_embeddings()
    cut = type(head) is nn.Linear and type(head.weight) is nn.Parameter  # quantized weights have no rows
    vocabulary = len(head.weight) if cut else model.config.get_text_config().vocab_size
    step = min(VOCABULARY_SLICE, vocabulary) if cut else vocabulary
    windows = max(1, LOGITS // (ids.shape[1] * step))
    return [
        _Slice(head if cut else None, start, min(start + step, vocabulary), windows)
        for start in range(0, vocabulary, step)
    ]


def _of_slice(
    model: PreTrainedModel, ids: torch.Tensor, stream: torch.Tensor, places: torch.Tensor, windows: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """What the slice of the vocabulary that the head has now adds to the loss, for some `windows` at a time.

    Returns:
        The logarithm of the sum of exp(logit) over the slice, and the logit at `places`; both `[windows, length - 1]`,
        float64.
    """
    sums, found = list[torch.Tensor](), list[torch.Tensor]()
    for some, entering, wanted in zip(ids.split(windows), stream.split(windows), places.split(windows), strict=True):
        logits = _logits(model, some, entering)
        sums.append(logits.logsumexp(-1).double())
        found.append(logits.gather(-1, wanted[..., None])[..., 0].double())
    return torch.cat(sums), torch.cat(found)


def _logits(model: PreTrainedModel, ids: torch.Tensor, stream: torch.Tensor) -> torch.Tensor:
    """The logits that the head has now, of all tokens but the last: `[windows, length - 1, tokens]`, in fp32."""
    layers = len(decoder_layers(model, architecture_of(model.config)))
    with without(model, frozenset(), layers, stream):
        logits: torch.Tensor = model(ids, use_cache=False).logits
    return logits[:, :-1].float()

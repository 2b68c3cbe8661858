"""The inputs of a graph with static caches: where new tokens are written, and which cache positions they attend to.

Imports numpy only, so that every runner can use it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from optimum.exporters.streamline.parity.model_calls import Mask, token_positions
from optimum.exporters.streamline.rewriting.public_names import MaskInput
from optimum.streamline.errors import StreamlineError
from optimum.streamline.runtime.runner import TokenIds


def static_inputs(
    input_ids: TokenIds, attention_mask: Mask, masks: Sequence[MaskInput], cache_length: int, masked_score: float
) -> dict[str, npt.NDArray[Any]]:
    """The inputs of a call other than caches, by name.

    Args:
        input_ids: The new tokens, `[batch, length]`.
        attention_mask: The mask of all tokens so far, these included, `[batch, total length]`; 0 for padding, which is
            on the left.
        masks: The graph's mask inputs.
        cache_length: The length of the caches, in tokens.
        masked_score: The number that a mask has at a cache position that is not attended to.

    Returns:
        int64 arrays of tokens, positions and write indices, and a float32 array for each mask.

    Raises:
        StreamlineError: the text is longer than the caches.
    """
    batch, new = input_ids.shape
    end = attention_mask.shape[1]
    check_length(end, cache_length)

    def scores(mask: MaskInput) -> npt.NDArray[np.float32]:
        attended = attended_positions(attention_mask, new, cache_length, mask.window)
        return np.where(attended, np.float32(0), np.float32(masked_score))

    inputs = {
        "input_ids": input_ids,
        "position_ids": token_positions(attention_mask, new),
        "write_indices": np.full(batch, end - new, np.int64),
        **{mask.name: scores(mask) for mask in masks},
    }
    return {name: np.ascontiguousarray(array) for name, array in inputs.items()}


def check_length(length: int, cache_length: int) -> None:
    """Refuse a text that is longer than the caches.

    Args:
        length: The length of the text, in tokens.
        cache_length: The length of the caches, in tokens.

    Raises:
        StreamlineError: the text is longer; names both lengths.
    """
    if length > cache_length:
        raise StreamlineError(f"length {length}: must be at most {cache_length}, the tokens that the caches hold")


def attended_positions(attention_mask: Mask, new: int, cache_length: int, window: int | None) -> npt.NDArray[np.bool_]:
    """Which cache positions each of the last `new` tokens attends to.

    Args:
        attention_mask: The mask of all tokens so far, `[batch, total length]`; 0 for padding.
        new: The number of new tokens per row.
        cache_length: The length of the caches, in tokens.
        window: The sliding window in tokens, the token itself included; `None` for full attention.

    Returns:
        `[batch, 1, new, cache_length]`.

    >>> attended_positions(np.array([[0, 1, 1, 1]]), 2, 5, None)[0, 0].astype(int)
    array([[0, 1, 1, 0, 0],
           [0, 1, 1, 1, 0]])
    >>> attended_positions(np.array([[0, 1, 1, 1]]), 2, 5, 2)[0, 0].astype(int)
    array([[0, 1, 1, 0, 0],
           [0, 0, 1, 1, 0]])
    """
    batch, end = attention_mask.shape
    token = np.arange(end - new, end)[:, None]
    position = np.arange(cache_length)[None]
    in_reach = position <= token
    if window is not None:
        in_reach &= position > token - window
    not_padding = np.zeros((batch, cache_length), bool)
    not_padding[:, :end] = attention_mask != 0
    attended: npt.NDArray[np.bool_] = in_reach[None, None] & not_padding[:, None, None]
    return attended

"""What a graph with static caches is fed: where in the caches new tokens are written, and which places they attend to.

Imports numpy alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from optimum.exporters.streamline.parity.calls import Mask, token_positions
from optimum.exporters.streamline.rewriting.public_names import MaskInput
from optimum.streamline.errors import StreamlineError
from optimum.streamline.runtime.runner import TokenIds


def static_inputs(
    input_ids: TokenIds, attention_mask: Mask, masks: Sequence[MaskInput], cache_length: int, closed: float
) -> dict[str, npt.NDArray[Any]]:
    """What is fed beside the caches, for tokens `[batch, length]` and the mask of everything up to their end.

    Args:
        attention_mask: `[batch, everything fed so far]`, these tokens included; 0 for padding, which is on the left.
        closed: What a mask has for a place that is not attended to. Masks are float32.

    Raises:
        StreamlineError: the caches are too short for the text.
    """
    batch, new = input_ids.shape
    end = attention_mask.shape[1]
    check_length(end, cache_length)
    feeds = {
        "input_ids": input_ids,
        "position_ids": token_positions(attention_mask, new),
        "write_indices": np.full(batch, end - new, np.int64),
        **{
            mask.name: np.where(
                attended_places(attention_mask, new, cache_length, mask.window), np.float32(0), np.float32(closed)
            )
            for mask in masks
        },
    }
    return {name: np.ascontiguousarray(array) for name, array in feeds.items()}


def check_length(length: int, cache_length: int) -> None:
    """Refuse a text of more tokens than the caches have places.

    Raises:
        StreamlineError: naming both.
    """
    if length > cache_length:
        raise StreamlineError(f"length {length}: beyond the {cache_length} tokens that this export has room for")


def attended_places(attention_mask: Mask, new: int, cache_length: int, window: int | None) -> npt.NDArray[np.bool_]:
    """Which places `[batch, 1, new, cache length]` the last `new` tokens attend to.

    >>> attended_places(np.array([[0, 1, 1, 1]]), 2, 5, None)[0, 0].astype(int)
    array([[0, 1, 1, 0, 0],
           [0, 1, 1, 1, 0]])
    >>> attended_places(np.array([[0, 1, 1, 1]]), 2, 5, 2)[0, 0].astype(int)
    array([[0, 1, 1, 0, 0],
           [0, 0, 1, 1, 0]])
    """
    batch, end = attention_mask.shape
    token = np.arange(end - new, end)[:, None]
    place = np.arange(cache_length)[None]
    near = place <= token
    if window is not None:
        near &= place > token - window
    real = np.zeros((batch, cache_length), bool)
    real[:, :end] = attention_mask != 0
    found: npt.NDArray[np.bool_] = near[None, None] & real[:, None, None]
    return found

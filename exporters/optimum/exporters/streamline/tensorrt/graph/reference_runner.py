"""Running a graph with static caches on ONNX Runtime, which every machine has: how it is compared with torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from optimum.exporters.streamline.graph_files import GRAPH_FILE
from optimum.exporters.streamline.onnx.runner import open_session
from optimum.exporters.streamline.parity.calls import Mask
from optimum.exporters.streamline.rewriting.public_names import MaskInput
from optimum.streamline.runtime.runner import Logits, TokenIds

from .engine_inputs import static_inputs

_DTYPES: dict[str, type[np.floating[Any]]] = {"tensor(float)": np.float32, "tensor(float16)": np.float16}


@dataclass(frozen=True)
class StaticCache:
    """What a graph remembers.

    Args:
        attention_mask: `[batch, length]`, 0 for padding, of everything fed so far.
        states: By input, `[batch, heads, cache length, head size]`.
    """

    attention_mask: Mask
    states: dict[str, Any]


class StaticOnnxRunner:
    """A `Runner` over the graph of a TensorRT export, on the CPU.

    Args:
        folder: Of the graph.
        masks: The graph's inputs that are masks.

    Raises:
        CannotOpenError: ONNX Runtime cannot read the graph.
    """

    runtime = "onnxruntime"

    def __init__(self, folder: Path, masks: Sequence[MaskInput]) -> None:
        self.session = open_session(folder / GRAPH_FILE, "cpu")
        self._masks = masks
        self._past = [each for each in self.session.get_inputs() if each.name.startswith("past_key_values.")]
        self._dtype = _DTYPES[next(each.type for each in self.session.get_inputs() if each.name == masks[0].name)]

    def prefill(self, input_ids: TokenIds, attention_mask: Mask | None = None) -> tuple[Logits, StaticCache]:
        """Logits `[batch, length, vocabulary]` of a prompt `[batch, length]`, and its cache.

        Args:
            attention_mask: `[batch, length]`, 0 for padding, which must be on the left; all tokens by default.
        """
        mask = np.ones_like(input_ids) if attention_mask is None else attention_mask
        return self._extend(input_ids, mask, self._empty(len(input_ids)))

    def prompt_inputs(self, input_ids: TokenIds) -> dict[str, Any]:
        """What the graph is fed for a prompt `[batch, length]` without padding, by input."""
        return self._feeds(input_ids, np.ones_like(input_ids)) | self._empty(len(input_ids)).states

    def decode(self, input_ids: TokenIds, cache: StaticCache) -> tuple[Logits, StaticCache]:
        """Logits of the tokens `[batch, length]` that follow `cache`, and the cache that holds them too."""
        return self._extend(input_ids, np.ones_like(input_ids), cache)

    def _empty(self, batch: int) -> StaticCache:
        states = {each.name: np.zeros((batch, *each.shape[1:]), _DTYPES[each.type]) for each in self._past}
        return StaticCache(np.ones((batch, 0), np.int64), states)

    def _feeds(self, input_ids: TokenIds, attention_mask: Mask) -> dict[str, Any]:
        closed = float(np.finfo(self._dtype).min / 2)
        feeds = static_inputs(input_ids, attention_mask, self._masks, self._past[0].shape[2], closed)
        return feeds | {mask.name: feeds[mask.name].astype(self._dtype) for mask in self._masks}

    def _extend(self, input_ids: TokenIds, mask: Mask, cache: StaticCache) -> tuple[Logits, StaticCache]:
        attention_mask = np.concatenate([cache.attention_mask, mask], axis=1)
        feeds = self._feeds(input_ids, attention_mask)
        names = ["logits", *(each.name.replace("past_key_values", "present") for each in self._past)]
        logits, *states = self.session.run(names, feeds | cache.states)
        remembered = dict(zip(cache.states, states, strict=True))
        return logits.astype(np.float32, copy=False), StaticCache(attention_mask, remembered)

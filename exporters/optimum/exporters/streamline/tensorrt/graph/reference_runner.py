"""Run a graph with static caches on ONNX Runtime's CPU, so that it can be compared with torch without a GPU."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from optimum.exporters.streamline.graph_files import GRAPH_FILE
from optimum.exporters.streamline.onnx.runner import open_session
from optimum.exporters.streamline.parity.model_calls import Mask
from optimum.exporters.streamline.rewriting.public_names import MaskInput
from optimum.streamline.runtime.runner import Logits, TokenIds

from .engine_inputs import static_inputs

_DTYPES: dict[str, type[np.floating[Any]]] = {"tensor(float)": np.float32, "tensor(float16)": np.float16}


@dataclass(frozen=True)
class StaticCache:
    """The keys and values of all tokens so far, and their attention mask.

    Args:
        attention_mask: `[batch, length]` for all tokens so far; 0 for padding.
        states: Keys and values by the name of the cache input, each `[batch, heads, cache length, head size]`.
    """

    attention_mask: Mask
    states: dict[str, Any]


class StaticOnnxRunner:
    """A `Runner` for the graph of a TensorRT export, on the CPU.

    Args:
        folder: The folder of the graph.
        masks: The graph's mask inputs.

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
        """Compute the logits of a prompt.

        Args:
            input_ids: The prompt, `[batch, length]`.
            attention_mask: `[batch, length]`; 0 for padding, which must be on the left. By default no padding.

        Returns:
            The logits `[batch, length, vocabulary]`, and the cache.

        Raises:
            StreamlineError: the prompt is longer than the caches.
        """
        mask = np.ones_like(input_ids) if attention_mask is None else attention_mask
        return self._extend(input_ids, mask, self._empty(len(input_ids)))

    def prompt_inputs(self, input_ids: TokenIds) -> dict[str, Any]:
        """All inputs of the graph, caches included, for a prompt `[batch, length]` without padding, by name."""
        return self._inputs(input_ids, np.ones_like(input_ids)) | self._empty(len(input_ids)).states

    def decode(self, input_ids: TokenIds, cache: StaticCache) -> tuple[Logits, StaticCache]:
        """Compute the logits of the tokens that follow a cache.

        Args:
            input_ids: The new tokens, `[batch, length]`.
            cache: The cache of the call before.

        Returns:
            The logits `[batch, length, vocabulary]` of the new tokens, and the cache with them.

        Raises:
            StreamlineError: the text is longer than the caches.
        """
        return self._extend(input_ids, np.ones_like(input_ids), cache)

    def _empty(self, batch: int) -> StaticCache:
        states = {each.name: np.zeros((batch, *each.shape[1:]), _DTYPES[each.type]) for each in self._past}
        return StaticCache(np.ones((batch, 0), np.int64), states)

    def _inputs(self, input_ids: TokenIds, attention_mask: Mask) -> dict[str, Any]:
        masked_score = float(np.finfo(self._dtype).min / 2)
        inputs = static_inputs(input_ids, attention_mask, self._masks, self._past[0].shape[2], masked_score)
        return inputs | {mask.name: inputs[mask.name].astype(self._dtype) for mask in self._masks}

    def _extend(self, input_ids: TokenIds, mask: Mask, cache: StaticCache) -> tuple[Logits, StaticCache]:
        attention_mask = np.concatenate([cache.attention_mask, mask], axis=1)
        inputs = self._inputs(input_ids, attention_mask)
        names = ["logits", *(each.name.replace("past_key_values", "present") for each in self._past)]
        logits, *outputs = self.session.run(names, inputs | cache.states)
        states = dict(zip(cache.states, outputs, strict=True))
        return logits.astype(np.float32, copy=False), StaticCache(attention_mask, states)

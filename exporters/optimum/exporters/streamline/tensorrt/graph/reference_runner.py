"""Run a graph with static caches on ONNX Runtime's CPU, so that it can be compared with torch without a GPU."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from optimum.exporters.streamline.graph_files import GRAPH_FILE
from optimum.exporters.streamline.onnx.runner import open_session, to_ort_value
from optimum.exporters.streamline.onnx.segmented_runner import PAST, PRESENT
from optimum.exporters.streamline.parity.model_calls import Call, Mask
from optimum.exporters.streamline.rewriting.public_names import MaskInput, cache_inputs
from optimum.streamline.runtime.runner import Logits, TokenIds

from .engine_inputs import static_inputs

if TYPE_CHECKING:
    import onnxruntime

_DTYPES: dict[str, type[np.floating[Any]]] = {"tensor(float)": np.float32, "tensor(float16)": np.float16}


@dataclass(frozen=True)
class StaticInputs:
    """The inputs of a graph with static caches, on the CPU.

    Args:
        masks: The graph's mask inputs.
        dtype: The type of the masks.
        length: The length of the caches, in tokens.
    """

    masks: Sequence[MaskInput]
    dtype: type[np.floating[Any]]
    length: int

    @classmethod
    def of_model(cls, model: ir.Model, masks: Sequence[MaskInput]) -> StaticInputs:
        """The inputs of a graph in float32 or float16.

        Args:
            model: The graph, with public names.
            masks: Its mask inputs.
        """
        dtype = next(value.dtype for value in model.graph.inputs if value.name == masks[0].name)
        assert dtype is not None
        past = cache_inputs(model)[0]
        assert past.shape is not None
        length = past.shape[2]
        assert isinstance(length, int)
        return cls(masks, dtype.numpy().type, length)

    def of(self, call: Call) -> dict[str, npt.NDArray[Any]]:
        """All inputs but the caches for a call, by name.

        Raises:
            StreamlineError: the text is longer than the caches.
        """
        masked_score = float(np.finfo(self.dtype).min / 2)
        inputs = static_inputs(call.input_ids, call.attention_mask, self.masks, self.length, masked_score)
        return inputs | {mask.name: inputs[mask.name].astype(self.dtype) for mask in self.masks}

    def empty_state(self, value: Any, batch: int) -> onnxruntime.OrtValue:
        """The cache before the first token, for a session's description of a cache input."""
        return to_ort_value(np.zeros((batch, *value.shape[1:]), _DTYPES[value.type]))


@dataclass(frozen=True)
class StaticCache:
    """The keys and values of all tokens so far, and their attention mask.

    Args:
        attention_mask: `[batch, length]` for all tokens so far; 0 for padding.
        states: `OrtValue`s of keys and values by the name of the cache input, each
            `[batch, heads, cache length, head size]`.
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
        self._past = [each for each in self.session.get_inputs() if each.name.startswith(PAST)]
        of_mask = next(each.type for each in self.session.get_inputs() if each.name == masks[0].name)
        self._graph_inputs = StaticInputs(masks, _DTYPES[of_mask], self._past[0].shape[2])

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
        states = {each.name: self._graph_inputs.empty_state(each, batch) for each in self._past}
        return StaticCache(np.ones((batch, 0), np.int64), states)

    def _extend(self, input_ids: TokenIds, mask: Mask, cache: StaticCache) -> tuple[Logits, StaticCache]:
        attention_mask = np.concatenate([cache.attention_mask, mask], axis=1)
        inputs = self._graph_inputs.of(Call(input_ids, attention_mask))
        values = {name: to_ort_value(array) for name, array in inputs.items()}
        names = ["logits", *(each.name.replace(PAST, PRESENT) for each in self._past)]
        logits, *outputs = self.session.run_with_ort_values(names, values | cache.states)
        states = dict(zip(cache.states, outputs, strict=True))
        return logits.numpy().astype(np.float32, copy=False), StaticCache(attention_mask, states)

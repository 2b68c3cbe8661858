"""Run an exported graph on ONNX Runtime. Imports neither torch nor transformers.

The cache stays in ONNX Runtime's buffers: the cache outputs of one call are bound as the inputs of the next call, and
nothing is copied. The runner relies on the names that `public_names.py` sets.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from optimum.exporters.streamline.graph_files import GRAPH_FILE, LOGITS_TO_KEEP
from optimum.exporters.streamline.parity.model_calls import Mask, token_positions
from optimum.streamline.errors import StreamlineError, require_extra
from optimum.streamline.runtime.runner import Logits, TokenIds

if TYPE_CHECKING:
    import onnxruntime

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
# By default the CUDA provider rounds the inputs of fp32 products to TF32 (10 bits of fraction); torch does not.
# On an H200 the logits of an fp32 export then differed from torch by 3e-4 of the largest.
PROVIDER_OPTIONS: dict[str, dict[str, str]] = {"cpu": {}, "cuda": {"use_tf32": "0"}}
# ONNX element types by ONNX Runtime's names of them; numbers, because numpy has no bfloat16.
_ELEMENT_TYPES = {"tensor(float)": 1, "tensor(float16)": 10, "tensor(bfloat16)": 16}
_ERRORS_ONLY = 3  # a log severity; warnings would go straight to the process's stderr, past Python


@dataclass(frozen=True)
class OnnxCache:
    """The keys and values of all tokens so far, and their attention mask.

    Args:
        attention_mask: `[batch, length]` for all tokens so far; 1 for a token, 0 for padding.
        states: `OrtValue`s of keys and values in the order of the graph's cache inputs, each
            `[batch, heads, length, head size]`.
    """

    attention_mask: Mask
    states: tuple[Any, ...]


class OnnxRunner:
    """A `Runner` for an export to ONNX.

    Args:
        folder: The artifact's folder.
        device: `cpu` or `cuda`: where the graph runs and the caches are.
        open: A function from `folder` to a session on its graph; by default `open_session` on the device's provider.

    Raises:
        StreamlineError: ONNX Runtime is not installed, has no such device, or cannot read the graph.
    """

    runtime = "onnxruntime"

    def __init__(
        self,
        folder: Path,
        device: str = "cpu",
        open: Callable[[Path], onnxruntime.InferenceSession] | None = None,  # noqa: A002
    ) -> None:
        self.device = device
        self.session = open(folder) if open else open_session(folder / GRAPH_FILE, device)
        self._past = [each for each in self.session.get_inputs() if each.name.startswith("past_key_values.")]
        # A graph exported with `last_logits` returns all logits only if this input is 0. It is bound as an `OrtValue`,
        # because the binding does not take an array for an optional input.
        optional = [each.name for each in self.session.get_overridable_initializers()]
        self._all_logits = {LOGITS_TO_KEEP: to_ort_value(np.array(0))} if LOGITS_TO_KEEP in optional else {}
        self._present = [each.name.replace("past_key_values", "present") for each in self._past]

    def prefill(self, input_ids: TokenIds, attention_mask: Mask | None = None) -> tuple[Logits, OnnxCache]:
        """Compute the logits of a prompt.

        Args:
            input_ids: The prompt, `[batch, length]`.
            attention_mask: `[batch, length]`; 0 for padding, which must be on the left. By default no padding.

        Returns:
            The logits `[batch, length, vocabulary]`, and the cache.
        """
        batch = len(input_ids)
        states = tuple(empty_cache_state(each, batch, self.device) for each in self._past)
        empty = OnnxCache(np.ones((batch, 0), np.int64), states)
        return self._extend(input_ids, np.ones_like(input_ids) if attention_mask is None else attention_mask, empty)

    def decode(self, input_ids: TokenIds, cache: OnnxCache) -> tuple[Logits, OnnxCache]:
        """Compute the logits of the tokens that follow a cache.

        Args:
            input_ids: The new tokens, `[batch, length]`.
            cache: The cache of the call before.

        Returns:
            The logits `[batch, length, vocabulary]` of the new tokens, and the cache with them.
        """
        return self._extend(input_ids, np.ones_like(input_ids), cache)

    def _extend(self, input_ids: TokenIds, mask: Mask, cache: OnnxCache) -> tuple[Logits, OnnxCache]:
        attention_mask = np.concatenate([cache.attention_mask, mask], axis=1)
        inputs = token_inputs(input_ids, attention_mask)  # kept here, because the binding reads them without a copy
        logits, *states = self._run(inputs, cache.states)
        return logits.numpy().astype(np.float32, copy=False), OnnxCache(attention_mask, tuple(states))

    def _run(self, inputs: dict[str, npt.NDArray[np.int64]], states: tuple[Any, ...]) -> list[Any]:
        """Run the graph once; returns the logits and then the new keys and values, as `OrtValue`s."""
        binding = self.session.io_binding()
        for name, array in inputs.items():
            binding.bind_cpu_input(name, array)
        for name, value in self._all_logits.items():
            binding.bind_ortvalue_input(name, value)
        for each, state in zip(self._past, states, strict=True):
            binding.bind_ortvalue_input(each.name, state)
        binding.bind_output("logits", "cpu")
        for name in self._present:
            binding.bind_output(name, self.device)
        self.session.run_with_iobinding(binding)
        outputs: list[Any] = binding.get_outputs()
        return outputs


def to_ort_value(array: npt.NDArray[Any]) -> onnxruntime.OrtValue:
    """Convert a numpy array to an `OrtValue`."""
    import onnxruntime

    return onnxruntime.OrtValue.ortvalue_from_numpy(array)


def token_inputs(input_ids: TokenIds, attention_mask: Mask) -> dict[str, npt.NDArray[Any]]:
    """The inputs of a graph other than caches, by name.

    Args:
        input_ids: The new tokens, `[batch, length]`.
        attention_mask: The mask of all tokens so far, these included, `[batch, total length]`.
    """
    positions = token_positions(attention_mask, input_ids.shape[1])
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": positions}
    return {name: np.ascontiguousarray(array) for name, array in inputs.items()}


def empty_cache_state(value: Any, batch: int, device: str) -> onnxruntime.OrtValue:
    """The empty keys or values for a cache input, before the first token.

    Args:
        value: The session's description of the input, `[batch, heads, past length, head size]`.
        batch: The number of rows.
        device: `cpu` or `cuda`.

    Returns:
        An `OrtValue` of shape `[batch, heads, 0, head size]`.
    """
    import onnxruntime

    _, heads, _, head_size = value.shape
    return onnxruntime.OrtValue.ortvalue_from_shape_and_type(
        (batch, heads, 0, head_size), _ELEMENT_TYPES[value.type], device
    )


class CannotOpenError(StreamlineError):
    """ONNX Runtime cannot open a graph; `reason` is the first line of its message."""

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(f"{path}: ONNX Runtime cannot open it ({reason})")
        self.reason = reason


def provider_of(device: str) -> str:
    """The ONNX Runtime execution provider of a device.

    Args:
        device: `cpu` or `cuda`.

    Raises:
        StreamlineError: ONNX Runtime is not installed, or has no such device.
    """
    runtime = require_extra("onnxruntime", "onnx-gpu" if device == "cuda" else "onnx")
    available = {
        name: provider for name, provider in PROVIDERS.items() if provider in runtime.get_available_providers()
    }
    if device not in available:
        raise StreamlineError(f"device {device!r}: the installed ONNX Runtime offers {', '.join(available)}")
    return available[device]


def open_session(graph: Path | bytes, device: str, weights: Path | None = None) -> onnxruntime.InferenceSession:
    """Open an ONNX Runtime session on a graph.

    Args:
        graph: The graph's file, or its serialized bytes.
        device: `cpu` or `cuda`.
        weights: The folder of the graph's weight file, for a graph given as bytes.

    Raises:
        StreamlineError: ONNX Runtime is not installed, or does not support the device.
        CannotOpenError: ONNX Runtime cannot read the graph.
    """
    provider = provider_of(device)
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = _ERRORS_ONLY
    if weights is not None:
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(weights))
        options.enable_cpu_mem_arena = False
    source = graph if isinstance(graph, bytes) else str(graph)
    try:
        return onnxruntime.InferenceSession(source, options, providers=[(provider, PROVIDER_OPTIONS[device])])
    except Exception as error:  # ONNX Runtime has an exception class per fault, and no common base class
        reason = str(error).strip().splitlines()[0]
        raise CannotOpenError(str(weights or source), reason) from None

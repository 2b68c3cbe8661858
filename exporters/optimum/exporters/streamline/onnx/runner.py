"""Running an exported graph on ONNX Runtime. Imports neither torch nor transformers.

The cache stays in ONNX Runtime's own buffers from one call to the next: what a call returns is fed to the
next as it is. Knows the names that `public_names.py` gives, nothing of how the graph was made.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from optimum.exporters.streamline.graph_files import GRAPH_FILE, LOGITS_TO_KEEP
from optimum.exporters.streamline.parity.calls import Mask, token_positions
from optimum.streamline.errors import StreamlineError, require_extra
from optimum.streamline.runtime.runner import Logits, TokenIds

if TYPE_CHECKING:
    import onnxruntime

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
# Types of caches, by ONNX Runtime's names, as ONNX numbers them: numpy has none for the last.
_ELEMENTS = {"tensor(float)": 1, "tensor(float16)": 10, "tensor(bfloat16)": 16}
_QUIET = 3  # errors only: ONNX Runtime writes its warnings to the file descriptor


@dataclass(frozen=True)
class OnnxCache:
    """What a graph remembers of the tokens so far.

    Args:
        attention_mask: `[batch, length]`, 1 for a token and 0 for padding, of everything fed so far.
        states: Keys and values in the order of the graph's cache inputs, each `[batch, heads, length, head size]`.
    """

    attention_mask: Mask
    states: tuple[Any, ...]


class OnnxRunner:
    """A `Runner` over `model.onnx` of an exported folder.

    Args:
        folder: The artifact's folder.
        device: `cpu` or `cuda`.
        open: Opens a session on the graph in `folder`, otherwise than on the provider that stands for `device`.

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
        # All of them, of a graph that left to itself gives the last only. The binding takes such an input as a value.
        optional = [each.name for each in self.session.get_overridable_initializers()]
        self._every_logit = {LOGITS_TO_KEEP: to_ort_value(np.array(0))} if LOGITS_TO_KEEP in optional else {}
        self._present = [each.name.replace("past_key_values", "present") for each in self._past]

    def prefill(self, input_ids: TokenIds, attention_mask: Mask | None = None) -> tuple[Logits, OnnxCache]:
        """Logits `[batch, length, vocabulary]` of a prompt `[batch, length]`, and its cache.

        Args:
            attention_mask: `[batch, length]`, 0 for padding, which must be on the left; all tokens by default.
        """
        batch = len(input_ids)
        states = tuple(empty_cache_state(each, batch, self.device) for each in self._past)
        empty = OnnxCache(np.ones((batch, 0), np.int64), states)
        return self._extend(input_ids, np.ones_like(input_ids) if attention_mask is None else attention_mask, empty)

    def decode(self, input_ids: TokenIds, cache: OnnxCache) -> tuple[Logits, OnnxCache]:
        """Logits of the tokens `[batch, length]` that follow `cache`, and the cache that holds them too."""
        return self._extend(input_ids, np.ones_like(input_ids), cache)

    def _extend(self, input_ids: TokenIds, mask: Mask, cache: OnnxCache) -> tuple[Logits, OnnxCache]:
        attention_mask = np.concatenate([cache.attention_mask, mask], axis=1)
        feeds = token_inputs(input_ids, attention_mask)  # the binding reads these arrays where they lie
        logits, *states = self._run(feeds, cache.states)
        return logits.numpy().astype(np.float32, copy=False), OnnxCache(attention_mask, tuple(states))

    def _run(self, feeds: dict[str, npt.NDArray[np.int64]], states: tuple[Any, ...]) -> list[Any]:
        """One call: logits, then the new states, as ONNX Runtime's own values."""
        binding = self.session.io_binding()
        for name, array in feeds.items():
            binding.bind_cpu_input(name, array)
        for name, value in self._every_logit.items():
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
    """An array as ONNX Runtime's own value."""
    import onnxruntime

    return onnxruntime.OrtValue.ortvalue_from_numpy(array)


def token_inputs(input_ids: TokenIds, attention_mask: Mask) -> dict[str, npt.NDArray[Any]]:
    """What a graph is fed beside its cache, for tokens `[batch, length]` and the mask of everything up to their end."""
    positions = token_positions(attention_mask, input_ids.shape[1])
    feeds = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": positions}
    return {name: np.ascontiguousarray(array) for name, array in feeds.items()}


def empty_cache_state(value: Any, batch: int, device: str) -> onnxruntime.OrtValue:
    """What to feed to a session's cache input before the first token."""
    import onnxruntime

    _, heads, _, head_size = value.shape
    return onnxruntime.OrtValue.ortvalue_from_shape_and_type(
        (batch, heads, 0, head_size), _ELEMENTS[value.type], device
    )


class CannotOpenError(StreamlineError):
    """ONNX Runtime cannot open a graph; `reason` is its own line."""

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(f"{path}: ONNX Runtime cannot open it ({reason})")
        self.reason = reason


def provider_of(device: str) -> str:
    """The execution provider that stands for a device.

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
    """A session on a graph.

    Args:
        graph: Its file, or its bytes.
        device: `cpu` or `cuda`.
        weights: The folder of its weights, if it is given by its bytes.

    Raises:
        StreamlineError: ONNX Runtime is not installed, or has no such device.
        CannotOpenError: it cannot read the graph.
    """
    provider = provider_of(device)
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = _QUIET
    if weights is not None:
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(weights))
        options.enable_cpu_mem_arena = False
    source = graph if isinstance(graph, bytes) else str(graph)
    try:
        return onnxruntime.InferenceSession(source, options, providers=[provider])
    except Exception as error:  # ONNX Runtime raises a class of its own for each kind of fault
        said = str(error).strip().splitlines()[0]
        raise CannotOpenError(str(weights or source), said) from None

"""Run an engine on torch tensors: it writes its caches in place, and decoding replays one CUDA graph.

`graph/engine_inputs.py` makes the inputs of a call. The engine's record limits the requests.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from optimum.exporters.streamline.parity.model_calls import Mask
from optimum.exporters.streamline.tensorrt.graph.engine_inputs import check_length, static_inputs
from optimum.streamline.errors import StreamlineError, require_extra
from optimum.streamline.runtime.runner import Logits, TokenIds

from .build_engine import BUILDERS, last_error, make_logger
from .engine_record import ENGINE_FILE, EngineRecord, Machine
from .profiles import choose_profile

Tensors = dict[str, torch.Tensor]
"""Tensors by the name of the engine's input or output."""


@dataclass
class EngineCache:
    """The keys and values of all tokens so far, and their attention mask.

    The engine writes `states` in place, so a cache cannot be used again after the call that continues it.

    Args:
        attention_mask: `[batch, length]` for all tokens so far; 0 for padding.
        states: Keys and values by the name of the cache input, each `[batch, heads, cache length, head size]`.
        steps: The prepared calls on these tensors, by their number of new tokens; a call for one token is a captured
            CUDA graph.
    """

    attention_mask: Mask
    states: Tensors
    steps: dict[int, _Step] = field(default_factory=dict)


@dataclass(frozen=True)
class _Step:
    """A prepared call of fixed shapes.

    Args:
        inputs: The input tensors other than caches; they are filled before each run.
        logits: The logits tensor, which each run overwrites.
        run: The function that runs the engine on these tensors.
    """

    inputs: Tensors
    logits: torch.Tensor
    run: Callable[[], None]


class TensorrtRunner:
    """A `Runner` for an export to TensorRT.

    Args:
        folder: The artifact's folder.
        library: The module of the builder's library; by default it is imported.
        device: The device to run on.

    Raises:
        StreamlineError: the library is not installed, or the engine was built with another version of it or for
            another GPU.
    """

    def __init__(self, folder: Path, library: Any = None, device: str = "cuda") -> None:
        self.record = EngineRecord.read(folder)
        self.runtime = self.record.builder
        builder = BUILDERS[self.record.builder]
        self._trt = library or require_extra(builder.module, builder.extra)
        self._device = torch.device(device)
        self.record.check_machine(_machine(self._trt, self._device))
        # The library's runtime and logger must live as long as the engine.
        self._log = make_logger(self._trt)
        self._library_runtime = self._trt.Runtime(self._log)
        self._engine = self._library_runtime.deserialize_cuda_engine((folder / ENGINE_FILE).read_bytes())
        if self._engine is None:
            raise StreamlineError(f"{folder / ENGINE_FILE}: {self.runtime} cannot read it: {last_error(self._log)}")
        self._contexts: dict[int, Any] = {}
        self._dtypes = {name: self._dtype(name) for name in self._names()}

    def prefill(self, input_ids: TokenIds, attention_mask: Mask | None = None) -> tuple[Logits, EngineCache]:
        """Compute the logits of a prompt.

        A prompt that is longer than a call may be is computed in several calls.

        Args:
            input_ids: The prompt, `[batch, length]`.
            attention_mask: `[batch, length]`; 0 for padding, which must be on the left. By default no padding.

        Returns:
            The logits `[batch, length, vocabulary]`, and the cache.

        Raises:
            StreamlineError: the request is larger than the engine was built for.
        """
        batch = len(input_ids)
        check_length(input_ids.shape[1], self.record.limits.length)
        states = {name: self._empty(name, batch) for name in self.record.aliases.values()}
        cache = EngineCache(np.ones((batch, 0), np.int64), states)
        return self._extend(input_ids, np.ones_like(input_ids) if attention_mask is None else attention_mask, cache)

    def decode(self, input_ids: TokenIds, cache: EngineCache) -> tuple[Logits, EngineCache]:
        """Compute the logits of the tokens that follow a cache.

        Args:
            input_ids: The new tokens, `[batch, length]`.
            cache: The cache of the call before; its tensors are changed in place.

        Returns:
            The logits `[batch, length, vocabulary]` of the new tokens, and the cache with them.

        Raises:
            StreamlineError: as `prefill`.
        """
        check_length(cache.attention_mask.shape[1] + input_ids.shape[1], self.record.limits.length)
        return self._extend(input_ids, np.ones_like(input_ids), cache)

    def _extend(self, input_ids: TokenIds, mask: Mask, cache: EngineCache) -> tuple[Logits, EngineCache]:
        limit, parts, total_mask = self.record.limits.input, [], cache.attention_mask
        for start in range(0, input_ids.shape[1], limit):
            part = slice(start, start + limit)
            total_mask = np.concatenate([total_mask, mask[:, part]], axis=1)
            parts.append(self._call(input_ids[:, part], total_mask, cache))
        return np.concatenate(parts, axis=1), EngineCache(total_mask, cache.states, cache.steps)

    def _call(self, input_ids: TokenIds, total_mask: Mask, cache: EngineCache) -> Logits:
        """One call of the engine; `total_mask` is the mask of all tokens so far, the new ones included."""
        mask_type = self._dtypes[self.record.masks[0].name]
        masked_score = torch.finfo(mask_type).min / 2
        arrays = static_inputs(input_ids, total_mask, self.record.masks, self.record.limits.length, masked_score)
        tensors = {name: torch.from_numpy(array).to(self._dtypes[name]) for name, array in arrays.items()}
        new = input_ids.shape[1]
        if new not in cache.steps:
            cache.steps[new] = self._prepare(tensors, cache.states)
        step = cache.steps[new]
        for name, tensor in tensors.items():
            step.inputs[name].copy_(tensor)
        step.run()
        logits: Logits = step.logits.to("cpu", torch.float32, copy=True).numpy()  # the next run overwrites the tensor
        return logits

    def _prepare(self, sample: Tensors, states: Tensors) -> _Step:
        """Prepare a call with the shapes of `sample`; a call for one token per row becomes a CUDA graph."""
        inputs = {name: tensor.to(self._device, copy=True) for name, tensor in sample.items()}
        shapes = {name: tuple(tensor.shape) for name, tensor in (inputs | states).items()}
        context = self._context(choose_profile(self.record.profiles, shapes))
        for name, tensor in (inputs | states).items():
            context.set_input_shape(name, tuple(tensor.shape))
        logits = torch.empty(
            tuple(context.get_tensor_shape("logits")), dtype=self._dtypes["logits"], device=self._device
        )
        cache_outputs = {output: states[cache_input] for output, cache_input in self.record.aliases.items()}
        tensors = {**inputs, **states, **cache_outputs, "logits": logits}

        def run() -> None:
            # Shapes and addresses are set at each run, because prepared calls of other lengths share the context.
            for name, tensor in inputs.items():
                context.set_input_shape(name, tuple(tensor.shape))
            for name, tensor in tensors.items():
                context.set_tensor_address(name, tensor.data_ptr())
            if not context.execute_async_v3(self._stream()):
                raise StreamlineError(f"{self.runtime} cannot run the engine: {last_error(self._log)}")

        one_token = inputs["input_ids"].shape[1] == 1
        return _Step(inputs, logits, _captured(run) if one_token and self._device.type == "cuda" else run)

    def _context(self, profile: int) -> Any:
        """The execution context of a profile; created once, because each has its own memory."""
        if profile not in self._contexts:
            context = self._engine.create_execution_context()
            context.set_optimization_profile_async(profile, self._stream())
            self._contexts[profile] = context
        return self._contexts[profile]

    def _stream(self) -> int:
        return int(torch.cuda.current_stream().cuda_stream) if self._device.type == "cuda" else 0

    def _names(self) -> list[str]:
        return [self._engine.get_tensor_name(index) for index in range(self._engine.num_io_tensors)]

    def _dtype(self, name: str) -> torch.dtype:
        kinds: Mapping[Any, torch.dtype] = {
            self._trt.DataType.FLOAT: torch.float32,
            self._trt.DataType.HALF: torch.float16,
            self._trt.DataType.BF16: torch.bfloat16,
            self._trt.DataType.INT64: torch.int64,
        }
        return kinds[self._engine.get_tensor_dtype(name)]

    def _empty(self, name: str, batch: int) -> torch.Tensor:
        _, *sizes = self._engine.get_tensor_shape(name)
        return torch.zeros((batch, *sizes), dtype=self._dtypes[name], device=self._device)


def _machine(trt: Any, device: torch.device) -> Machine:
    if device.type != "cuda":
        return Machine(trt.__version__, device.type, 0)
    major, minor = torch.cuda.get_device_capability()
    return Machine(trt.__version__, torch.cuda.get_device_name(), 10 * major + minor)


def _captured(run: Callable[[], None]) -> Callable[[], None]:
    """Capture a run of the engine as a CUDA graph; returns the function that replays it.

    An engine must run once before a capture. Running it twice is harmless: it writes the same token to the same cache
    position.
    """
    stream_class: Any = torch.cuda.Stream  # torch has no type hints for it
    side = stream_class()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay

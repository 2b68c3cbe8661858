"""Running an engine on torch's tensors: caches are written in place, decoding is one CUDA graph.

What is fed, and where in the caches it goes, `engine_inputs.py` says; which requests an engine takes, its record.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from optimum.exporters.streamline.parity.calls import Mask
from optimum.exporters.streamline.tensorrt.graph.engine_inputs import check_length, static_inputs
from optimum.streamline.errors import StreamlineError, require_extra
from optimum.streamline.runtime.runner import Logits, TokenIds

from .build_engine import BUILDERS, last_error, make_logger
from .engine_record import ENGINE_FILE, EngineRecord, Machine
from .profiles import choose_profile

Tensors = dict[str, torch.Tensor]


@dataclass
class EngineCache:
    """What an engine remembers; it is written in place, so that an earlier one is gone once there is a later.

    Args:
        attention_mask: `[batch, length]`, 0 for padding, of everything fed so far.
        states: By input, `[batch, heads, cache length, head size]`.
        steps: What decodes further tokens, by their number: once captured it is replayed.
    """

    attention_mask: Mask
    states: Tensors
    steps: dict[int, _Step] = field(default_factory=dict)


@dataclass(frozen=True)
class _Step:
    """A call of fixed shapes: its inputs beside the caches, its logits, and what runs it."""

    inputs: Tensors
    logits: torch.Tensor
    run: Callable[[], None]


class TensorrtRunner:
    """A `Runner` over the engine of an exported folder.

    Args:
        folder: Of the artifact.
        library: The builder's own module; imported where it is not given.
        device: Where the engine is.

    Raises:
        StreamlineError: the library is not installed, or the engine is of another version or for another GPU.
    """

    def __init__(self, folder: Path, library: Any = None, device: str = "cuda") -> None:
        self.record = EngineRecord.read(folder)
        self.runtime = self.record.builder
        builder = BUILDERS[self.record.builder]
        self._trt = library or require_extra(builder.module, builder.extra)
        self._device = torch.device(device)
        self.record.check_machine(_machine(self._trt, self._device))
        # The engine does not outlive the runtime that read it.
        self._log = make_logger(self._trt)
        self._reader = self._trt.Runtime(self._log)
        self._engine = self._reader.deserialize_cuda_engine((folder / ENGINE_FILE).read_bytes())
        if self._engine is None:
            raise StreamlineError(f"{folder / ENGINE_FILE}: {self.runtime} cannot read it: {last_error(self._log)}")
        self._contexts: dict[int, Any] = {}
        self._dtypes = {name: self._dtype(name) for name in self._names()}

    def prefill(self, input_ids: TokenIds, attention_mask: Mask | None = None) -> tuple[Logits, EngineCache]:
        """Logits `[batch, length, vocabulary]` of a prompt `[batch, length]`, and its cache.

        A prompt of more tokens than a call takes is fed in parts.

        Args:
            attention_mask: `[batch, length]`, 0 for padding, which must be on the left; all tokens by default.

        Raises:
            StreamlineError: the request is beyond what the engine was built for.
        """
        batch = len(input_ids)
        check_length(input_ids.shape[1], self.record.limits.length)
        states = {name: self._empty(name, batch) for name in self.record.aliases.values()}
        cache = EngineCache(np.ones((batch, 0), np.int64), states)
        return self._extend(input_ids, np.ones_like(input_ids) if attention_mask is None else attention_mask, cache)

    def decode(self, input_ids: TokenIds, cache: EngineCache) -> tuple[Logits, EngineCache]:
        """Logits of the tokens `[batch, length]` that follow `cache`, and the cache that holds them too.

        Raises:
            StreamlineError: as `prefill`.
        """
        check_length(cache.attention_mask.shape[1] + input_ids.shape[1], self.record.limits.length)
        return self._extend(input_ids, np.ones_like(input_ids), cache)

    def _extend(self, input_ids: TokenIds, mask: Mask, cache: EngineCache) -> tuple[Logits, EngineCache]:
        most, parts, seen = self.record.limits.input, [], cache.attention_mask
        for start in range(0, input_ids.shape[1], most):
            part = slice(start, start + most)
            seen = np.concatenate([seen, mask[:, part]], axis=1)
            parts.append(self._call(input_ids[:, part], seen, cache))
        return np.concatenate(parts, axis=1), EngineCache(seen, cache.states, cache.steps)

    def _call(self, input_ids: TokenIds, seen: Mask, cache: EngineCache) -> Logits:
        mask_type = self._dtypes[self.record.masks[0].name]
        closed = torch.finfo(mask_type).min / 2
        arrays = static_inputs(input_ids, seen, self.record.masks, self.record.limits.length, closed)
        fed = {name: torch.from_numpy(array).to(self._dtypes[name]) for name, array in arrays.items()}
        new = input_ids.shape[1]
        if new not in cache.steps:
            cache.steps[new] = self._prepare(fed, cache.states)
        step = cache.steps[new]
        for name, tensor in fed.items():
            step.inputs[name].copy_(tensor)
        step.run()
        logits: Logits = step.logits.to("cpu", torch.float32, copy=True).numpy()  # the next call writes there again
        return logits

    def _prepare(self, fed: Tensors, states: Tensors) -> _Step:
        """A call of these shapes, its tensors bound; one token a row is captured, to be replayed."""
        inputs = {name: tensor.to(self._device, copy=True) for name, tensor in fed.items()}
        shapes = {name: tuple(tensor.shape) for name, tensor in (inputs | states).items()}
        context = self._context(choose_profile(self.record.profiles, shapes))
        for name, tensor in (inputs | states).items():
            context.set_input_shape(name, tuple(tensor.shape))
        logits = torch.empty(
            tuple(context.get_tensor_shape("logits")), dtype=self._dtypes["logits"], device=self._device
        )
        written = {output: states[given] for output, given in self.record.aliases.items()}
        tensors = {**inputs, **states, **written, "logits": logits}

        def run() -> None:
            # Bound at each call: steps of other lengths share the context.
            for name, tensor in inputs.items():
                context.set_input_shape(name, tuple(tensor.shape))
            for name, tensor in tensors.items():
                context.set_tensor_address(name, tensor.data_ptr())
            if not context.execute_async_v3(self._stream()):
                raise StreamlineError(f"{self.runtime} cannot run the engine: {last_error(self._log)}")

        one_token = inputs["input_ids"].shape[1] == 1
        return _Step(inputs, logits, _captured(run) if one_token and self._device.type == "cuda" else run)

    def _context(self, profile: int) -> Any:
        """A context for a profile, which has memory of its own."""
        if profile not in self._contexts:
            context = self._engine.create_execution_context()
            context.set_optimization_profile_async(profile, self._stream())
            self._contexts[profile] = context
        return self._contexts[profile]

    def _stream(self) -> int:
        return int(torch.cuda.current_stream().cuda_stream) if self._device.type == "cuda" else 0

    def _names(self) -> list[str]:
        return [self._engine.get_tensor_name(place) for place in range(self._engine.num_io_tensors)]

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
    """Run once, as an engine must be before it is captured, then capture: a token is written twice, to one place."""
    make: Any = torch.cuda.Stream  # untyped
    side = make()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay

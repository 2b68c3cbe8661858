"""Build an engine from an ONNX graph with TensorRT or TensorRT-RTX, which have the same Python interface.

TensorRT builds only for the GPU of this machine. TensorRT-RTX can also build for other GPUs, on a machine without one;
it chooses the kernels when the engine first runs.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from optimum.streamline.errors import StreamlineError, require_extra

from .profiles import Profile

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Builder:
    """A library that builds engines.

    Args:
        module: The name of its Python module.
        extra: The extra of this distribution that installs it.
        cross_builds: Whether it can build for GPUs that this machine does not have.
    """

    module: str
    extra: str
    cross_builds: bool


BUILDERS = {
    "tensorrt": Builder("tensorrt", "tensorrt", cross_builds=False),
    "tensorrt-rtx": Builder("tensorrt_rtx", "tensorrt-rtx", cross_builds=True),
}


@dataclass(frozen=True)
class BuildInfo:
    """Facts about a build.

    Args:
        version: The version of the library.
        layers: The number of layers of the network before the library fused them.
    """

    version: str
    layers: int


def open_builder(name: str, capabilities: Sequence[int]) -> ModuleType:
    """Import the library of a builder, and check that it can build for these GPUs on this machine.

    Args:
        name: A key of `BUILDERS`.
        capabilities: The compute capabilities to build for, 89 for 8.9; empty for the GPU of this machine.

    Returns:
        The library's module.

    Raises:
        StreamlineError: the builder is unknown or not installed, needs a GPU, or does not support a capability.
    """
    if name not in BUILDERS:
        raise StreamlineError(f"builder {name!r}: unknown; one of {', '.join(BUILDERS)}")
    builder = BUILDERS[name]
    if capabilities and not builder.cross_builds:
        raise StreamlineError(
            f"compute-capability {_listed(capabilities)}: builder {name!r} builds for this machine's GPU only; leave "
            "it out, or give builder 'tensorrt-rtx'"
        )
    if not capabilities and not torch.cuda.is_available():
        raise StreamlineError(
            f"builder {name!r}: this machine has no GPU to build for; give builder 'tensorrt-rtx' and "
            "compute-capability, such as 89,120, which need none"
        )
    module = require_extra(builder.module, builder.extra)
    known = supported_capabilities(module) if capabilities else []
    for capability in capabilities:
        if capability not in known:
            raise StreamlineError(f"compute-capability {capability}: {name} builds for {_listed(known)}")
    return module


def supported_capabilities(trt: ModuleType) -> list[int]:
    """The compute capabilities that a library can build for without such a GPU, in rising order, 89 for 8.9."""
    names = [name.removeprefix("SM") for name in dir(trt.ComputeCapability) if name.startswith("SM")]
    return sorted(int(name) for name in names if name.isdigit())


def build_engine(
    trt: Any, graph: Path, engine: Path, profiles: Sequence[Profile], capabilities: Sequence[int], timing: Path | None
) -> BuildInfo:
    """Build an engine from a graph.

    Args:
        trt: The library's module, from `open_builder`.
        graph: The `.onnx` file; its weights must be beside it.
        engine: The engine file to write.
        profiles: The optimization profiles: the allowed shapes of the graph's inputs.
        capabilities: As in `open_builder`.
        timing: The timing cache, a file of measured kernel times. It is read if it exists, and written, so that the
            next build is faster. `None` for a library that measures no kernels during a build.

    Returns:
        The library's version, and the size of the network.

    Raises:
        StreamlineError: the library cannot read the graph or cannot build the engine; has the library's message.
    """
    log = make_logger(trt)
    builder = trt.Builder(log)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(str(graph)):
        errors = "; ".join(parser.get_error(index).desc() for index in range(parser.num_errors))
        raise StreamlineError(f"{_name(trt)} cannot read the graph: {_one_line(errors)}")
    _allow_decomposed_attention(trt, network)
    config = builder.create_builder_config()
    for profile in profiles:
        config.add_optimization_profile(_profile(builder, profile))
    _set_capabilities(trt, config, capabilities)
    if timing is not None:
        cache = config.create_timing_cache(timing.read_bytes() if timing.is_file() else b"")
        config.set_timing_cache(cache, ignore_mismatch=False)
    serialized = builder.build_serialized_network(network, config)
    if serialized is None:
        raise StreamlineError(f"{_name(trt)} cannot build the engine: {last_error(log)}")
    engine.write_bytes(serialized)
    if timing is not None:
        timing.write_bytes(config.get_timing_cache().serialize())
    return BuildInfo(trt.__version__, network.num_layers)


def _allow_decomposed_attention(trt: Any, network: Any) -> None:
    """Let TensorRT build attention from other layers if it has no fused kernel, as for float32 or small heads."""
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        if layer.type == trt.LayerType.ATTENTION_INPUT:
            layer.__class__ = trt.IAttentionInputLayer  # TensorRT's Python gives access to a subclass's fields this way
            layer.attention.decomposable = True


def _profile(builder: Any, profile: Profile) -> Any:
    optimization_profile = builder.create_optimization_profile()
    for name, shapes in profile.items():
        optimization_profile.set_shape(name, shapes.least, shapes.usual, shapes.most)
    return optimization_profile


def _set_capabilities(trt: Any, config: Any, capabilities: Sequence[int]) -> None:
    if capabilities:
        config.num_compute_capabilities = len(capabilities)
        for index, capability in enumerate(capabilities):
            config.set_compute_capability(getattr(trt.ComputeCapability, f"SM{capability}"), index)


def make_logger(trt: Any) -> Any:
    """A logger for the library that forwards to Python's `logging` and collects error messages in `errors`.

    Args:
        trt: The library's module.
    """
    severity = trt.ILogger
    levels = {
        severity.INTERNAL_ERROR: logging.ERROR,
        severity.ERROR: logging.ERROR,
        severity.WARNING: logging.WARNING,
        severity.INFO: logging.INFO,
        severity.VERBOSE: logging.DEBUG,
    }

    class Log(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)  # pybind11 requires this call; `super().__init__` is not enough
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            level = levels[severity]
            _logger.log(level, message)
            if level == logging.ERROR:
                self.errors.append(message)

    return Log()


def _name(trt: Any) -> str:
    return next(name for name, builder in BUILDERS.items() if builder.module == trt.__name__)


def last_error(log: Any) -> str:
    """The last error message of a logger from `make_logger`, in one line."""
    return _one_line(log.errors[-1] if log.errors else "")


def _one_line(message: str) -> str:
    return " ".join(message.split()) or "it does not say why"


def _listed(capabilities: Sequence[int]) -> str:
    return ", ".join(map(str, capabilities))

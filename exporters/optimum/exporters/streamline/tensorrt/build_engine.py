"""Building an engine: one function for TensorRT and TensorRT-RTX, which share their interface and differ in reach.

TensorRT builds on and for the GPU that is there. TensorRT-RTX also builds for others, on machines without one, and
finishes an engine where it is first run.
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
        module: What it is imported as.
        extra: Of this distribution, which brings it.
        elsewhere: Whether it builds for GPUs that are not there; then it chooses kernels where the engine is first run.
    """

    module: str
    extra: str
    elsewhere: bool


BUILDERS = {
    "tensorrt": Builder("tensorrt", "tensorrt", elsewhere=False),
    "tensorrt-rtx": Builder("tensorrt_rtx", "tensorrt-rtx", elsewhere=True),
}


@dataclass(frozen=True)
class BuildInfo:
    """What came of a build, beside the engine itself.

    Args:
        version: Of the library.
        layers: Of the network that it made of the graph, before it fuses them.
    """

    version: str
    layers: int


def open_builder(name: str, capabilities: Sequence[int]) -> ModuleType:
    """The library of a builder, if it can build for these GPUs here.

    Args:
        name: A key of `BUILDERS`.
        capabilities: Compute capabilities, 89 for 8.9; none for the GPU that is there.

    Raises:
        StreamlineError: the builder is unknown or not installed, needs a GPU, or knows no such capability.
    """
    if name not in BUILDERS:
        raise StreamlineError(f"builder {name!r}: unknown; one of {', '.join(BUILDERS)}")
    builder = BUILDERS[name]
    if capabilities and not builder.elsewhere:
        raise StreamlineError(
            f"compute-capability {_listed(capabilities)}: builder {name!r} builds for the GPU it is on"
        )
    if not capabilities and not torch.cuda.is_available():
        raise StreamlineError(
            f"builder {name!r}: there is no GPU here to build for; builder 'tensorrt-rtx' with compute-capability, "
            "such as 89,120, needs none"
        )
    module = require_extra(builder.module, builder.extra)
    known = supported_capabilities(module) if capabilities else []
    for capability in capabilities:
        if capability not in known:
            raise StreamlineError(f"compute-capability {capability}: {name} builds for {_listed(known)}")
    return module


def supported_capabilities(trt: ModuleType) -> list[int]:
    """The compute capabilities that a library can build for elsewhere."""
    names = [name.removeprefix("SM") for name in dir(trt.ComputeCapability) if name.startswith("SM")]
    return sorted(int(name) for name in names if name.isdigit())


def build_engine(
    trt: Any, graph: Path, engine: Path, profiles: Sequence[Profile], capabilities: Sequence[int], timing: Path | None
) -> BuildInfo:
    """Build an engine of a graph.

    Args:
        trt: The module of either library.
        graph: `model.onnx`, its weights beside it.
        engine: The file to write.
        profiles: Of the graph's inputs that vary.
        capabilities: As `open_builder` has taken them.
        timing: A file of what was measured of kernels: read where it is there, and written, so that the next build
            need not measure it again. None for a library that measures nothing while it builds.

    Raises:
        StreamlineError: the library cannot take the graph, or not build it; with its own words.
    """
    log = make_logger(trt)
    builder = trt.Builder(log)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(str(graph)):
        said = "; ".join(parser.get_error(place).desc() for place in range(parser.num_errors))
        raise StreamlineError(f"{_name(trt)} cannot read the graph: {_one_line(said)}")
    _let_attention_be_decomposed(trt, network)
    config = builder.create_builder_config()
    for profile in profiles:
        config.add_optimization_profile(_profile(builder, profile))
    _aim(trt, config, capabilities)
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


def _let_attention_be_decomposed(trt: Any, network: Any) -> None:
    """Where there is no kernel for an attention, as for float or for narrow heads, let it be made of other layers."""
    for place in range(network.num_layers):
        layer = network.get_layer(place)
        if layer.type == trt.LayerType.ATTENTION_INPUT:
            layer.__class__ = trt.IAttentionInputLayer  # how TensorRT's Python lets a layer's own fields be reached
            layer.attention.decomposable = True


def _profile(builder: Any, profile: Profile) -> Any:
    made = builder.create_optimization_profile()
    for name, shapes in profile.items():
        made.set_shape(name, shapes.least, shapes.usual, shapes.most)
    return made


def _aim(trt: Any, config: Any, capabilities: Sequence[int]) -> None:
    if capabilities:
        config.num_compute_capabilities = len(capabilities)
        for place, capability in enumerate(capabilities):
            config.set_compute_capability(getattr(trt.ComputeCapability, f"SM{capability}"), place)


def make_logger(trt: Any) -> Any:
    """A logger of the library's that writes to Python's, and keeps the text of errors in `errors`."""
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
            trt.ILogger.__init__(self)  # which the library asks for in place of `super`
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
    """The last error of a logger of `make_logger`, in one line."""
    return _one_line(log.errors[-1] if log.errors else "")


def _one_line(said: str) -> str:
    return " ".join(said.split()) or "it does not say why"


def _listed(capabilities: Sequence[int]) -> str:
    return ", ".join(map(str, capabilities))

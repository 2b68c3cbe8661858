"""Run an ONNX export on ONNX Runtime's TensorRT provider, with engines that are built once and kept.

By default the provider rebuilds an engine for each shape that it has not seen, and so at every decode step. Here the
engine is built for a range of shapes from the start and kept beside the graph, and a request outside the range is
refused. The provider uses TensorRT 10, because onnxruntime-gpu is linked against it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx_ir as ir

from optimum.exporters.streamline.onnx.genai_config import CONFIG_FILE
from optimum.exporters.streamline.onnx.runner import PROVIDER_OPTIONS, PROVIDERS, OnnxRunner
from optimum.exporters.streamline.rewriting.public_names import BATCH, PAST, SEQUENCE, TOTAL
from optimum.exporters.streamline.tensorrt.graph.growing_cache import write_growing_graph
from optimum.streamline.errors import StreamlineError, require_extra

from .engine_options import EngineOptions, Limits
from .profiles import Axes, Profile, axes_of, choose_profile, profile_of

if TYPE_CHECKING:
    import onnxruntime

PROVIDER = "TensorrtExecutionProvider"
EXTRA = "onnx-tensorrt"
ENGINES = "engines"
_PRECISIONS = {ir.DataType.FLOAT: "fp32", ir.DataType.FLOAT16: "fp16", ir.DataType.BFLOAT16: "bf16"}


class TensorrtProviderRunner(OnnxRunner):
    """An `OnnxRunner` on ONNX Runtime's TensorRT provider.

    Args:
        folder: The artifact's folder; its subfolder `engines` keeps the engines.
        options: The largest requests to build engines for; `builder` and `capabilities` are ignored.
        device: The device of the caches.

    Raises:
        StreamlineError: ONNX Runtime lacks the provider or cannot load TensorRT, or TensorRT does not take the graph.
    """

    runtime = "onnxruntime-tensorrt"

    def __init__(self, folder: Path, options: EngineOptions, device: str = "cuda") -> None:
        self._limits = options.limits(_context(folder))
        super().__init__(folder, device, self._open)
        self._profile = growing_profile(_axes(self.session), self._limits)

    def _open(self, folder: Path) -> onnxruntime.InferenceSession:
        onnxruntime = require_extra("onnxruntime", EXTRA)
        if PROVIDER not in onnxruntime.get_available_providers():
            raise StreamlineError(
                f'{PROVIDER}: the installed ONNX Runtime has none; pip install "optimum-streamline[{EXTRA}]"'
            )
        # Importing the Python package loads the libraries that the provider links to. They may be installed otherwise.
        with suppress(ImportError):
            import_module("tensorrt")
        graph = write_growing_graph(folder)
        inputs = {str(value.name): value for value in ir.load(graph).graph.inputs}
        axes = {name: axes_of(value) for name, value in inputs.items()}
        cache = next(value for name, value in inputs.items() if name.startswith("past_key_values."))
        precision = _PRECISIONS[cache.dtype or ir.DataType.FLOAT]
        options = provider_options(growing_profile(axes, self._limits), precision, folder / ENGINES)
        (folder / ENGINES).mkdir(exist_ok=True)
        session = onnxruntime.InferenceSession(
            str(graph), providers=[(PROVIDER, options), (PROVIDERS["cuda"], PROVIDER_OPTIONS["cuda"])]
        )
        if session.get_providers()[0] != PROVIDER:
            raise StreamlineError(
                f'{PROVIDER}: ONNX Runtime cannot load TensorRT 10; pip install "optimum-streamline[{EXTRA}]"'
            )
        return session

    def _run(self, inputs: dict[str, Any], states: tuple[Any, ...]) -> list[Any]:
        shapes: dict[str, Sequence[int]] = {name: array.shape for name, array in inputs.items()}
        shapes |= {each.name: tuple(state.shape()) for each, state in zip(self._past, states, strict=True)}
        choose_profile([self._profile], shapes)
        return super()._run(inputs, states)


def growing_profile(inputs: Mapping[str, Axes], limits: Limits) -> Profile:
    """The profile of a graph with growing caches.

    The provider requires that the largest past length and the largest new length add up to the largest total length,
    and the smallest likewise. So the profile allows `limits.length` past tokens and `limits.input` new ones.

    Args:
        inputs: The axes of each input, by name.
        limits: The largest requests.
    """
    half = limits.length // 2
    sizes = {
        BATCH: (1, 1, limits.batch),
        SEQUENCE: (1, 1, limits.input),
        PAST: (0, half, limits.length),
        TOTAL: (1, half + 1, limits.length + limits.input),
    }
    return profile_of(inputs, sizes)


def provider_options(profile: Profile, precision: str, engines: Path) -> dict[str, str]:
    """The provider options that make it build an engine once and load it the next time.

    Args:
        profile: The allowed shapes of each input.
        precision: The type of the graph's caches: `fp32`, `fp16` or `bf16`.
        engines: The folder for the engine cache and the timing cache.
    """
    fields = {"min": "least", "opt": "usual", "max": "most"}
    shapes = {
        f"trt_profile_{name_in_option}_shapes": ",".join(
            f"{name}:{'x'.join(map(str, getattr(shapes, field)))}" for name, shapes in profile.items()
        )
        for name_in_option, field in fields.items()
    }
    return {
        **shapes,
        "trt_engine_cache_enable": "1",
        "trt_engine_cache_path": str(engines),
        "trt_timing_cache_enable": "1",
        "trt_timing_cache_path": str(engines),
        # The provider's TensorRT 10 uses half precision only if it is enabled.
        **({} if precision == "fp32" else {f"trt_{precision}_enable": "1"}),
    }


def _axes(session: Any) -> dict[str, Axes]:
    return {each.name: tuple(each.shape) for each in session.get_inputs()}


def _context(folder: Path) -> int:
    """The number of positions of the exported model."""
    fields = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    return int(fields["model"]["context_length"])

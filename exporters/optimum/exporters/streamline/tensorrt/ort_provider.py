"""An ONNX export on ONNX Runtime's TensorRT provider, whose engines are built once and kept.

The provider builds an engine anew whenever a shape is outside the ones it was built for, at every decode step if nobody
says otherwise. Here every input that varies has its range from the start, engines are kept beside the graph, and what
is outside of the ranges is refused before the provider hears of it. TensorRT 10, which onnxruntime-gpu is linked to.
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
from optimum.exporters.streamline.onnx.runner import OnnxRunner
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
    """An `OnnxRunner` on the TensorRT provider of a GPU.

    Args:
        folder: The artifact's folder, which engines are kept in.
        options: The largest requests, which engines are built for; what else they say is of other builders.
        device: Where the caches are.

    Raises:
        StreamlineError: ONNX Runtime has no such provider or cannot load TensorRT; or the graph is not one for it.
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
        with suppress(ImportError):  # it may be installed otherwise; from its package, importing loads what is linked
            import_module("tensorrt")
        graph = write_growing_graph(folder)
        inputs = {str(value.name): value for value in ir.load(graph).graph.inputs}
        axes = {name: axes_of(value) for name, value in inputs.items()}
        cache = next(value for name, value in inputs.items() if name.startswith("past_key_values."))
        precision = _PRECISIONS[cache.dtype or ir.DataType.FLOAT]
        options = provider_options(growing_profile(axes, self._limits), precision, folder / ENGINES)
        (folder / ENGINES).mkdir(exist_ok=True)
        session = onnxruntime.InferenceSession(str(graph), providers=[(PROVIDER, options), "CUDAExecutionProvider"])
        if session.get_providers()[0] != PROVIDER:
            raise StreamlineError(
                f'{PROVIDER}: ONNX Runtime cannot load TensorRT 10; pip install "optimum-streamline[{EXTRA}]"'
            )
        return session

    def _run(self, feeds: dict[str, Any], states: tuple[Any, ...]) -> list[Any]:
        shapes: dict[str, Sequence[int]] = {name: array.shape for name, array in feeds.items()}
        shapes |= {each.name: tuple(state.shape()) for each, state in zip(self._past, states, strict=True)}
        choose_profile([self._profile], shapes)
        return super()._run(feeds, states)


def growing_profile(inputs: Mapping[str, Axes], limits: Limits) -> Profile:
    """The shapes of every input that varies, of a graph whose caches grow.

    The longest text has `limits.length` tokens before the last call and `limits.input` in it: the provider wants the
    largest of all lengths to add up, as it does the least.
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
    """The options under which the provider builds an engine once, and finds it again.

    Args:
        precision: The type of the graph's caches: `fp32`, `fp16` or `bf16`.
        engines: The folder that engines, and what was measured of kernels, are kept in.
    """
    kinds = {"min": "least", "opt": "usual", "max": "most"}
    shapes = {
        f"trt_profile_{said}_shapes": ",".join(
            f"{name}:{'x'.join(map(str, getattr(shapes, kind)))}" for name, shapes in profile.items()
        )
        for said, kind in kinds.items()
    }
    return {
        **shapes,
        "trt_engine_cache_enable": "1",
        "trt_engine_cache_path": str(engines),
        "trt_timing_cache_enable": "1",
        "trt_timing_cache_path": str(engines),
        # A network of TensorRT 10 computes in half precision only where that is allowed.
        **({} if precision == "fp32" else {f"trt_{precision}_enable": "1"}),
    }


def _axes(session: Any) -> dict[str, Axes]:
    return {each.name: tuple(each.shape) for each in session.get_inputs()}


def _context(folder: Path) -> int:
    """How many positions the model of an export has."""
    fields = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    return int(fields["model"]["context_length"])

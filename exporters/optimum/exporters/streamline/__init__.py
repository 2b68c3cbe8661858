"""Export a checkpoint to ONNX or to TensorRT, and open an export for running.

Start at `api.py`. `onnx/` and `tensorrt/` hold the two formats. Both trace the model (`tracing/`), rewrite the graph
(`rewriting/`) and compare it with torch (`parity/`); `export_steps.py` has the other steps that they share.
Importing this package is cheap: torch, transformers and the runtimes are imported when a function needs them.
"""

from .api import check_export, export_checkpoint, open_artifact, open_hidden_states
from .onnx.quantization.quantizers import GRAPH_QUANTIZERS
from .tensorrt.engine_options import EngineOptions
from .tensorrt.graph.quantizers import ENGINE_QUANTIZERS
from .tensorrt.registration import register_when_needed

__all__ = [
    "ENGINE_QUANTIZERS",
    "GRAPH_QUANTIZERS",
    "EngineOptions",
    "check_export",
    "export_checkpoint",
    "open_artifact",
    "open_hidden_states",
]

register_when_needed()

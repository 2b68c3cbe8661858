"""Export to TensorRT, and run the engine.

`export.py` is the export from start to end; it uses `graph/` for the ONNX graph and `build_engine.py` for the engine.
`runner.py` runs an engine. `backend.py` offers both to `transformers.exporters`. `ort_provider.py` runs an ONNX export
on ONNX Runtime's TensorRT provider.
"""

__all__ = [
    "backend",
    "build_engine",
    "engine_options",
    "engine_record",
    "export",
    "graph",
    "ort_provider",
    "profiles",
    "registration",
    "runner",
    "transformers_manifest",
]

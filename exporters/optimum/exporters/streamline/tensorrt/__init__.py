"""Exports to TensorRT: the export from start to end, the engine's options, profiles and record, the builders, the
runner, and the backend for transformers' exporters.
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

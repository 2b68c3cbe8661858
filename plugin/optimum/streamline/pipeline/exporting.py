"""The exports that `run` and `orthogonality` need. No other file of `pipeline` calls the exporters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from optimum.streamline.model_files.artifact import Artifact
from optimum.streamline.quantization.quantizers import NONE, QUANTIZERS
from optimum.streamline.recipe.recipe import Recipe
from optimum.streamline.scoring.similarity import Scores, scores_of
from optimum.streamline.text.windows import Windows

CALIBRATION_WINDOWS = 32
"""The most of the recipe's calibration windows that calibrate a quantizer of graphs."""


def export(checkpoint: str, out: Path, **how: Any) -> Artifact:
    """`optimum.exporters.streamline.export_checkpoint`."""
    from optimum.exporters.streamline import export_checkpoint

    return export_checkpoint(checkpoint, out, **how)


def has_graph(artifact: Artifact) -> bool:
    """Whether an ONNX export lists both its graph and its weights."""
    from optimum.exporters.streamline.graph_files import GRAPH_FILE, WEIGHTS_FILE

    return {GRAPH_FILE, WEIGHTS_FILE} <= set(artifact.files)


def graph_quantizers() -> dict[str, bool]:
    """The ways to quantize an export, and of each whether it is calibrated on text."""
    from optimum.exporters.streamline import GRAPH_QUANTIZERS

    return {name: way.calibrated for name, way in GRAPH_QUANTIZERS.items()}


def is_calibrated(format: str, quantize: str) -> bool:  # noqa: A002 - the command's word
    """Whether a way to quantize an export is calibrated on text."""
    from optimum.exporters.streamline import ENGINE_QUANTIZERS, GRAPH_QUANTIZERS

    ways: Any = ENGINE_QUANTIZERS if format == "tensorrt" else GRAPH_QUANTIZERS
    return quantize in ways and bool(ways[quantize].calibrated)


def check_exportable(recipe: Recipe) -> None:
    """Refuse an export that a recipe asks for and that cannot be made here.

    Raises:
        StreamlineError: as `check_export` of the exporters.
    """
    if recipe.export.format != "none":
        from optimum.exporters.streamline import check_export

        check_export(recipe.export.format, recipe.dtype or "fp32", recipe.device, graph_quantization(recipe))


def graph_quantization(recipe: Recipe) -> str:
    """How the export is quantized: the recipe's `quantize`, unless that is of the checkpoint."""
    return NONE if recipe.quantization.quantizer in QUANTIZERS else recipe.quantization.quantizer


def score_graph(artifact: Artifact, windows: Windows) -> Scores:
    """The importances of a graph's layers."""
    from optimum.exporters.streamline import open_hidden_states

    states = open_hidden_states(artifact)
    layers = len(artifact.hidden) - 1
    return scores_of(lambda batch: [torch.from_numpy(each) for each in states(batch.numpy())], layers, windows)

"""All calls from `pipeline` to the exporters, which are imported only here: their packages are an optional extra."""

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
"""How many of the recipe's calibration windows a graph quantizer uses, at most."""


def export(checkpoint: str, out: Path, **options: Any) -> Artifact:
    """Export a checkpoint: `optimum.exporters.streamline.export_checkpoint`, with its options."""
    from optimum.exporters.streamline import export_checkpoint

    return export_checkpoint(checkpoint, out, **options)


def has_graph(artifact: Artifact) -> bool:
    """Whether the list of files of an ONNX export names both the graph and the weights."""
    from optimum.exporters.streamline.graph_files import GRAPH_FILE, WEIGHTS_FILE

    return {GRAPH_FILE, WEIGHTS_FILE} <= set(artifact.files)


def graph_quantizers() -> dict[str, bool]:
    """The names of the quantizers of ONNX graphs, each with whether it needs calibration text."""
    from optimum.exporters.streamline import GRAPH_QUANTIZERS

    return {name: quantizer.calibrated for name, quantizer in GRAPH_QUANTIZERS.items()}


def is_calibrated(format: str, quantizer: str) -> bool:  # noqa: A002 - the command's word
    """Whether a quantizer of exports needs calibration text.

    Args:
        format: `onnx` or `tensorrt`.
        quantizer: A name that may be unknown, or `none`.
    """
    from optimum.exporters.streamline import ENGINE_QUANTIZERS, GRAPH_QUANTIZERS

    quantizers: Any = ENGINE_QUANTIZERS if format == "tensorrt" else GRAPH_QUANTIZERS
    return quantizer in quantizers and bool(quantizers[quantizer].calibrated)


def check_exportable(recipe: Recipe) -> None:
    """Refuse a recipe whose export this machine cannot make.

    Raises:
        StreamlineError: the format, dtype, device or quantizer cannot be used, or a package is missing.
    """
    if recipe.export.format != "none":
        from optimum.exporters.streamline import check_export

        check_export(recipe.export.format, recipe.dtype or "fp32", recipe.device, graph_quantization(recipe))


def graph_quantization(recipe: Recipe) -> str:
    """The quantizer of the export: the recipe's, or `none` if the recipe quantizes the checkpoint."""
    return NONE if recipe.quantization.quantizer in QUANTIZERS else recipe.quantization.quantizer


def score_graph(artifact: Artifact, windows: Windows) -> Scores:
    """Score the layers of an ONNX export, as `scoring.similarity` scores those of a torch model.

    Args:
        artifact: The export.
        windows: The calibration text.
    """
    from optimum.exporters.streamline import open_hidden_states

    states = open_hidden_states(artifact)
    layers = len(artifact.hidden) - 1
    return scores_of(lambda batch: [torch.from_numpy(each) for each in states(batch.numpy())], layers, windows)

"""Recognize folders that are no checkpoints, so that an error message can say what to give instead.

Only file names, and the `artifact.json` of an export, are looked at.
"""

from __future__ import annotations

from pathlib import Path

from optimum.streamline.errors import StreamlineError
from optimum.streamline.system.atomic_output import REPORT_FILE

from .artifact import Artifact, is_artifact
from .source import ModelSource
from .weight_files import CONFIG_FILE


def refuse_export(source: ModelSource) -> None:
    """Refuse the folder of an export where a checkpoint is needed.

    Raises:
        StreamlineError: the folder holds an export of this program, or an ONNX graph of another.
    """
    folder = source.folder
    if is_artifact(folder):
        artifact = Artifact.read(folder)
        raise StreamlineError(
            f"model {source.model!r}: is an export ({artifact.format}), not a checkpoint; give the checkpoint that it "
            f"was made from, {artifact.source!r}"
        )
    refuse_foreign_graph(source.model, folder)


def refuse_foreign_graph(model: str, folder: Path) -> None:
    """Refuse a folder with an ONNX graph of another program and no weights that torch could load.

    Args:
        model: The folder as the user named it, for the message.
        folder: The folder.

    Raises:
        StreamlineError: the folder holds such a graph.
    """
    graphs = sorted(folder.glob("*.onnx")) + sorted(folder.glob("onnx/*.onnx"))
    if graphs and not any(folder.glob("*.safetensors*")) and not any(folder.glob("*.bin*")):
        raise StreamlineError(
            f"model {model!r}: holds an ONNX graph that another program made ({graphs[0].name}), and no weights that "
            "torch reads; give the checkpoint, and export it with `optimum-cli streamline export` to compare a graph"
        )


def guess_folder_kind(folder: Path) -> str:
    """Guess what a folder without a `config.json` is.

    Returns:
        The end of an error message, with its punctuation; empty if there is nothing to say.
    """
    if (folder / "model_index.json").is_file():
        return "; it seems to be a diffusion pipeline, and this program takes only causal language models"
    if any(folder.glob("*.gguf")):
        return "; it holds GGUF files: give the checkpoint that they were made from"
    if any(folder.glob("*.onnx")):
        return "; it holds an ONNX graph: give the checkpoint that it was made from"
    if (folder / "params.json").is_file():
        return "; it is in its authors' own format: convert it to a transformers checkpoint first"
    if (folder / REPORT_FILE).is_file():
        return "; it holds a report of this program: give a model that the report compares"
    if any(folder.glob("*.safetensors")) or any(folder.glob("*.bin")):
        return "; it holds weights: fetch the config.json of the same model"
    below = [each.parent.name for each in sorted(folder.glob(f"*/{CONFIG_FILE}"))]
    return f"; there is one in {', '.join(below)}" if below else ""

"""What a folder is that was given as a model and is no checkpoint: for a line that tells its user the way out.

Looks at the names of files alone, and at our own description of an export.
"""

from __future__ import annotations

from pathlib import Path

from optimum.streamline.errors import StreamlineError
from optimum.streamline.system.atomic_output import REPORT_FILE

from .artifact import Artifact, is_artifact
from .source import ModelSource
from .weight_files import CONFIG_FILE


def refuse_export(source: ModelSource) -> None:
    """Refuse the folder of an export, where a checkpoint is needed.

    Raises:
        StreamlineError: it is one, of this program or of another.
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
    """Refuse a folder with an ONNX graph that another program made, and no weights that torch could read.

    Args:
        model: What it was called.

    Raises:
        StreamlineError: it is one.
    """
    graphs = sorted(folder.glob("*.onnx")) + sorted(folder.glob("onnx/*.onnx"))
    if graphs and not any(folder.glob("*.safetensors*")) and not any(folder.glob("*.bin*")):
        raise StreamlineError(
            f"model {model!r}: holds an ONNX graph that another program made ({graphs[0].name}), and no weights that "
            "torch reads; give the checkpoint, and export it with `optimum-cli streamline export` to compare a graph"
        )


def seems_to_be(folder: Path) -> str:
    """What a folder without a `config.json` seems to be, as the end of a sentence; empty where that cannot be told."""
    if (folder / "model_index.json").is_file():
        return "; it seems to be a diffusion pipeline, and this program is for causal language models"
    if any(folder.glob("*.gguf")):
        return "; it holds GGUF files: give the checkpoint that they were made from"
    if any(folder.glob("*.onnx")):
        return "; it holds an ONNX graph: give the checkpoint that it was made from"
    if (folder / "params.json").is_file():
        return "; it is in the form of its authors' own code: convert it to a transformers checkpoint first"
    if (folder / REPORT_FILE).is_file():
        return "; it holds a report of this program: give the models that the report is about"
    if any(folder.glob("*.safetensors")) or any(folder.glob("*.bin")):
        return ", but weights: fetch the config.json of the same model"
    below = [each.parent.name for each in sorted(folder.glob(f"*/{CONFIG_FILE}"))]
    return f"; there is one in {', '.join(below)}" if below else ""

"""Read the hidden states between the layers of an exported graph, to score the layers of a quantized model too."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from optimum.exporters.streamline.graph_files import GRAPH_FILE
from optimum.streamline.errors import StreamlineError
from optimum.streamline.model_files.artifact import Artifact
from optimum.streamline.runtime.runner import TokenIds

from .runner import empty_cache_state, open_session, to_ort_value, token_inputs


def open_hidden_states(artifact: Artifact, device: str = "cpu") -> Callable[[TokenIds], list[npt.NDArray[np.float32]]]:
    """Open an ONNX export for reading its hidden states.

    Args:
        artifact: An export to ONNX.
        device: `cpu` or `cuda`.

    Returns:
        A function from token ids `[batch, length]` to `layers + 1` arrays `[batch, length, width]`: the hidden state
        before the first layer, and after each layer.

    Raises:
        StreamlineError: the layers are not separable parts of the graph, or the graph cannot be opened.
    """
    if not artifact.hidden:
        raise StreamlineError(
            f"{artifact.path}: its hidden states cannot be read, the layers are not separable in its graph"
        )
    folder = Path(artifact.path)
    model = ir.load(folder / GRAPH_FILE)
    names = list(dict.fromkeys(artifact.hidden))  # a layer that adds nothing has the same state before and after
    by_name = {str(value.name): value for node in model.graph for value in node.outputs}
    for output in model.graph.outputs[:]:
        model.graph.outputs.remove(output)
    model.graph.outputs.extend(by_name[name] for name in names)
    session = open_session(ir.to_proto(model).SerializeToString(), device, folder)
    past = [each for each in session.get_inputs() if each.name.startswith("past_key_values.")]

    def states(input_ids: TokenIds) -> list[npt.NDArray[np.float32]]:
        inputs: dict[str, Any] = {
            name: to_ort_value(array) for name, array in token_inputs(input_ids, np.ones_like(input_ids)).items()
        }
        inputs |= {each.name: empty_cache_state(each, len(input_ids), device) for each in past}
        outputs = dict(zip(names, session.run_with_ort_values(names, inputs), strict=True))
        return [outputs[name].numpy().astype(np.float32, copy=False) for name in artifact.hidden]

    return states

"""The hidden states between the layers of an exported graph, quantized or not, for scoring its layers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from optimum.exporters.streamline.graph_files import GRAPH_FILE
from optimum.streamline.checkpoints.artifact import Artifact
from optimum.streamline.errors import StreamlineError
from optimum.streamline.runtime.runner import TokenIds

from .runner import empty_cache_state, open_session, to_ort_value, token_inputs


def open_hidden_states(artifact: Artifact, device: str = "cpu") -> Callable[[TokenIds], list[npt.NDArray[np.float32]]]:
    """What gives, for tokens `[batch, length]`, the hidden states before and after each layer.

    Returns:
        A function of the tokens; it returns an array `[batch, length, width]` for each of `layers + 1` places.

    Raises:
        StreamlineError: the layers are no parts of the graph, so that there are none to be read.
    """
    if not artifact.hidden:
        raise StreamlineError(f"{artifact.path}: its layers are no parts of the graph, so they cannot be scored in it")
    folder = Path(artifact.path)
    model = ir.load(folder / GRAPH_FILE)
    names = list(dict.fromkeys(artifact.hidden))  # a layer that adds nothing leaves what entered it
    made = {str(value.name): value for node in model.graph for value in node.outputs}
    for output in model.graph.outputs[:]:
        model.graph.outputs.remove(output)
    model.graph.outputs.extend(made[name] for name in names)
    session = open_session(ir.to_proto(model).SerializeToString(), device, folder)
    past = [each for each in session.get_inputs() if each.name.startswith("past_key_values.")]

    def states(input_ids: TokenIds) -> list[npt.NDArray[np.float32]]:
        feeds: dict[str, Any] = {
            name: to_ort_value(array) for name, array in token_inputs(input_ids, np.ones_like(input_ids)).items()
        }
        feeds |= {each.name: empty_cache_state(each, len(input_ids), device) for each in past}
        found = dict(zip(names, session.run_with_ort_values(names, feeds), strict=True))
        return [found[name].numpy().astype(np.float32, copy=False) for name in artifact.hidden]

    return states

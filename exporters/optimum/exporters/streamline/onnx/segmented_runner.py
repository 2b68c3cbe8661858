"""Run an exported graph a few layers at a time, for a model that does not fit in memory.

The graph is cut into segments between layers. One segment is open at a time, and it processes all calls before the next
segment is opened, so each weight is read once.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from optimum.exporters.streamline.graph_files import GRAPH_FILE
from optimum.exporters.streamline.parity.model_calls import Call
from optimum.streamline.runtime.runner import Logits

from .runner import empty_cache_state, open_session, to_ort_value, token_inputs
from .segments import Segment, segments_of

Values = dict[str, Any]
"""`OrtValue`s by name. They are not numpy arrays, because numpy has no bfloat16."""


class SegmentedRunner:
    """Answers calls with the graph of an artifact, with a few layers in memory at a time.

    Args:
        folder: The artifact's folder.
        hidden: The names of the layers' output hidden states, first to last.
        limit: The most bytes of weights in one segment; a segment has at least one layer, even if it is larger.
        device: `cpu` or `cuda`.
    """

    def __init__(self, folder: Path, hidden: Sequence[str], limit: int, device: str = "cpu") -> None:
        self._folder, self._device = folder, device
        self._model = ir.load(folder / GRAPH_FILE)
        self.segments = segments_of(self._model.graph, hidden, limit)

    def answer(self, calls: Sequence[Call]) -> list[Logits]:
        """The logits `[batch, length, vocabulary]` of each call."""
        held: list[Values] = [
            {name: to_ort_value(array) for name, array in token_inputs(call.input_ids, call.attention_mask).items()}
            for call in calls
        ]
        for index, segment in enumerate(self.segments):
            self._run(segment, calls, held)
            needed = {"logits"}.union(*(each.inputs for each in self.segments[index + 1 :]))
            held = [{name: value for name, value in values.items() if name in needed} for values in held]
        return [values["logits"].numpy().astype(np.float32, copy=False) for values in held]

    def _run(self, segment: Segment, calls: Sequence[Call], held: list[Values]) -> None:
        """Run one segment for every call, and add its outputs to the values held for the call."""
        proto = ir.to_proto(segment.cut_from(self._model))
        session = open_session(proto.SerializeToString(), self._device, self._folder)
        states = [each for each in session.get_inputs() if each.name.startswith("past_key_values.")]
        for call, values in zip(calls, held, strict=True):
            past = {} if call.follows is None else held[call.follows]
            for each in states:
                present = each.name.replace("past_key_values", "present")
                values[each.name] = (
                    past[present] if past else empty_cache_state(each, len(call.input_ids), self._device)
                )
            inputs = {name: values[name] for name in segment.inputs}
            outputs = session.run_with_ort_values(segment.outputs, inputs)
            values.update(zip(segment.outputs, outputs, strict=True))

"""Run an exported graph a few layers at a time, for a model that does not fit in memory.

The graph is cut into segments between layers. One segment is open at a time, and it processes all calls before the next
segment is opened, so each weight is read once.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from optimum.exporters.streamline.graph_files import GRAPH_FILE
from optimum.exporters.streamline.parity.model_calls import Call
from optimum.streamline.runtime.runner import Logits

from .runner import empty_cache_state, open_session, to_ort_value, token_inputs
from .segments import Segment, segments_of

PAST, PRESENT = "past_key_values.", "present."
Values = dict[str, Any]
"""`OrtValue`s by name. They are not numpy arrays, because numpy has no bfloat16."""


class GraphInputs(Protocol):
    """What a graph is given for a call."""

    def of(self, call: Call) -> Mapping[str, npt.NDArray[Any]]:
        """The inputs other than caches, by name."""

    def empty_state(self, value: Any, batch: int) -> Any:
        """The keys or values before the first token, as an `OrtValue`, for a session's description of a cache input."""


@dataclass(frozen=True)
class GrowingInputs:
    """The inputs of a graph whose caches grow with each call.

    Args:
        device: `cpu` or `cuda`: where the caches are.
    """

    device: str = "cpu"

    def of(self, call: Call) -> Mapping[str, npt.NDArray[Any]]:
        """As `GraphInputs.of`."""
        return token_inputs(call.input_ids, call.attention_mask)

    def empty_state(self, value: Any, batch: int) -> Any:
        """As `GraphInputs.empty_state`."""
        return empty_cache_state(value, batch, self.device)


class SegmentedRunner:
    """Answers calls with the graph of an artifact, with a few layers in memory at a time.

    Args:
        folder: The artifact's folder.
        hidden: The names of the layers' output hidden states, first to last.
        limit: The most bytes of weights in one segment; a segment has at least one layer, even if it is larger.
        device: `cpu` or `cuda`.
        inputs: What the graph is given for a call; by default the inputs of a graph with growing caches.
    """

    def __init__(
        self, folder: Path, hidden: Sequence[str], limit: int, device: str = "cpu", inputs: GraphInputs | None = None
    ) -> None:
        self._folder, self._device, self._inputs = folder, device, inputs or GrowingInputs(device)
        self._model = ir.load(folder / GRAPH_FILE)
        self.segments = segments_of(self._model.graph, hidden, limit)

    def answer(self, calls: Sequence[Call]) -> list[Logits]:
        """The logits `[batch, length, vocabulary]` of each call.

        Memory holds what one segment gives to the next, for each call, and the caches of calls that others follow.
        """
        followed, held = {call.follows for call in calls}, [Values() for _ in calls]
        for index, segment in enumerate(self.segments):
            needed = {"logits"} | self._read_after(index)
            for place, outputs in enumerate(self._run(segment, segment.outputs, calls, held)):
                kept = {name for name in outputs if place in followed and name.startswith(PRESENT)}
                held[place] |= {name: value for name, value in outputs.items() if name in needed | kept}
            held = [{name: value for name, value in values.items() if name in needed} for values in held]
        return [values["logits"].numpy().astype(np.float32, copy=False) for values in held]

    def largest(self, calls: Sequence[Call], names: Collection[str]) -> dict[str, float]:
        """The largest absolute number of some values over all calls.

        Args:
            calls: Prompts. Memory holds what one segment of the graph gives to the next, for each.
            names: The names of values that nodes compute.

        Returns:
            The numbers, by the names of the values.
        """
        found, held, left = dict[str, float](), [Values() for _ in calls], set(names)
        for index, segment in enumerate(self.segments):
            part, needed = segment.cut_from(self._model).graph, self._read_after(index)
            watched = sorted({str(value.name) for node in part for value in node.outputs} & left)
            left -= {*watched}
            passed_on = [name for name in segment.outputs if name in needed]
            for place, outputs in enumerate(self._run(segment, [*passed_on, *watched], calls, held)):
                for name in watched:
                    found[name] = max(found.get(name, 0.0), float(np.abs(outputs[name].numpy()).max()))
                values = held[place] | outputs
                held[place] = {name: value for name, value in values.items() if name in needed}
        assert not left, f"no node computes {sorted(left)}"
        return found

    def _read_after(self, index: int) -> set[str]:
        """The names of the values that segments after this one read."""
        return {name for segment in self.segments[index + 1 :] for name in segment.inputs}

    def _run(
        self, segment: Segment, names: Sequence[str], calls: Sequence[Call], held: Sequence[Values]
    ) -> Iterator[Values]:
        """Run one segment for every call; yields the outputs of these names, before the next call runs."""
        if not names:
            return
        part = ir.to_proto(Segment(segment.inputs, list(dict.fromkeys(names))).cut_from(self._model))
        session = open_session(part.SerializeToString(), self._device, self._folder)
        read, written = ([each.name for each in those] for those in (session.get_inputs(), session.get_outputs()))
        states = [each for each in session.get_inputs() if each.name.startswith(PAST)]
        for call, values in zip(calls, held, strict=True):
            given = {name: to_ort_value(array) for name, array in self._inputs.of(call).items() if name in read}
            given |= {name: values[name] for name in read if name in values}
            for each in states:
                past = {} if call.follows is None else held[call.follows]
                present = each.name.replace(PAST, PRESENT)
                given[each.name] = past[present] if past else self._inputs.empty_state(each, len(call.input_ids))
            yield dict(zip(written, session.run_with_ort_values(written, given), strict=True))

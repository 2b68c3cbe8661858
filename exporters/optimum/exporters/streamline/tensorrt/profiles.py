"""Optimization profiles: for each input with a variable shape, the smallest, usual and largest shape of an engine.

TensorRT calls the three min, opt and max. The engine's record stores the profiles, and the runner checks each request
against them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from optimum.exporters.streamline.rewriting.public_names import BATCH, SEQUENCE
from optimum.streamline.errors import StreamlineError

from .engine_options import Limits

if TYPE_CHECKING:
    import onnx_ir as ir

Axes = tuple[int | str, ...]
"""The axes of an input: a size, or the name of a variable axis."""


def axes_of(value: ir.Value) -> Axes:
    """The axes of a graph's input."""
    assert value.shape is not None
    return tuple(axis if isinstance(axis, int) else str(axis) for axis in value.shape)


@dataclass(frozen=True)
class ShapeRange:
    """The allowed shapes of one input.

    Args:
        least: The smallest size of each axis.
        usual: The shape that the engine is optimized for.
        most: The largest size of each axis.
    """

    least: tuple[int, ...]
    usual: tuple[int, ...]
    most: tuple[int, ...]

    def violation(self, shape: Sequence[int]) -> str:
        """Why a shape is not allowed, in words; empty if it is.

        >>> ShapeRange((1, 1), (1, 8), (4, 8)).violation((2, 9))
        'axis 1 is 9, not from 1 to 8'
        """
        if len(shape) != len(self.least):
            return f"has {len(shape)} axes, not {len(self.least)}"
        for axis, (size, least, most) in enumerate(zip(shape, self.least, self.most, strict=True)):
            if not least <= size <= most:
                return f"axis {axis} is {size}, not {f'from {least} to {most}' if least < most else least}"
        return ""


Profile = dict[str, ShapeRange]
"""The allowed shapes of every input with a variable shape, by name."""


def make_profiles(inputs: Mapping[str, Axes], limits: Limits) -> tuple[Profile, ...]:
    """The profiles of an engine: one for prompts of any length, and one for decoding one token per row.

    If a call takes one new token at most, one profile serves both.

    Args:
        inputs: The axes of each input of the graph, by name.
        limits: The largest requests.
    """
    prompt = {BATCH: (1, 1, limits.batch), SEQUENCE: (1, max(1, limits.input // 2), limits.input)}
    decode = {BATCH: prompt[BATCH], SEQUENCE: (1, 1, 1)}
    kinds = [prompt] if limits.input == 1 else [prompt, decode]
    return tuple(profile_of(inputs, sizes) for sizes in kinds)


def profile_of(inputs: Mapping[str, Axes], sizes: Mapping[str, tuple[int, int, int]]) -> Profile:
    """A profile from the sizes of the named axes.

    Args:
        inputs: The axes of each input of the graph, by name.
        sizes: For each named axis, its smallest, usual and largest size.

    Raises:
        StreamlineError: an input has a named axis without sizes.
    """
    varying = {name: axes for name, axes in inputs.items() if any(isinstance(axis, str) for axis in axes)}
    return {name: _range(name, axes, sizes) for name, axes in varying.items()}


def _range(name: str, axes: Axes, sizes: Mapping[str, tuple[int, int, int]]) -> ShapeRange:
    unknown = [axis for axis in axes if isinstance(axis, str) and axis not in sizes]
    if unknown:
        raise StreamlineError(f"input {name}: its axis {unknown[0]!r} has no known limits; one of {', '.join(sizes)}")
    shapes = [tuple(axis if isinstance(axis, int) else sizes[axis][index] for axis in axes) for index in range(3)]
    return ShapeRange(*shapes)


def choose_profile(profiles: Sequence[Profile], shapes: Mapping[str, Sequence[int]]) -> int:
    """The index of the last profile that allows all shapes; later profiles are narrower, and so faster.

    Args:
        profiles: The profiles, the widest first.
        shapes: The shape of each input of a call, by name.

    Raises:
        StreamlineError: no profile allows the shapes; names an input, its shape, and the range of the first profile.
    """
    for index in reversed(range(len(profiles))):
        if not any(_violations(profiles[index], shapes)):
            return index
    name, violation = next(iter(_violations(profiles[0], shapes)))
    raise StreamlineError(f"input {name} {list(shapes[name])}: {violation}")


def _violations(profile: Profile, shapes: Mapping[str, Sequence[int]]) -> Iterable[tuple[str, str]]:
    """The inputs whose shape the profile does not allow, each with the reason."""
    for name, allowed in profile.items():
        if violation := allowed.violation(shapes[name]):
            yield name, violation

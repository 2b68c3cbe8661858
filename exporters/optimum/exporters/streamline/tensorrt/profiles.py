"""What shapes an engine is built for: of every input that varies the least, the usual and the most.

Imports nothing but numbers: an engine's record holds profiles, and a request is held against them.
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


def axes_of(value: ir.Value) -> Axes:
    """The axes of a graph's input."""
    assert value.shape is not None
    return tuple(axis if isinstance(axis, int) else str(axis) for axis in value.shape)


@dataclass(frozen=True)
class ShapeRange:
    """The shapes of one input, from the least to the most, and the one to be fastest."""

    least: tuple[int, ...]
    usual: tuple[int, ...]
    most: tuple[int, ...]

    def misses(self, shape: Sequence[int]) -> str:
        """Where a shape is outside, in words; empty where it is not.

        >>> ShapeRange((1, 1), (1, 8), (4, 8)).misses((2, 9))
        'axis 1 is 9, not from 1 to 8'
        """
        if len(shape) != len(self.least):
            return f"has {len(shape)} axes, not {len(self.least)}"
        for axis, (size, least, most) in enumerate(zip(shape, self.least, self.most, strict=True)):
            if not least <= size <= most:
                return f"axis {axis} is {size}, not {f'from {least} to {most}' if least < most else least}"
        return ""


Profile = dict[str, ShapeRange]
"""By input; every input that varies is there."""


def make_profiles(inputs: Mapping[str, Axes], limits: Limits) -> tuple[Profile, ...]:
    """One for prompts, of any length, and where there are such one for decoding, a token a row.

    Args:
        inputs: Of each input of a graph the axes, a number or a name.
    """
    prompt = {BATCH: (1, 1, limits.batch), SEQUENCE: (1, max(1, limits.input // 2), limits.input)}
    decode = {BATCH: prompt[BATCH], SEQUENCE: (1, 1, 1)}
    kinds = [prompt] if limits.input == 1 else [prompt, decode]
    return tuple(profile_of(inputs, sizes) for sizes in kinds)


def profile_of(inputs: Mapping[str, Axes], sizes: Mapping[str, tuple[int, int, int]]) -> Profile:
    """The shapes of every input that varies.

    Args:
        inputs: As in `make_profiles`.
        sizes: Of each axis that has a name the least, the usual and the largest size.

    Raises:
        StreamlineError: an axis is not among them.
    """
    varying = {name: axes for name, axes in inputs.items() if any(isinstance(axis, str) for axis in axes)}
    return {name: _range(name, axes, sizes) for name, axes in varying.items()}


def _range(name: str, axes: Axes, sizes: Mapping[str, tuple[int, int, int]]) -> ShapeRange:
    unknown = [axis for axis in axes if isinstance(axis, str) and axis not in sizes]
    if unknown:
        raise StreamlineError(f"input {name}: nothing says how long its axis {unknown[0]!r} may be")
    shapes = [tuple(axis if isinstance(axis, int) else sizes[axis][place] for axis in axes) for place in range(3)]
    return ShapeRange(*shapes)


def choose_profile(profiles: Sequence[Profile], shapes: Mapping[str, Sequence[int]]) -> int:
    """The last profile that all shapes are within, since later ones are of fewer shapes.

    Raises:
        StreamlineError: none is; names an input, its shape, and the range of the first profile.
    """
    for place in reversed(range(len(profiles))):
        if not any(_misses(profiles[place], shapes)):
            return place
    name, missed = next(iter(_misses(profiles[0], shapes)))
    raise StreamlineError(f"input {name} {list(shapes[name])}: {missed}")


def _misses(profile: Profile, shapes: Mapping[str, Sequence[int]]) -> Iterable[tuple[str, str]]:
    for name, within in profile.items():
        if missed := within.misses(shapes[name]):
            yield name, missed

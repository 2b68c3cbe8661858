"""Find the pruning methods that other packages register in the entry-point group `optimum_streamline.methods`.

This file does not import the methods, nor torch, so that `--help` can list them fast. `registry.METHODS` imports them.
"""

from __future__ import annotations

import sys
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import NamedTuple

GROUP = "optimum_streamline.methods"


class ThirdPartyMethod(NamedTuple):
    """A method that another package registers.

    Args:
        name: The method's name in a recipe.
        distribution: Name of the installed distribution that registers the method.
        version: Version of the distribution.
        entry_point: The entry point. Loading it imports the class.
    """

    name: str
    distribution: str
    version: str
    entry_point: EntryPoint

    @property
    def package(self) -> str:
        """Distribution and version, as messages name them."""
        return f"{self.distribution} {self.version}"


def third_party_methods() -> tuple[ThirdPartyMethod, ...]:
    """Every registered method, sorted by name and then by distribution.

    Names may repeat: `registry.METHODS` refuses a name that several methods have when the name is looked up.
    """
    return _registered(tuple(sys.path))


@cache  # One search through all installed distributions takes about 30 ms.
def _registered(path: tuple[str, ...]) -> tuple[ThirdPartyMethod, ...]:
    found = []
    for entry_point in entry_points(group=GROUP):
        distribution = entry_point.dist
        assert distribution is not None, "entry_points() sets `dist` for installed distributions"
        found.append(ThirdPartyMethod(entry_point.name, distribution.name, distribution.version, entry_point))
    return tuple(sorted(found))

"""Pruning methods that other distributions register in the entry-point group `optimum_streamline.methods`.

Finds them and imports none of them, and no torch either: `--help` can list them. `registry.METHODS` imports them.
"""

from __future__ import annotations

import sys
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import NamedTuple

GROUP = "optimum_streamline.methods"


class ThirdPartyMethod(NamedTuple):
    """One entry point of the group.

    Args:
        name: What a recipe calls the method.
        distribution: Name of the installed distribution that registers it.
        version: Version of that distribution.
        entry_point: Where the class is.
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
    """Every method that an installed distribution registers, by name, and of one name by distribution.

    Names are as registered: `registry.METHODS` refuses a name that is taken when it is asked for.
    """
    return _registered(tuple(sys.path))


@cache  # One search through all installed distributions takes about 30 ms.
def _registered(path: tuple[str, ...]) -> tuple[ThirdPartyMethod, ...]:
    found = []
    for entry_point in entry_points(group=GROUP):
        distribution = entry_point.dist
        assert distribution is not None, "an entry point of an installed distribution knows it"
        found.append(ThirdPartyMethod(entry_point.name, distribution.name, distribution.version, entry_point))
    return tuple(sorted(found))

"""The name of another machine is read, or refused in one line."""

from __future__ import annotations

import pytest

from optimum.streamline.costs.machine import Machine
from optimum.streamline.errors import StreamlineError


@pytest.mark.parametrize(
    ("text", "gpus", "memory"),
    [
        ("1x H100-80GB", 1, 80e9),
        ("8xA100-SXM4-40GB", 8, 40e9),
        ("2 x RTX-4090-24GB", 2, 24e9),
        ("24GB", 1, 24e9),
        (" 4x 16 gb ", 4, 16e9),
        ("T4-15.5GB", 1, 15.5e9),
    ],
)
def test_names_of_machines(text: str, gpus: int, memory: float) -> None:
    assert Machine.parse(text) == Machine(text.strip(), gpus, int(memory))


@pytest.mark.parametrize("text", ["", "H100", "0x H100-80GB", "80", "two H100-80GB", "1x A-80GB, 1x B-40GB", "0GB"])
def test_other_names_are_refused(text: str) -> None:
    with pytest.raises(StreamlineError, match=r"^on '"):
        Machine.parse(text)

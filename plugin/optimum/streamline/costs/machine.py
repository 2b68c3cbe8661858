"""A machine with GPUs that a user names, such as `1x H100-80GB`."""

from __future__ import annotations

import re
from dataclasses import dataclass

from optimum.streamline.errors import StreamlineError, shown
from optimum.streamline.recipe.quantities import parse_size


@dataclass(frozen=True)
class Machine:
    """A machine with one or more equal GPUs.

    Args:
        name: What the user called it.
        gpus: The number of GPUs.
        memory: The memory of each, in bytes.
    """

    name: str
    gpus: int
    memory: int

    @classmethod
    def parse(cls, text: str) -> Machine:
        """The machine that a text names: the number of its GPUs, their name, and, which must be there, their memory.

        Raises:
            StreamlineError: the text has another form.

        >>> Machine.parse("8x A100-40GB")
        Machine(name='8x A100-40GB', gpus=8, memory=40000000000)
        """
        match = re.fullmatch(r"\s*(?:([0-9]{1,5})\s*x\s*)?(?:\S+-)?([0-9]+(?:\.[0-9]+)?\s*[gmGM][bB])\s*", text)
        if not match or (match[1] is not None and int(match[1]) == 0):
            raise StreamlineError(
                f"on {shown(text)}: must name GPUs and their memory, such as '1x H100-80GB' or '24GB'"
            )
        return cls(text.strip(), int(match[1] or 1), parse_size(match[2], "on"))

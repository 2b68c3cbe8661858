"""What every runtime looks like to the code that times and scores it: the `Runner` protocol.

Arrays are numpy, so that a runner's process imports no framework but its own. This file knows no
runtime; `torch_runner.py` and `optimum.exporters.streamline` hold them, `open_runner` finds the right one.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

TokenIds = npt.NDArray[np.int64]
Logits = npt.NDArray[np.float32]


class Runner(Protocol):
    """A model in some runtime, ready to be fed tokens."""

    runtime: str
    """What runs it, as a user would say it: `torch`, `onnxruntime`."""

    def prefill(self, input_ids: TokenIds) -> tuple[Logits, Any]:
        """Logits `[batch, length, vocabulary]` of a prompt `[batch, length]`, and its cache."""

    def decode(self, input_ids: TokenIds, cache: Any) -> tuple[Logits, Any]:
        """Logits of the tokens `[batch, length]` that follow `cache`, and the cache that holds them too.

        The given cache may be consumed: use only the one returned.
        """

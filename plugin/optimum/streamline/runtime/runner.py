"""The `Runner` protocol: the interface of a model in any runtime, for the code that times and evaluates it.

Arrays are numpy arrays, so that a process that runs ONNX Runtime does not need to import torch.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

TokenIds = npt.NDArray[np.int64]
Logits = npt.NDArray[np.float32]


class Runner(Protocol):
    """A model that is open in a runtime."""

    runtime: str
    """The name of the runtime, such as `torch` or `onnxruntime`."""

    def prefill(self, input_ids: TokenIds) -> tuple[Logits, Any]:
        """Run a prompt.

        Args:
            input_ids: Token ids `[batch, length]`.

        Returns:
            Logits `[batch, length, vocabulary]`, and the key-value cache of the prompt.
        """

    def decode(self, input_ids: TokenIds, cache: Any) -> tuple[Logits, Any]:
        """Run tokens that follow earlier ones.

        Args:
            input_ids: Token ids `[batch, length]`.
            cache: The cache of the earlier tokens. It may change; use only the returned cache afterwards.

        Returns:
            Logits `[batch, length, vocabulary]`, and the cache of all tokens so far.
        """

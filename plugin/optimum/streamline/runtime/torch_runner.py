"""Running a model on torch: the `Runner` every other one is compared with.

Knows nothing of clocks or of other runtimes.
"""

from __future__ import annotations

import torch
from transformers import Cache, DynamicCache, PreTrainedModel

from .runner import Logits, TokenIds


class TorchRunner:
    """A `Runner` over a model in this process.

    Args:
        model: In evaluation mode; `loading.load` gives one with its skipped sublayers dropped.
    """

    runtime = "torch"

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model

    def prefill(self, input_ids: TokenIds) -> tuple[Logits, Cache]:
        """Logits `[batch, length, vocabulary]` of a prompt `[batch, length]`, and its cache."""
        return self.decode(input_ids, DynamicCache(config=self.model.config))

    @torch.inference_mode()
    def decode(self, input_ids: TokenIds, cache: Cache) -> tuple[Logits, Cache]:
        """Logits of the tokens `[batch, length]` that follow `cache`; the cache is extended in place."""
        tokens = torch.from_numpy(input_ids).to(self.model.device)
        output = self.model(input_ids=tokens, past_key_values=cache, use_cache=True)
        logits: Logits = output.logits.float().cpu().numpy()
        return logits, cache

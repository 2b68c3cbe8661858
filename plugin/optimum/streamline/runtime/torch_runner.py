"""`TorchRunner`: a model in torch, the reference that all other runners are compared with."""

from __future__ import annotations

import torch
from transformers import Cache, DynamicCache, PreTrainedModel

from .runner import Logits, TokenIds


class TorchRunner:
    """A `Runner` for a transformers model.

    Args:
        model: The model, in evaluation mode. `checkpoints.loading.load` gives one without its skipped sublayers.
    """

    runtime = "torch"

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model

    def prefill(self, input_ids: TokenIds) -> tuple[Logits, Cache]:
        """Run a prompt; see `Runner.prefill`."""
        return self.decode(input_ids, DynamicCache(config=self.model.config))

    @torch.inference_mode()
    def decode(self, input_ids: TokenIds, cache: Cache) -> tuple[Logits, Cache]:
        """Run tokens that follow `cache`, which grows in place; see `Runner.decode`."""
        tokens = torch.from_numpy(input_ids).to(self.model.device)
        output = self.model(input_ids=tokens, past_key_values=cache, use_cache=True)
        logits: Logits = output.logits.float().cpu().numpy()
        return logits, cache

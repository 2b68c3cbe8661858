"""What a model does, for tests that compare two of them."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from tiny import token_ids


def stock_model(folder: Path) -> PreTrainedModel:
    """The checkpoint in `folder` as stock transformers loads it in fp32, which finds each weight, and no other."""
    stock, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    return stock.eval()


def logits(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    """The logits of all tokens, without gradients."""
    with torch.no_grad():
        return model(ids).logits


def greedy(model: PreTrainedModel, use_cache: bool) -> list[list[int]]:
    """Eight greedy tokens after each of two prompts, one of them padded on the left."""
    ids = token_ids(2, 9, seed=3)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    ids[0, :4] = 1
    out = model.generate(
        ids, attention_mask=mask, max_new_tokens=8, min_new_tokens=8, do_sample=False, use_cache=use_cache
    )
    return out.tolist()

"""Low-rank adapters in the place of full weights: put in before a training, merged into the weights after it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D


@contextmanager
def adapters(model: PreTrainedModel, rank: int, seed: int) -> Iterator[list[nn.Parameter]]:
    """LoRA (arXiv 2106.09685) on every linear layer but the head, W + 2 B A, merged into W when the block ends.

    Experts that are one tensor, as those of mixtures are, are no linear layer: they stay as they are.

    Args:
        rank: Of B A.
        seed: Of the first A; the first B is zero.

    Yields:
        The adapters' weights.
    """
    transposed = any(isinstance(module, Conv1D) for module in model.modules())
    config = LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        target_modules="all-linear",
        fan_in_fan_out=transposed,
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        adapted = get_peft_model(model, config)
    try:
        yield [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    finally:
        adapted.merge_and_unload()

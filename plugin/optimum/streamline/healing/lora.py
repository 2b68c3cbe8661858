"""LoRA adapters for healing: added before a training, and merged into the weights after it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D


@contextmanager
def adapters(model: PreTrainedModel, rank: int, seed: int) -> Iterator[list[nn.Parameter]]:
    """Add LoRA adapters (arXiv 2106.09685) inside the `with` block, and merge them into the weights at its end.

    Every linear module but the output head becomes W + 2 B A. The experts of a mixture share one tensor, which is not a
    linear module, and get no adapter.

    Args:
        model: The model; it has plain weights again after the block.
        rank: The rank of B A.
        seed: The seed of the random initial A. The initial B is zero.

    Yields:
        The weights of the adapters.
    """
    from peft import LoraConfig, get_peft_model  # takes a second or two, and only LoRA needs it

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

"""LoRA adapters for healing: added before a training, and merged into the weights after it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from optimum.streamline.models.offloaded_weights import changing


@contextmanager
def adapters(
    model: PreTrainedModel, rank: int, seed: int, onto: PreTrainedModel | None = None
) -> Iterator[list[nn.Parameter]]:
    """Add LoRA adapters (arXiv 2106.09685) inside the `with` block, and merge them into the weights at its end.

    Every linear module but the output head becomes W + 2 B A. The experts of a mixture share one tensor, which is not a
    linear module, and get no adapter.

    Args:
        model: The model; it has plain weights again after the block.
        onto: If `model` is a compact copy, the model that it was made from, into whose weights the adapters are merged.
            So the rounding of the copy does not stay (QLoRA, arXiv 2305.14314, merges into the rounded weights).
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
        if onto is None:
            adapted.merge_and_unload()
        else:
            _merge(model, onto)


@torch.no_grad()
def _merge(adapted: nn.Module, onto: PreTrainedModel) -> None:
    """Add the adapters of a compact copy to the weights of the model that it was made from."""
    from peft.tuners.lora import LoraLayer

    for name, module in adapted.named_modules():
        if isinstance(module, LoraLayer):
            target = onto.get_submodule(name)
            [adapter] = module.lora_A
            change = module.scaling[adapter] * module.lora_B[adapter].weight @ module.lora_A[adapter].weight
            with changing(target, ["weight"]):
                weight = target.get_parameter("weight")
                weight.add_((change.T if isinstance(target, Conv1D) else change).to(weight))

"""LoRA adapters for healing: added before a training, and merged into the weights after it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

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

    Every linear module but the output head becomes W + 2 B A, and so does each expert in stacked weights, if peft knows
    them.

    Args:
        model: The model. Without `onto` it has plain weights again after the block.
        onto: If `model` is a compact copy (QLoRA, arXiv 2305.14314), the model that it was made from. The adapters are
            merged into its weights. What they learned to undo the rounding of the copy is then a small error.
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
    from peft.tuners.lora.layer import ParamWrapper

    layers: list[tuple[str, Any]] = [each for each in adapted.named_modules() if isinstance(each[1], LoraLayer)]
    for name, module in layers:
        [adapter] = module.lora_A
        own = "weight"
        if isinstance(module, ParamWrapper):  # of the stacked weights of experts, which wrap each other
            own, parameter = module.parameter_name, module.get_param()
            parameter.data = parameter.new_empty(0, dtype=torch.float32)  # in its type the change would be rounded
        target = onto.get_submodule(name.replace(".base_layer", ""))
        change = module.get_delta_weight(adapter)
        if isinstance(target, Conv1D) and not isinstance(module.get_base_layer(), Conv1D):
            change = change.T
        with changing(target, [own]):
            weight = target.get_parameter(own)
            weight.add_(change.to(weight))

"""Share the weights of a model among processes: each holds a part of every tensor (FSDP2, torch's `fully_shard`).

A model is shared from its weights on disk, layer by layer, so that no process ever holds all of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from optimum.streamline.system.distributed import is_main, process_count

from .offloaded_weights import copy_by_layers, write_parameter


def sharded_copy(model: PreTrainedModel, device: str, dtype: torch.dtype, frees_layers: bool = True) -> PreTrainedModel:
    """A copy of a model of whose tensors this process holds a part. All processes must call this, and run the copy.

    Each decoder layer is whole only while it runs. Embeddings, last norm and head are whole while the model runs.

    Args:
        model: The model, with its weights on disk; it is unchanged.
        device: Where the parts are, `cpu` or `cuda`. They are in fp32.
        dtype: The type of the whole tensors, in which the copy computes. Gradients are summed in fp32.
        frees_layers: Whether a layer is freed after its forward pass. If not, it stays whole until its backward pass.
    """
    precision = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    options: dict[str, Any] = {"mesh": _mesh(device), "reshard_after_forward": frees_layers, "mp_policy": precision}

    def sharded(layer: nn.Module) -> nn.Module:
        fully_shard(layer, **options)
        return layer

    shared = copy_by_layers(model, sharded, lambda value: value)
    fully_shard(shared, **options)
    return shared


@cache
def _mesh(device: str) -> DeviceMesh:
    return init_device_mesh(device, (process_count(),))


def is_sharded(model: nn.Module) -> bool:
    """Whether a model is a `sharded_copy`."""
    return isinstance(model, FSDPModule)


def is_shared(tensor: torch.Tensor) -> bool:
    """Whether a tensor is shared among the processes."""
    return isinstance(tensor, DTensor)


def write_back(shared: PreTrainedModel, model: PreTrainedModel) -> None:
    """Write the weights of a sharded copy as those of the model that it was made from, on the main process's disk.

    One tensor at a time is whole in memory. Other processes take part, and their `model` stays as it was.

    Args:
        shared: The copy.
        model: The model, with its weights on disk.
    """
    for module in shared.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    names: dict[nn.Parameter, list[str]] = {}
    for name, parameter in shared.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(name)
    for parameter, own in names.items():
        whole = parameter.detach()
        if isinstance(whole, DTensor):
            whole = whole.full_tensor()
        if is_main():
            write_parameter(model, own, whole.cpu())


def own_part(value: Any) -> Any:
    """The part of a tensor that this process holds; any other value as it is."""
    return value.to_local() if isinstance(value, DTensor) else value


def as_part(value: torch.Tensor, whole: torch.Tensor) -> torch.Tensor:
    """Make a tensor this process's part of a new shared tensor of the form of `whole`; the inverse of `own_part`.

    Args:
        value: The part of this process.
        whole: A tensor of the same size that is shared among the processes; if it is not, `value` is returned.
    """
    if not isinstance(whole, DTensor):
        return value
    return DTensor.from_local(
        value, whole.device_mesh, whole.placements, run_check=False, shape=whole.shape, stride=whole.stride()
    )


def own_state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The state of an optimizer, with this process's parts of the tensors."""
    found = optimizer.state_dict()
    parts = {
        number: {name: own_part(value) for name, value in state.items()} for number, state in found["state"].items()
    }
    return {**found, "state": parts}


def load_own_state(optimizer: torch.optim.Optimizer, found: Mapping[str, Any]) -> None:
    """Load what `own_state` gave, in the same process of as many.

    Args:
        optimizer: The optimizer, with the same parameters in the same order.
        found: The state.
    """
    parameters = [each for group in optimizer.param_groups for each in group["params"]]
    state = {
        number: {
            name: as_part(value, parameters[number]) if isinstance(value, torch.Tensor) and value.ndim else value
            for name, value in values.items()
        }
        for number, values in found["state"].items()
    }
    optimizer.load_state_dict({**found, "state": state})

"""Load a model with its weights left on disk, and read them when they are needed.

transformers and accelerate do the work. Parameters of an offloaded model are on the meta device. Each module reads its
weights just before it runs, and frees them afterwards.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from shutil import rmtree
from tempfile import mkdtemp
from typing import Any
from unittest.mock import patch
from uuid import uuid4

import torch
from accelerate import init_empty_weights
from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_module
from accelerate.utils.offload import OffloadedWeightsLoader, PrefixedDataset
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedModel
from transformers.integrations.accelerate import load_offloaded_parameter, offload_weight

from .architectures import architecture_of, decoder_layers
from .quantized_weights import float_values


def offload_options(folder: Path) -> dict[str, Any]:
    """The arguments of `from_pretrained` that leave all weights on disk.

    Args:
        folder: A folder for weights that must be converted when they are loaded. It must exist as long as the model.
    """
    return {"device_map": {"": "disk"}, "offload_folder": str(folder)}


@contextmanager
def read_without_mapping() -> Iterator[None]:
    """Let `from_pretrained` read weight files in the `with` block, and not map them into memory.

    It reads every weight once, also those that it then leaves on disk.
    """
    with patch("transformers.modeling_utils.safe_open", _open_unmapped):
        yield


def _open_unmapped(file: Any, framework: str = "pt", device: Any = "cpu", **_: Any) -> Any:
    """Open a safetensors file without mapping it: pages that were read once would count as memory until it is closed.

    The arguments are those of `safetensors.safe_open`. Its older versions can only map files.
    """
    unmapped = {"backend": "pread"} if "backend" in (safe_open.__text_signature__ or "") else {}
    return safe_open(file, framework=framework, device=device, **unmapped)


def is_offloaded(model: nn.Module) -> bool:
    """Whether weights of a model are on disk."""
    return any(parameter.is_meta for parameter in model.parameters())


def weights_on_disk(module: nn.Module) -> list[OffloadedWeightsLoader]:
    """The weights on disk that a module's hooks read: one object for all of a model, or none."""
    hooks = (getattr(part, "_hf_hook", None) for part in module.modules())
    maps = (hook.weights_map for hook in hooks if isinstance(hook, AlignDevicesHook))
    return list({id(each.dataset): each.dataset for each in maps if isinstance(each, PrefixedDataset)}.values())


def device_of(model: PreTrainedModel) -> torch.device:
    """The device on which a model computes, also if its weights are on disk."""
    if not is_offloaded(model):
        return model.device
    hooks = (getattr(module, "_hf_hook", None) for module in model.modules())
    devices = (hook.execution_device for hook in hooks if isinstance(hook, AlignDevicesHook))
    return torch.device(next(device for device in devices if device is not None))


def compute_on(model: PreTrainedModel, device: str) -> None:
    """Let an offloaded model compute on a device from now on. Each weight goes there just before it is used.

    Args:
        model: The model, with its weights on disk.
        device: The device, such as `cuda`.
    """
    held = [each for each in model.parameters() if not each.is_meta]  # tied ones once
    moved = {each: nn.Parameter(each.to(device), requires_grad=False) for each in held}
    for module in model.modules():
        if isinstance(hook := getattr(module, "_hf_hook", None), AlignDevicesHook):
            hook.execution_device = torch.device(device)
        for name, parameter in module.named_parameters(recurse=False):
            module._parameters[name] = moved.get(parameter, parameter)
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = buffer.to(device)


def run_layers(model: PreTrainedModel, ids: torch.Tensor) -> None:
    """Run a model for what hooks see of its layers. Of its head nearly nothing runs, and nothing is read from disk.

    Args:
        model: The model.
        ids: Token ids `[windows, length]`, on the model's device.
    """
    if is_offloaded(model):
        model.base_model(ids, use_cache=False)
    else:  # some quantizers unpack weights in hooks on the whole model; logits of one token cost little
        model(ids, use_cache=False, logits_to_keep=1)


def read_parameter(model: PreTrainedModel, name: str) -> torch.Tensor:
    """The values of a parameter, read from disk if the model is offloaded, and dequantized if it is quantized.

    Args:
        model: The model.
        name: The parameter's name, as in `named_parameters`.

    Returns:
        The values. Those of an offloaded parameter take memory only as long as the caller keeps them.
    """
    parameter = model.get_parameter(name)
    if not parameter.is_meta:
        return float_values(model.get_submodule(name.rpartition(".")[0]), parameter)
    weight: torch.Tensor = load_offloaded_parameter(model, name)
    return weight


@contextmanager
def in_memory(module: nn.Module) -> Iterator[None]:
    """Keep the weights of a module and of its submodules in memory inside the `with` block.

    A module that runs several times then reads its weights once. Nothing is done if they are in memory anyway.
    """
    with ExitStack() as read:
        for part in module.modules():
            hook = _hook_of(part)
            if hook is not None and hook.offload:
                read.enter_context(_with_weights(part, hook, {name: hook.weights_map[name] for name in _on_disk(part)}))
        yield


@contextmanager
def only_rows(module: nn.Module, start: int, stop: int) -> Iterator[None]:
    """Let a linear module have only some of its outputs inside the `with` block: some rows of its weight and its bias.

    Of weights on disk, only these rows are read.

    Args:
        module: A module whose parameters have one row for each output, such as an output head.
        start: The first row.
        stop: The row after the last.
    """
    hook = _hook_of(module)
    if hook is not None and hook.offload:
        rows = {name: _rows_on_disk(hook, name, slice(start, stop)) for name in _on_disk(module)}
        with _with_weights(module, hook, rows):
            yield
        return
    whole = dict(module.named_parameters(recurse=False))
    try:
        for name, parameter in whole.items():
            module._parameters[name] = nn.Parameter(parameter[start:stop], requires_grad=False)
        yield
    finally:
        module._parameters.update(whole)


@contextmanager
def changing(module: nn.Module, names: Sequence[str]) -> Iterator[None]:
    """Read weights inside the `with` block, so that they can be changed, and then write them to disk.

    They are written to the model's folder on disk, not over the checkpoint. Nothing is done if they are in memory.

    Args:
        module: The module, which is not in a block of `in_memory`.
        names: The names of the module's own parameters that change.
    """
    hook = _hook_of(module)
    if hook is None:
        yield
        return
    if not hook.offload:
        raise ValueError("changing: the module is in memory for reading, so a change would be lost")
    values = {name: hook.weights_map[name].clone() for name in names}
    with _with_weights(module, hook, values):
        yield
        for name in values:
            _write(hook.weights_map, name, module.get_parameter(name))


@contextmanager
def changing_whole(module: nn.Module) -> Iterator[None]:
    """Read all weights of a module and of its submodules inside the `with` block, and then write them (`changing`)."""
    with ExitStack() as read:
        for part in module.modules():
            if names := _on_disk(part):
                read.enter_context(changing(part, names))
        yield


def copy_sharing_disk(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of a model that shares its weights on disk. A change of one of the two is not seen by the other.

    Args:
        model: The model. If its weights are in memory, they are copied.

    Returns:
        The copy. Weights of it that change are in a folder of its own, which is deleted with it.
    """
    shared = {}
    for weights in weights_on_disk(model):
        own = copy.copy(weights)
        own.index = {name: dict(place) for name, place in weights.index.items()}
        own.save_folder = mkdtemp(dir=weights.save_folder)
        weakref.finalize(own, rmtree, own.save_folder, ignore_errors=True)
        shared[id(weights)] = own
    return copy.deepcopy(model, shared)


def leave_on_disk(model: PreTrainedModel, layer: nn.Module) -> None:
    """Write a new layer of an offloaded model to disk, and let it read its weights as the others do.

    Args:
        model: The model. Nothing is done if its weights are in memory.
        layer: The layer, with its weights in memory. Nothing is done if they are on disk.
    """
    if not is_offloaded(model):
        return
    [weights], device = weights_on_disk(model), device_of(model)
    new = f"new{len(weights.index)}"
    for path, part in layer.named_modules():
        own = [name for name, parameter in part.named_parameters(recurse=False) if not parameter.is_meta]
        own_weights = PrefixedDataset(weights, f"{new}.{path}." if path else f"{new}.")
        for name in own:
            _write(own_weights, name, part.get_parameter(name))
        if own:
            add_hook_to_module(part, AlignDevicesHook(device, offload=True, weights_map=own_weights))


def forget_disk(module: nn.Module) -> None:
    """Stop reading weights from disk, in place, because all of the module's weights are in memory now."""
    hooked = [part for part in module.modules() if hasattr(part, "_hf_hook")]
    for part in hooked:
        if (hook := _hook_of(part)) is not None:
            hook.offload = False  # so that it puts nothing back
    remove_hook_from_module(module, recurse=True)
    for part in hooked:  # accelerate leaves a reference cycle, which would hold the weights until they are collected
        del part.__dict__["forward"]


def copy_in_memory(module: nn.Module, shared: Iterable[object] = ()) -> nn.Module:
    """A copy of a module with its weights in memory, also if those of the module are on disk.

    Args:
        module: The module; it is unchanged.
        shared: Objects that the copy shares with the module.
    """
    with in_memory(module):
        copied = copy.deepcopy(module, {id(each): each for each in (*shared, *weights_on_disk(module))})
    forget_disk(copied)
    return copied


def copy_by_layers(
    model: PreTrainedModel,
    of_layer: Callable[[nn.Module], nn.Module],
    of_value: Callable[[torch.Tensor], torch.Tensor],
) -> PreTrainedModel:
    """A copy of a model in memory that is made layer by layer, so that the whole model is never in memory besides it.

    Args:
        model: The model, in memory or with its weights on disk; it is unchanged.
        of_layer: Makes a decoder layer of the copy from a whole one, which it may change.
        of_value: Makes the value of a parameter outside the layers from the model's.
    """
    layers = list(decoder_layers(model, architecture_of(model.config)))
    inside = {id(each) for layer in layers for each in layer.parameters()}
    outside = [(name, each) for name, each in model.named_parameters() if id(each) not in inside]
    shared = [*weights_on_disk(model), *(module for layer in layers for module in layer.modules())]
    copied = copy.deepcopy(model, {id(each): each for each in (*shared, *(each for _, each in outside))})
    own = decoder_layers(copied, architecture_of(model.config))
    for number, layer in enumerate(layers):
        own[number] = of_layer(copy_in_memory(layer))
    for name, _ in outside:
        path, _, last = name.rpartition(".")
        value = of_value(read_parameter(model, name))
        setattr(copied.get_submodule(path), last, nn.Parameter(value, requires_grad=False))
    forget_disk(copied)
    copied.tie_weights()
    return copied


def write_parameter(model: PreTrainedModel, names: Sequence[str], value: torch.Tensor) -> None:
    """Write the new value of a parameter of an offloaded model to disk.

    Args:
        model: The model.
        names: The parameter's name, and those of parameters that are tied to it.
        value: The value, on the CPU.
    """
    path, _, own = names[0].rpartition(".")
    place = _write(_weights_map_of(model.get_submodule(path)), own, value)
    for name in names[1:]:
        path, _, own = name.rpartition(".")
        tied = _weights_map_of(model.get_submodule(path))
        tied.dataset.index[f"{tied.prefix}{own}"] = dict(place)


def _weights_map_of(module: nn.Module) -> PrefixedDataset:
    hook = _hook_of(module)
    assert hook is not None, "the weights of the model are on disk"
    return hook.weights_map


def read_as(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Let an offloaded model read its weights in another type from now on, and cast its stored buffers to it."""
    [weights] = weights_on_disk(model)
    for entry in weights.index.values():
        entry["dtype"] = str(dtype).removeprefix("torch.")
    cast = {each: nn.Parameter(each.to(dtype), requires_grad=False) for each in model.parameters()}  # tied ones once
    for part in model.modules():
        own = dict(part.named_parameters(recurse=False))
        part._parameters.update({name: cast[each] for name, each in own.items()})
        for name, buffer in part.named_buffers(recurse=False):
            if name not in part._non_persistent_buffers_set and buffer.is_floating_point():
                part._buffers[name] = buffer.to(dtype)


def _write(weights: PrefixedDataset, name: str, value: torch.Tensor) -> dict[str, Any]:
    """Write a weight to a new file, which is where it is read from now on. Returns what is known of that place."""
    index, new = weights.dataset.index, f"weight{len(weights.dataset.index)}-{uuid4().hex}"
    offload_weight(value.detach().contiguous(), new, weights.dataset.save_folder, index)
    place: dict[str, Any] = index.pop(new)
    index[f"{weights.prefix}{name}"] = place
    return place


@contextmanager
def _with_weights(module: nn.Module, hook: AlignDevicesHook, values: dict[str, torch.Tensor]) -> Iterator[None]:
    """Give an offloaded module these weights inside the `with` block, in place of those that its hook would read."""
    on_disk = {name: module.get_parameter(name) for name in values}
    try:
        for name, value in values.items():
            read = value.to(hook.execution_device, on_disk[name].dtype)
            module._parameters[name] = nn.Parameter(read, requires_grad=False)
        hook.offload = False
        yield
    finally:
        hook.offload = True
        module._parameters.update(on_disk)


def _hook_of(module: nn.Module) -> AlignDevicesHook | None:
    """The hook that reads the module's own weights from disk; `None` if they are in memory for good."""
    hook = getattr(module, "_hf_hook", None)
    return hook if isinstance(hook, AlignDevicesHook) and isinstance(hook.weights_map, PrefixedDataset) else None


def _on_disk(module: nn.Module) -> list[str]:
    """The names of the module's own parameters that are on disk."""
    return [name for name, parameter in module.named_parameters(recurse=False) if parameter.is_meta]


def _rows_on_disk(hook: AlignDevicesHook, name: str, rows: slice | torch.Tensor) -> torch.Tensor:
    """Some rows of a parameter that a hook reads, in the type in which it is stored."""
    place = hook.weights_map.dataset.index[f"{hook.weights_map.prefix}{name}"]
    with safe_open(place["safetensors_file"], framework="pt") as tensors:
        found: torch.Tensor = tensors.get_slice(place["weight_name"])[rows]
    return found


def read_in_fp32(model: PreTrainedModel) -> None:
    """Let an offloaded model read its weights in fp32 from now on, in whatever type it was loaded."""
    read_as(model, torch.float32)
    with init_empty_weights(include_buffers=False):
        fp32: PreTrainedModel = type(model)._from_config(model.config, dtype=torch.float32)
    # Buffers that are not stored, such as a scale of the embeddings, were computed in the narrower type.
    stored = model.state_dict().keys()
    for name, buffer in fp32.named_buffers():
        if name in stored:
            continue
        path, _, own = name.rpartition(".")
        setattr(model.get_submodule(path), own, buffer.to(model.get_buffer(name).device))


def read_only_used_embeddings(model: PreTrainedModel) -> None:
    """Let the input embeddings of an offloaded model read the rows of the tokens in a batch, and not the whole table.

    A table of 128,000 tokens of width 4096 takes 2 GB in fp32. Nothing is done if the table is in memory.
    """
    table = model.get_input_embeddings()
    hook = _hook_of(table)
    if isinstance(table, nn.Embedding) and hook is not None:
        remove_hook_from_module(table)
        add_hook_to_module(table, _UsedRows(hook))


class _UsedRows(AlignDevicesHook):
    """Gives an embedding the rows of its table that a batch uses, while it runs."""

    def __init__(self, hook: AlignDevicesHook) -> None:
        super().__init__(hook.execution_device, offload=True, weights_map=hook.weights_map)

    def init_hook(self, module: nn.Module) -> nn.Module:
        """Leave the table where it is, on disk."""
        return module

    def pre_forward(self, module: Any, ids: torch.Tensor, **kwargs: Any) -> tuple[tuple[torch.Tensor], dict[str, Any]]:
        """Read the rows, and number the tokens by their rows.

        Args:
            module: The embedding.
            ids: Token ids of any shape.
            kwargs: Passed on.
        """
        used, numbers = ids.cpu().unique(return_inverse=True)
        rows = _rows_on_disk(self, "weight", used).to(self.execution_device, module.weight.dtype)
        self._table, self._padding = module.weight, module.padding_idx
        module.weight, module.padding_idx = nn.Parameter(rows, requires_grad=False), None
        return (numbers.to(self.execution_device),), kwargs

    def post_forward(self, module: Any, output: torch.Tensor) -> torch.Tensor:
        """Put the table on disk back in its place."""
        module.weight, module.padding_idx = self._table, self._padding
        return output

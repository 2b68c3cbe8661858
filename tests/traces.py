"""Traces kept for the whole session, for all its processes: most of the time of a small export is the tracer's.

A trace hangs on a skeleton's modules, shapes, types, settings and buffers alone; its parameters stand for no numbers.
So that of an equal skeleton is the same graph, and is read back instead. What is kept was traced in this very session.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from functools import cache
from pathlib import Path

import onnx
import onnx_ir as ir
import pytest
import torch
from torch.onnx._internal.exporter import _registration
from transformers import PreTrainedModel

Trace = Callable[[PreTrainedModel], ir.Model]
_PLAIN = (bool, int, float, str, torch.dtype, type(None))
_PATHS = ("_name_or_path", "name_or_path")  # where a model was read from changes nothing in it
_NO_VALUE = "weight without a value"


def keeping(trace: Trace, folder: Path) -> Trace:
    """`trace`, asked once for each skeleton."""

    def traced(model: PreTrainedModel) -> ir.Model:
        file = folder / f"{_key(model)}.onnx"
        if not file.is_file():
            graph = trace(model)
            _mark_weights(graph)
            partial = file.with_suffix(f".{os.getpid()}")
            partial.write_bytes(ir.to_proto(graph).SerializeToString())
            partial.rename(file)
        model.config.use_cache = True  # as the tracer leaves it
        graph = ir.from_proto(onnx.load_from_string(file.read_bytes()))
        _unmark_weights(graph)
        return graph

    return traced


def read_operators_once(patch: pytest.MonkeyPatch) -> None:
    """Let the tracer parse its library of operators once a process, which it does anew for each trace otherwise."""
    library = _registration.onnxscript_apis
    patch.setattr(library, "get_torchlib_ops", cache(library.get_torchlib_ops))


def _mark_weights(graph: ir.Model) -> None:
    """Make inputs of the weights, which have no values to be written with."""
    for value in [each for each in graph.graph.initializers.values() if each.const_value is None]:
        del graph.graph.initializers[str(value.name)]
        value.metadata_props[_NO_VALUE] = "yes"
        graph.graph.inputs.append(value)


def _unmark_weights(graph: ir.Model) -> None:
    for value in [each for each in graph.graph.inputs if _NO_VALUE in each.metadata_props]:
        del value.metadata_props[_NO_VALUE]
        graph.graph.inputs.remove(value)
        graph.graph.initializers[str(value.name)] = value


def _key(model: PreTrainedModel) -> str:
    fields = {name: value for name, value in model.config.to_dict().items() if name not in _PATHS}
    digest = hashlib.sha256(json.dumps(fields, sort_keys=True, default=repr).encode())
    for name, module in model.named_modules():
        settings = sorted((key, repr(value)) for key, value in vars(module).items() if _is_setting(key, value))
        shapes = [(key, tuple(each.shape), each.dtype) for key, each in module.named_parameters(recurse=False)]
        digest.update(repr((name, type(module), settings, shapes)).encode())
        for key, buffer in module.named_buffers(recurse=False):
            digest.update(repr((key, buffer.dtype, tuple(buffer.shape))).encode())
            digest.update(buffer.reshape(-1).contiguous().view(torch.uint8).numpy().tobytes())
    # One parameter in two places is one weight of the graph.
    first: dict[int, str] = {}
    names = [(name, first.setdefault(id(each), name)) for name, each in model.named_parameters(remove_duplicate=False)]
    digest.update(repr(names).encode())
    return digest.hexdigest()


def _is_setting(name: str, value: object) -> bool:
    return isinstance(value, _PLAIN) and name not in _PATHS

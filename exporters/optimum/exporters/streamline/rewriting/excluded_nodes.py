"""Which products of a graph are left as they are: by layer, or by the name of their module."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import onnx_ir as ir
import torch
from transformers import PretrainedConfig

from optimum.streamline.models.bare_layers import place_bare_layers
from optimum.streamline.models.linear_modules import linear_modules_of, meta_model
from optimum.streamline.models.module_patterns import matches_any, select_modules
from optimum.streamline.models.quantization_config import float_config


def module_of(node: ir.Node) -> str:
    """The module a node of a named graph came from, `model.layers.3.mlp.up_proj`."""
    return str(node.name).rpartition("/")[0]


def check_excluded(config: PretrainedConfig, patterns: Sequence[str]) -> None:
    """Refuse what chooses no product of a model of this config, before a graph is made of it.

    Raises:
        StreamlineError: naming the pattern.
    """
    if patterns:
        with torch.device("meta"):
            model = place_bare_layers(meta_model(float_config(config)))
        select_modules(linear_modules_of(model), patterns)


def excluded(nodes: Iterable[ir.Node], patterns: Sequence[str]) -> set[ir.Node]:
    """The nodes that these patterns name: a layer's number, or a module's name with `*` for any part of it."""
    return {node for node in nodes if matches_any(module_of(node), patterns)}

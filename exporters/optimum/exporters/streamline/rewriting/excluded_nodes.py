"""Find the nodes that a user excludes from quantization, by layer index or by module name."""

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
    """The name of the module that a node came from, such as `model.layers.3.mlp.up_proj`.

    Args:
        node: A node of a graph with public names (`public_names.py`).
    """
    return str(node.name).rpartition("/")[0]


def check_excluded(config: PretrainedConfig, patterns: Sequence[str]) -> None:
    """Refuse a pattern that matches no linear module of the model, before the model is loaded or traced.

    Args:
        config: The model's config.
        patterns: Layer indices, or module names in which `*` stands for any text.

    Raises:
        StreamlineError: a pattern matches no linear module; names the pattern.
    """
    if patterns:
        with torch.device("meta"):
            model = place_bare_layers(meta_model(float_config(config)))
        select_modules(linear_modules_of(model), patterns)


def excluded(nodes: Iterable[ir.Node], patterns: Sequence[str]) -> set[ir.Node]:
    """The nodes whose module matches a pattern: a layer index, or a module name in which `*` stands for any text."""
    return {node for node in nodes if matches_any(module_of(node), patterns)}

"""Write `genai_config.json`, which onnxruntime-genai reads to run the graph, as does lm-eval's model `onnxruntime`.

onnxruntime-genai itself writes this file only for graphs of its own model builder.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import onnx_ir as ir
from transformers import PreTrainedModel

from optimum.exporters.streamline.graph_files import GRAPH_FILE
from optimum.exporters.streamline.rewriting.public_names import TOKEN_INPUTS, cache_inputs

CONFIG_FILE = "genai_config.json"


def write_genai_config(model: PreTrainedModel, graph: ir.Model, folder: Path) -> None:
    """Write `genai_config.json` for a graph.

    Its number of layers is the number of cache entries, because GenAI makes one cache entry per layer. A layer without
    attention has none.

    Args:
        model: The model that the graph was traced from.
        graph: The graph, with public names.
        folder: The folder to write into.
    """
    config = {"model": _model_section(model, graph), "search": _search_section(model)}
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=4) + "\n")


def _model_section(model: PreTrainedModel, graph: ir.Model) -> dict[str, Any]:
    eos = _token_id(model, "eos_token_id")
    pad = _token_id(model, "pad_token_id")
    section = {
        # GenAI's generic type: it takes the inputs and outputs from the names below.
        "type": "decoder",
        "vocab_size": model.config.vocab_size,
        "context_length": model.config.max_position_embeddings,
        "bos_token_id": _token_id(model, "bos_token_id"),
        "eos_token_id": eos,
        "pad_token_id": pad if pad is not None else (eos[0] if isinstance(eos, list) else eos),
        "decoder": _decoder_section(model, graph),
    }
    return {key: value for key, value in section.items() if value is not None}


def _decoder_section(model: PreTrainedModel, graph: ir.Model) -> dict[str, Any]:
    cache = cache_inputs(graph)
    assert cache[0].shape is not None
    _, heads, _, head_size = cache[0].shape
    return {
        "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
        "filename": GRAPH_FILE,
        "head_size": head_size,
        "hidden_size": model.config.hidden_size,
        "num_attention_heads": model.config.num_attention_heads,
        "num_key_value_heads": heads,
        "num_hidden_layers": len(cache) // 2,
        "inputs": {
            **{name: name for name in TOKEN_INPUTS},
            "past_key_names": "past_key_values.%d.key",
            "past_value_names": "past_key_values.%d.value",
        },
        "outputs": {
            "logits": "logits",
            "present_key_names": "present.%d.key",
            "present_value_names": "present.%d.value",
        },
    }


def _search_section(model: PreTrainedModel) -> dict[str, Any]:
    return {
        "do_sample": False,
        "max_length": model.config.max_position_embeddings,
        # The graph returns a longer cache at each call; it does not write into a buffer of the final length.
        "past_present_share_buffer": False,
    }


def _token_id(model: PreTrainedModel, name: str) -> Any:
    for config in (model.generation_config, model.config):
        value = getattr(config, name, None)
        if value is not None:
            return value
    return None

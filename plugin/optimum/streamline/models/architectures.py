"""The inside of models: where the decoder layers are, what writes into the residual stream, what counts layers.

The only file that knows. An architecture is a row of `ARCHITECTURES`, not a class; every row goes through
the conformance suite (`tests/streamline/models/test_architectures.py`). It knows nothing of scores, methods or files.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from optimum.streamline.errors import StreamlineError

Sublayer = Literal["attention", "mlp"]


@dataclass(frozen=True)
class Architecture:
    """Dotted paths into a causal language model of one architecture.

    Args:
        layers: The list of decoder layers, from the model.
        attention: The attention, from a layer.
        attention_out: The projection that writes attention into the residual stream, from a layer.
        mlp: The modules that are the MLP, first to last, from a layer.
        mlp_out: The projection, or the parameter of all experts' projections, that writes the MLP into the
            residual stream, from a layer; more than one where layers differ.
        norm_after: Whether a norm stands between what a sublayer's projection gives and the residual stream.
        experts: Whether MLPs are mixtures of experts.
        attention_norm: The norm before the attention, from a layer.
        attention_in: The projections that read that norm, from a layer; the rows of each go head by head.
        head_norms: The norms of queries and of keys, from a layer, each with one gain for all heads.
        mlp_norm: The norm before the MLP, from a layer.
        mlp_in: The projections that read that norm, from a layer.
        stacked: Those of these projections that hold several, one whole after another: queries, keys and values, or
            gates and what they gate.
        gain_offset: What a norm adds to its weight to get its gain.
        bias_field: The config field without which norms have biases but the projections that read them have none.
    """

    layers: str = "model.layers"
    attention: str = "self_attn"
    attention_out: str = "self_attn.o_proj"
    mlp: tuple[str, ...] = ("mlp",)
    mlp_out: tuple[str, ...] = ("mlp.down_proj",)
    norm_after: bool = False
    experts: bool = False
    attention_norm: str = "input_layernorm"
    attention_in: tuple[str, ...] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    head_norms: tuple[str, ...] = ()
    mlp_norm: str = "post_attention_layernorm"
    mlp_in: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")
    stacked: tuple[str, ...] = ()
    gain_offset: float = 0.0
    bias_field: str = ""


ARCHITECTURES: dict[str, Architecture] = {
    "gemma": Architecture(gain_offset=1.0),
    "gemma2": Architecture(norm_after=True),
    "gpt2": Architecture(
        layers="transformer.h",
        attention="attn",
        attention_out="attn.c_proj",
        mlp_out=("mlp.c_proj",),
        attention_norm="ln_1",
        attention_in=("attn.c_attn",),
        mlp_norm="ln_2",
        mlp_in=("mlp.c_fc",),
        stacked=("attn.c_attn",),
    ),
    "gpt_neox": Architecture(
        layers="gpt_neox.layers",
        attention="attention",
        attention_out="attention.dense",
        mlp_out=("mlp.dense_4h_to_h",),
        attention_in=("attention.query_key_value",),
        mlp_in=("mlp.dense_h_to_4h",),
        bias_field="attention_bias",
    ),
    "granite": Architecture(),
    "llama": Architecture(),
    "mistral": Architecture(),
    "mixtral": Architecture(mlp_out=("mlp.experts.down_proj",), experts=True),
    "olmo2": Architecture(norm_after=True),
    "opt": Architecture(
        layers="model.decoder.layers",
        attention_out="self_attn.out_proj",
        mlp=("fc1", "fc2"),
        mlp_out=("fc2",),
        attention_norm="self_attn_layer_norm",
        mlp_norm="final_layer_norm",
        mlp_in=("fc1",),
        bias_field="enable_bias",
    ),
    "phi3": Architecture(
        attention_in=("self_attn.qkv_proj",),
        mlp_in=("mlp.gate_up_proj",),
        stacked=("self_attn.qkv_proj", "mlp.gate_up_proj"),
    ),
    "qwen2": Architecture(),
    "qwen3": Architecture(head_norms=("self_attn.q_norm", "self_attn.k_norm")),
    "qwen3_moe": Architecture(mlp_out=("mlp.down_proj", "mlp.experts.down_proj"), experts=True),
    "smollm3": Architecture(),
    "starcoder2": Architecture(mlp_out=("mlp.c_proj",), mlp_in=("mlp.c_fc",), bias_field="use_bias"),
}

# Config fields with one entry a layer.
PER_LAYER_LISTS = ("layer_types", "mlp_layer_types", "no_rope_layers")


# Config fields that make a layer's function depend on its number, and the only value under which it does not.
POSITION_DEPENDENT = {
    "scale_attn_by_inverse_layer_idx": False,
    "decoder_sparse_step": 1,
    "num_kv_shared_layers": 0,
}


def architecture_of(config: PreTrainedConfig) -> Architecture:
    """The row of `config`'s architecture.

    Raises:
        StreamlineError: it has none, or its layers depend on their numbers.
    """
    if config.model_type not in ARCHITECTURES:
        known = ", ".join(sorted(ARCHITECTURES))
        raise StreamlineError(f"architecture {config.model_type!r} cannot be handled; those that can: {known}")
    for field, allowed in POSITION_DEPENDENT.items():
        value = getattr(config, field, allowed)
        if value is not None and value != allowed:
            raise StreamlineError(f"config.{field} is {value!r}: layers depend on their number; it must be {allowed!r}")
    return ARCHITECTURES[config.model_type]


def has_norms_after(config: PreTrainedConfig) -> bool:
    """Whether a norm stands behind the projections, before the residual stream: nothing there is linear in them."""
    return architecture_of(config).norm_after or getattr(config, "do_layer_norm_before", True) is False


def layer_kinds(config: PreTrainedConfig) -> tuple[tuple[Any, ...], ...]:
    """For each layer what the config says of it alone, such as how far it attends: equal for layers of one kind."""
    lists = [getattr(config, field, None) for field in PER_LAYER_LISTS]
    full = [values for values in lists if isinstance(values, list) and len(values) == config.num_hidden_layers]
    return tuple(tuple(values[layer] for values in full) for layer in range(config.num_hidden_layers))


def key_value_heads(config: PreTrainedConfig) -> int:
    """How many heads have keys and values of their own; each serves equally many query heads."""
    heads: int = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return heads


def head_size(config: PreTrainedConfig) -> int:
    """The width of a head's queries, keys and values."""
    size: int = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return size


def submodule(module: nn.Module, path: str) -> nn.Module:
    """The submodule at a dotted path."""
    return module.get_submodule(path)


def decoder_layers(model: PreTrainedModel, architecture: Architecture) -> nn.ModuleList:
    """The model's decoder layers, first to last."""
    layers = submodule(model, architecture.layers)
    assert isinstance(layers, nn.ModuleList)
    return layers


def residual_scale(config: PreTrainedConfig) -> float:
    """What a sublayer's output is multiplied by before it is added to the residual stream."""
    return float(getattr(config, "residual_multiplier", 1.0))


def layer_output(output: Any) -> Any:
    """The hidden states `[batch, length, width]` among what a decoder layer returns."""
    return output[0] if isinstance(output, tuple) else output


def active_share(config: PreTrainedConfig) -> float:
    """The share of a model's experts that one token goes through; 1 where there are none."""
    experts = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None)
    return config.num_experts_per_tok / experts if experts else 1.0

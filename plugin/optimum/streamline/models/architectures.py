"""Where each supported architecture keeps its decoder layers, norms and projections.

To support an architecture, add a row to `ARCHITECTURES`. The tests in `tests/streamline/models/test_architectures.py`
check every row.
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
    """Dotted module paths in the causal language models of one architecture.

    The path `layers` starts at the model. All other paths start at a decoder layer.

    Args:
        layers: The list of decoder layers.
        attention: The attention module.
        attention_out: The projection that writes the attention output into the residual stream.
        mlp: The modules that make up the MLP, first to last.
        mlp_out: The projection that writes the MLP output into the residual stream; for a mixture of experts, the
            parameter that holds this projection for all experts. More than one path where layers differ.
        norm_after: Whether a norm follows a sublayer's output projection, before the residual stream.
        experts: Whether MLPs can be mixtures of experts.
        attention_norm: The norm before the attention.
        attention_in: The projections that read `attention_norm`. The rows of each are ordered by head.
        head_norms: The norms of queries and of keys. All heads share the weight of each.
        mlp_norm: The norm before the MLP.
        mlp_norms: All norms of the MLP, where they are not `mlp_norm` alone.
        mlp_in: The projections that read `mlp_norm`.
        stacked: Those input projections that hold several projections, one below the other: queries, keys and values,
            or gate and up projection.
        gain_offset: What a norm adds to its weight before it multiplies by it; 1 for Gemma.
        bias_field: The config field that, if false, removes the biases of the projections but not the biases of the
            norms. Empty if there is none.
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
    mlp_norms: tuple[str, ...] = ()
    mlp_in: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")
    stacked: tuple[str, ...] = ()
    gain_offset: float = 0.0
    bias_field: str = ""

    @property
    def mlp_part(self) -> tuple[str, ...]:
        """The modules of the MLP with its norms. All other modules of a layer belong to its attention."""
        return (*(self.mlp_norms or (self.mlp_norm,)), *self.mlp)


ARCHITECTURES: dict[str, Architecture] = {
    "arcee": Architecture(mlp_in=("mlp.up_proj",)),
    "ernie4_5": Architecture(),
    "exaone4": Architecture(norm_after=True, mlp_norms=("post_feedforward_layernorm",)),
    "gemma": Architecture(gain_offset=1.0),
    "gemma2": Architecture(norm_after=True, mlp_norms=("pre_feedforward_layernorm", "post_feedforward_layernorm")),
    "gemma3_text": Architecture(norm_after=True, mlp_norms=("pre_feedforward_layernorm", "post_feedforward_layernorm")),
    "glm": Architecture(mlp_in=("mlp.gate_up_proj",), stacked=("mlp.gate_up_proj",)),
    "glm4": Architecture(norm_after=True, mlp_norms=("post_attention_layernorm", "post_mlp_layernorm")),
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
    "helium": Architecture(),
    "llama": Architecture(),
    "ministral3": Architecture(),
    "mistral": Architecture(),
    "mixtral": Architecture(mlp_out=("mlp.experts.down_proj",), experts=True),
    "olmo2": Architecture(norm_after=True, mlp_norms=("post_feedforward_layernorm",)),
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
    "seed_oss": Architecture(),
    "smollm3": Architecture(),
    "starcoder2": Architecture(mlp_out=("mlp.c_proj",), mlp_in=("mlp.c_fc",), bias_field="use_bias"),
}

# Config fields that hold a list with one entry per layer.
PER_LAYER_LISTS = ("layer_types", "mlp_layer_types", "no_rope_layers")


# Config fields that make a layer compute something else at another index, and the only value that does not. Removing
# layers changes the indices, so any other value is refused.
POSITION_DEPENDENT = {
    "scale_attn_by_inverse_layer_idx": False,
    "decoder_sparse_step": 1,
    "num_kv_shared_layers": 0,
}


def architecture_of(config: PreTrainedConfig) -> Architecture:
    """The row of `ARCHITECTURES` for a config.

    Raises:
        StreamlineError: the model type has no row, the config makes layers depend on their index, or tokens see those
            after them.
    """
    if config.model_type not in ARCHITECTURES:
        known = ", ".join(sorted(ARCHITECTURES))
        raise StreamlineError(f"architecture {config.model_type!r}: is not supported; supported are {known}")
    if getattr(config, "use_bidirectional_attention", None):
        raise StreamlineError(
            f"config.use_bidirectional_attention {config.use_bidirectional_attention!r}: each token sees those after "
            "it, so the loss says nothing of a model for text; it must be False"
        )
    for field, allowed in POSITION_DEPENDENT.items():
        value = getattr(config, field, allowed)
        if value is not None and value != allowed:
            raise StreamlineError(
                f"config.{field} {value!r}: makes layers depend on their index; it must be {allowed!r}"
            )
    return ARCHITECTURES[config.model_type]


def has_norms_after(config: PreTrainedConfig) -> bool:
    """Whether a norm stands between a sublayer's output projection and the residual stream.

    If so, the residual stream is not a linear function of that projection's weight.
    """
    return architecture_of(config).norm_after or getattr(config, "do_layer_norm_before", True) is False


def can_pack(config: PreTrainedConfig) -> bool:
    """Whether an attention and the MLP of a later layer can make one layer.

    They cannot where both read the same hidden state (parallel residual connections), nor where a norm of each changes
    the residual stream itself, which a removed sublayer would take with it.
    """
    return not getattr(config, "use_parallel_residual", False) and getattr(config, "do_layer_norm_before", True)


def layer_kinds(config: PreTrainedConfig) -> tuple[tuple[Any, ...], ...]:
    """What the config says of each layer individually, such as its attention type.

    Returns:
        One tuple per layer. Layers of one kind have equal tuples.
    """
    lists = [getattr(config, field, None) for field in PER_LAYER_LISTS]
    full = [values for values in lists if isinstance(values, list) and len(values) == config.num_hidden_layers]
    return tuple(tuple(values[layer] for values in full) for layer in range(config.num_hidden_layers))


def key_value_heads(config: PreTrainedConfig) -> int:
    """The number of key-value heads. Each serves the same number of query heads."""
    heads: int = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return heads


def head_size(config: PreTrainedConfig) -> int:
    """The width of one head's queries, keys and values."""
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
    """The factor that multiplies a sublayer's output before it is added to the residual stream; 1 for most models."""
    return float(getattr(config, "residual_multiplier", 1.0))


def layer_output(output: Any) -> Any:
    """The hidden states in the return value of a decoder layer.

    Args:
        output: What the layer returned: the hidden states, or a tuple that begins with them.

    Returns:
        The hidden states `[batch, length, width]`.
    """
    return output[0] if isinstance(output, tuple) else output


def active_share(config: PreTrainedConfig) -> float:
    """The share of a model's experts that process one token, from 0 to 1; 1 for a model without experts."""
    experts = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None)
    return config.num_experts_per_tok / experts if experts else 1.0

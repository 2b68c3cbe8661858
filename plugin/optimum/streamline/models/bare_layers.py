"""Bare layers: a feed-forward network alone in place of a decoder layer.

A bare layer has no norm, no residual connection, no attention and no cache entry. It is the FFN or SwiGLU replacement
of LLM-Streamline (arXiv 2403.19135). The config names the bare layers by index: `bare_layers = {"5": "ffn"}`. The host
is the ordinary architecture, such as Llama, in which bare layers replace some decoder layers.

Stock transformers has no bare layers. If it loaded such a checkpoint as the host's, it would create ordinary layers
with random weights in their place. Two things prevent that: `config.json` has a model type that it does not know, and
the weight files have names that it does not look for. The field `host_model_type` keeps the original model type.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedConfig, PreTrainedModel

from optimum.streamline.errors import StreamlineError

from .architectures import architecture_of, decoder_layers

BARE_VARIANT = "streamline"
"""The variant in the names of the weight files, such as `model.streamline.safetensors`, as in `save_pretrained`."""


BareKind = Literal["ffn", "swiglu"]

NEEDS_LOAD = "has a bare feed-forward network for a layer: needs optimum.streamline.load, stock transformers refuses it"
MODEL_TYPE = "streamline"
_ARCHITECTURE = "StreamlineForCausalLM"
# Fields of config.json that are replaced. The host's values are kept under `host_` and the field's name.
_RENAMED = {"model_type": MODEL_TYPE, "architectures": [_ARCHITECTURE]}
# The config fields in which architectures give the inner width of their MLPs.
_INNER_WIDTHS = ("intermediate_size", "ffn_dim", "n_inner")


class BareFFN(nn.Module):
    """A bare layer with one hidden layer: y = W_down relu(W_up x + b_up) + b_down (arXiv 2403.19135).

    Args:
        width: Width d of the hidden states. The inner width is 4 d.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up_proj = nn.Linear(width, 4 * width)
        self.down_proj = nn.Linear(4 * width, width)

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Compute the next hidden states.

        Args:
            hidden_states: `[batch, length, width]`.
            args: Ignored, as are the keyword arguments: a decoder layer also gets masks, positions and the cache.

        Returns:
            The next hidden states, `[batch, length, width]`.
        """
        out: torch.Tensor = self.down_proj(nn.functional.relu(self.up_proj(hidden_states)))
        return out


class BareSwiGLU(nn.Module):
    """A bare layer with a gate: y = W_down (silu(W_gate x) * W_up x) (arXiv 2403.19135).

    Args:
        width: Width of the hidden states.
        inner: Inner width, as in the host's MLPs.
    """

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, inner, bias=False)
        self.up_proj = nn.Linear(width, inner, bias=False)
        self.down_proj = nn.Linear(inner, width, bias=False)

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Compute the next hidden states.

        Args:
            hidden_states: `[batch, length, width]`.
            args: Ignored, as are the keyword arguments: a decoder layer also gets masks, positions and the cache.

        Returns:
            The next hidden states, `[batch, length, width]`.
        """
        gated = nn.functional.silu(self.gate_proj(hidden_states)) * self.up_proj(hidden_states)
        out: torch.Tensor = self.down_proj(gated)
        return out


def bare_layer(kind: BareKind, config: PreTrainedConfig) -> nn.Module:
    """Make a bare layer for a model with this config, with torch's default random weights.

    Args:
        kind: `ffn` or `swiglu`.
        config: The host's config, which gives the widths.
    """
    if kind == "ffn":
        return BareFFN(config.hidden_size)
    named = (getattr(config, field, None) for field in _INNER_WIDTHS)
    return BareSwiGLU(config.hidden_size, next((width for width in named if width), 4 * config.hidden_size))


def bare_layers(config: PreTrainedConfig) -> dict[int, BareKind]:
    """The bare layers that a config names, as kinds by layer index.

    Raises:
        StreamlineError: the config names an unknown kind, or an index that the model does not have.
    """
    named = {int(index): kind for index, kind in (getattr(config, "bare_layers", None) or {}).items()}
    for index, kind in named.items():
        if kind not in ("ffn", "swiglu") or not 0 <= index < config.num_hidden_layers:
            raise StreamlineError(
                f"config.json: bare_layers[{index}] is {kind!r}: must be 'ffn' or 'swiglu', of layer 0 to "
                f"{config.num_hidden_layers - 1}"
            )
    return named


def mark_bare(config: PreTrainedConfig, kinds: dict[int, BareKind]) -> None:
    """Name bare layers in `config`, in place.

    Args:
        config: The config to change.
        kinds: The kind of each bare layer, by layer index. If empty, the config stays as it is.
    """
    if kinds:
        config.bare_layers = {str(index): kind for index, kind in kinds.items()}


def refuse_bare(config: PreTrainedConfig) -> None:
    """Refuse a model with bare layers: pruning methods need an attention and an MLP in every layer.

    Raises:
        StreamlineError: the config names a bare layer.
    """
    if bare_layers(config):
        raise StreamlineError(
            "model: has bare layers (a feed-forward network alone), which cannot be pruned; prune its original"
        )


def place_bare_layers(model: PreTrainedModel) -> PreTrainedModel:
    """Put a new, random bare layer at each index that the model's config names, in place.

    Returns:
        The same model.
    """
    layers = decoder_layers(model, architecture_of(model.config))
    for index, kind in bare_layers(model.config).items():
        layers[index] = bare_layer(kind, model.config)
    return model


def is_bare_checkpoint(fields: dict[str, Any]) -> bool:
    """Whether these fields of a `config.json` belong to a checkpoint with bare layers."""
    return fields.get("model_type") == MODEL_TYPE


def host_config(fields: dict[str, Any]) -> PreTrainedConfig:
    """Restore the host's config from the `config.json` of a checkpoint with bare layers.

    Args:
        fields: The fields of that `config.json`.

    Returns:
        A config of the host's class. It names the bare layers.
    """
    own = {key: value for key, value in fields.items() if key not in _RENAMED and not key.startswith("host_")}
    own |= {key: fields[f"host_{key}"] for key in _RENAMED}
    return CONFIG_MAPPING[own["model_type"]].from_dict(own)


def load_bare(model: str, config: PreTrainedConfig, **options: Any) -> Any:
    """Load a checkpoint with bare layers, as `from_pretrained` does for other checkpoints.

    Args:
        model: A checkpoint's folder or Hub id.
        config: The checkpoint's `host_config`.
        options: Arguments of `from_pretrained`, except `trust_remote_code`.

    Returns:
        The return value of `from_pretrained`. The model's `save_pretrained` writes a checkpoint with bare layers again.
    """
    return _with_bare_layers(MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]).from_pretrained(
        model, config=config, variant=BARE_VARIANT, **options
    )


def save_bare(model: PreTrainedModel, folder: Path, **options: Any) -> None:
    """Write a model with bare layers, in the form that stock transformers refuses.

    Args:
        model: The model.
        folder: The folder to write.
        options: Arguments of `save_pretrained`.
    """
    PreTrainedModel.save_pretrained(model, folder, **{**options, "variant": BARE_VARIANT})
    file = folder / "config.json"
    fields = json.loads(file.read_text(encoding="utf-8"))
    fields |= {f"host_{key}": fields.get(key) for key in _RENAMED} | _RENAMED
    file.write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _with_bare_layers(host: Any) -> type[PreTrainedModel]:
    """A subclass of a host model class that creates and saves bare layers."""

    def build(self: PreTrainedModel, config: PreTrainedConfig) -> None:
        host.__init__(self, config)
        place_bare_layers(self)

    def save(self: PreTrainedModel, save_directory: str | Path, **options: Any) -> None:
        save_bare(self, Path(save_directory), **options)

    # The subclass takes the host's name and module: transformers derives from them the loss function, the field
    # `architectures`, and the weight conversions that apply.
    namespace = {"__init__": build, "save_pretrained": save, "__module__": host.__module__}
    return type(host.__name__, (host,), namespace)

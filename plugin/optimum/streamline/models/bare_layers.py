"""Layers that are one bare feed-forward network: no norm, no residual connection, no attention, no cache entry.

LLM-Streamline's FFN and SwiGLU replacements (arXiv 2403.19135). A config names them, `bare_layers = {"5": "ffn"}`.
Stock transformers has no such layer, and given the host's own form it would fill in one with random weights. So on
disk such a model has a form of its own that stock refuses twice over: `config.json` has a model type it does not know,
with the host's beside it, and the weights have a name that it does not look for. Knows no training and no plan.
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
"""What stands in the weights' file names of a model with bare layers, which stock transformers must not find."""


BareKind = Literal["ffn", "swiglu"]

NEEDS_LOAD = "has a bare feed-forward network for a layer: needs optimum.streamline.load, stock transformers refuses it"
MODEL_TYPE = "streamline"
_ARCHITECTURE = "StreamlineForCausalLM"
# What config.json says otherwise than the host's would; the host's own stands there under `host_` and the name.
_RENAMED = {"model_type": MODEL_TYPE, "architectures": [_ARCHITECTURE]}
# Where a config says how wide the MLPs of its own layers are.
_INNER_WIDTHS = ("intermediate_size", "ffn_dim", "n_inner")


class BareFFN(nn.Module):
    """y = W_down relu(W_up x + b_up) + b_down, from width d over 4 d to d, in a decoder layer's place."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up_proj = nn.Linear(width, 4 * width)
        self.down_proj = nn.Linear(4 * width, width)

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The new stream `[batch, length, width]`; what else a decoder layer is given is of no use here."""
        out: torch.Tensor = self.down_proj(nn.functional.relu(self.up_proj(hidden_states)))
        return out


class BareSwiGLU(nn.Module):
    """y = W_down (silu(W_gate x) * W_up x), as wide inside as the host's own MLPs, in a decoder layer's place."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, inner, bias=False)
        self.up_proj = nn.Linear(width, inner, bias=False)
        self.down_proj = nn.Linear(inner, width, bias=False)

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The new stream `[batch, length, width]`; what else a decoder layer is given is of no use here."""
        gated = nn.functional.silu(self.gate_proj(hidden_states)) * self.up_proj(hidden_states)
        out: torch.Tensor = self.down_proj(gated)
        return out


def bare_layer(kind: BareKind, config: PreTrainedConfig) -> nn.Module:
    """A bare layer for a model of this config, with torch's default random weights."""
    if kind == "ffn":
        return BareFFN(config.hidden_size)
    named = (getattr(config, field, None) for field in _INNER_WIDTHS)
    return BareSwiGLU(config.hidden_size, next((width for width in named if width), 4 * config.hidden_size))


def bare_layers(config: PreTrainedConfig) -> dict[int, BareKind]:
    """The bare layers `config` names, by number.

    Raises:
        StreamlineError: it names one that is not known, or a layer that is not there.
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
    """Name these bare layers in `config`, in place."""
    if kinds:
        config.bare_layers = {str(index): kind for index, kind in kinds.items()}


def refuse_bare(config: PreTrainedConfig) -> None:
    """Refuse to change a model that has bare layers: a method looks for an attention and an MLP in every layer.

    Raises:
        StreamlineError: it has some.
    """
    if bare_layers(config):
        raise StreamlineError("model: a bare feed-forward network stands for some of its layers; prune its original")


def place_bare_layers(model: PreTrainedModel) -> PreTrainedModel:
    """Put a fresh bare layer wherever the config of `model` names one, in place; returns `model`."""
    layers = decoder_layers(model, architecture_of(model.config))
    for index, kind in bare_layers(model.config).items():
        layers[index] = bare_layer(kind, model.config)
    return model


def is_bare_checkpoint(fields: dict[str, Any]) -> bool:
    """Whether a `config.json` of these fields is that of a model with bare layers."""
    return fields.get("model_type") == MODEL_TYPE


def host_config(fields: dict[str, Any]) -> PreTrainedConfig:
    """The host's own config, which names the bare layers, from the fields of such a checkpoint's `config.json`."""
    own = {key: value for key, value in fields.items() if key not in _RENAMED and not key.startswith("host_")}
    own |= {key: fields[f"host_{key}"] for key in _RENAMED}
    return CONFIG_MAPPING[own["model_type"]].from_dict(own)


def load_bare(model: str, config: PreTrainedConfig, **options: Any) -> Any:
    """What `from_pretrained` gives for such a checkpoint; the model's `save_pretrained` writes one again.

    Args:
        model: A checkpoint's folder or Hub id.
        config: `host_config` of it.
        options: Those of `from_pretrained`, less `trust_remote_code`.
    """
    return _with_bare_layers(MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]).from_pretrained(
        model, config=config, variant=BARE_VARIANT, **options
    )


def save_bare(model: PreTrainedModel, folder: Path, **options: Any) -> None:
    """`save_pretrained` for a model with bare layers, in the form that stock transformers refuses."""
    PreTrainedModel.save_pretrained(model, folder, **{**options, "variant": BARE_VARIANT})
    file = folder / "config.json"
    fields = json.loads(file.read_text(encoding="utf-8"))
    fields |= {f"host_{key}": fields.get(key) for key in _RENAMED} | _RENAMED
    file.write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _with_bare_layers(host: Any) -> type[PreTrainedModel]:
    def build(self: PreTrainedModel, config: PreTrainedConfig) -> None:
        host.__init__(self, config)
        place_bare_layers(self)

    def save(self: PreTrainedModel, save_directory: str | Path, **options: Any) -> None:
        save_bare(self, Path(save_directory), **options)

    # Under the host's name and module: transformers reads off them the kind of loss, `architectures`, and which
    # renamings of weights are its own.
    own = {"__init__": build, "save_pretrained": save, "__module__": host.__module__}
    return type(host.__name__, (host,), own)

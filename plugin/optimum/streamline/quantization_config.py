"""What a model's config says of its quantization: its name here, and the layers it speaks of by number.

transformers keeps it as `quantization_config`, in each library's own fields. Knows no weights.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedConfig

from .errors import StreamlineError


def quantization_fields(config: PreTrainedConfig) -> dict[str, Any]:
    """The fields of its `quantization_config`; empty for a model that is not quantized."""
    found = getattr(config, "quantization_config", None)
    if found is None:
        return {}
    fields: dict[str, Any] = found if isinstance(found, dict) else found.to_dict()
    return fields


def quantization_name(config: PreTrainedConfig) -> str | None:
    """What a model is quantized by, as `quantizers.QUANTIZERS` calls it, or else by its library's name."""
    fields = quantization_fields(config)
    if not fields:
        return None
    method = str(getattr(fields.get("quant_method"), "value", fields.get("quant_method", "unknown")))
    if method == "bitsandbytes":
        return f"bnb-{fields['bnb_4bit_quant_type']}" if fields.get("load_in_4bit") else "bnb-int8"
    if method == "torchao" and "int4" in str(fields.get("quant_type")).lower():
        return "torchao-int4"
    return method


def refuse_quantized(config: PreTrainedConfig, what: str, instead: str) -> None:
    """Refuse what needs float weights, where they are quantized.

    Args:
        what: What needs them, as `field 'value'`.
        instead: What to do.

    Raises:
        StreamlineError: they are.
    """
    name = quantization_name(config)
    if name is not None:
        raise StreamlineError(f"{what}: needs float weights, and the model's are quantized ({name}); {instead}")


def renumber_quantization(config: PreTrainedConfig, layers: str, origins: Sequence[int]) -> None:
    """Make every module that `quantization_config` names by its layer's number the one it was, in place.

    Args:
        layers: The path of the list of layers.
        origins: For each new layer, the present number of the layer that takes its place.

    Raises:
        StreamlineError: it names layers by number elsewhere than in a list of modules.
    """
    found = getattr(config, "quantization_config", None)
    if found is None:
        return
    fields = found if isinstance(found, dict) else vars(found)
    # Only the number of a layer follows this path, `.` perhaps written as in a regular expression.
    named = re.compile(rf"({re.escape(layers.rpartition('.')[2])}\\*\.)(\d+)(?![\d])")
    for field, value in fields.items():
        if isinstance(value, list) and all(isinstance(each, str) for each in value):
            fields[field] = [new for each in value for new in _renumbered(each, named, origins)]
        elif named.search(str(value)):
            raise StreamlineError(
                f"quantization_config.{field}: names layers by their number, which removing some would make wrong; "
                "prune the float model and quantize then"
            )


def _renumbered(name: str, named: re.Pattern[str], origins: Sequence[int]) -> list[str]:
    match = named.search(name)
    if match is None:
        return [name]
    places = [place for place, origin in enumerate(origins) if origin == int(match[2])]
    return [f"{name[: match.start()]}{match[1]}{place}{name[match.end() :]}" for place in places]

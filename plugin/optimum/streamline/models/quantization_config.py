"""What a model's config says of its quantization: its name here, and the layers it speaks of by number.

transformers keeps it as `quantization_config`, in each library's own fields. Knows no weights.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedConfig
from transformers.quantizers.auto import AutoHfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module

from optimum.streamline.errors import StreamlineError, first_line

from .linear_modules import linear_modules_of, meta_model
from .module_patterns import followed

# Where a library's config names the modules that stay in float, by patterns that `should_convert_module` reads.
_LISTS_OF_PATTERNS = ("llm_int8_skip_modules", "modules_to_not_convert")


def quantization_fields(config: PreTrainedConfig) -> dict[str, Any]:
    """The fields of its `quantization_config`; empty for a model that is not quantized."""
    found = getattr(config, "quantization_config", None)
    if found is None:
        return {}
    if not isinstance(found, dict) and not hasattr(found, "to_dict"):
        raise StreamlineError(f"config.json: quantization_config is {found!r}: must be fields, such as quant_method")
    fields: dict[str, Any] = found if isinstance(found, dict) else found.to_dict()
    return fields


def quantization_name(config: PreTrainedConfig) -> str | None:
    """What a model is quantized by, as `quantizers.QUANTIZERS` calls it, or else by its library's name."""
    fields = quantization_fields(config)
    if not fields:
        return None
    method = str(getattr(fields.get("quant_method"), "value", fields.get("quant_method", "unknown")))
    if method == "bitsandbytes":
        return f"bnb-{fields.get('bnb_4bit_quant_type', 'fp4')}" if fields.get("load_in_4bit") else "bnb-int8"
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


def check_readable(config: PreTrainedConfig, device: str) -> bool:
    """Refuse a quantized model that transformers cannot read here.

    Asks the quantizer that transformers has for it, not a list of names.

    Args:
        device: Where it is to be computed.

    Returns:
        Whether transformers, having read it here, can write it back as it was: some formats it can read only by
        making the weights float numbers.

    Raises:
        StreamlineError: a package or a device that the format needs is missing.
    """
    name, found = quantization_name(config), copy.deepcopy(config.quantization_config)
    try:
        quantizer = AutoHfQuantizer.from_config(found, pre_quantized=True)
        quantizer.validate_environment(device_map={"": device}, weights_only=True)
    except Exception as error:  # each quantizer raises its own
        # What a quantizer would have imported from a package that is not installed is a name it does not know.
        reason = "its package is not installed" if isinstance(error, NameError) else first_line(error)
        raise StreamlineError(
            f"model: its weights are quantized ({name}), which cannot be read here ({reason}); install the package "
            "that made them, or give the float model"
        ) from None
    return bool(quantizer.is_serializable()) and not getattr(quantizer.quantization_config, "dequantize", False)


def check_writable(config: PreTrainedConfig, device: str) -> None:
    """Refuse to change a quantized model that transformers could not write back as it was.

    Raises:
        StreamlineError: as `check_readable`; or its format cannot be written here.
    """
    if quantization_name(config) is not None and not check_readable(config, device):
        raise StreamlineError(
            f"model: its weights are quantized ({quantization_name(config)}), which transformers reads on {device} but "
            "cannot write back; prune the float model and quantize then"
        )


def float_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """The config of the same model, not quantized."""
    plain = copy.deepcopy(config)
    if hasattr(plain, "quantization_config"):
        del plain.quantization_config
    return plain


def renumber_quantization(config: PreTrainedConfig, layers: str, origins: Sequence[int]) -> None:
    """Make every module that `quantization_config` names by its layer's number the one it was, in place.

    Args:
        layers: The path of the list of layers.
        origins: For each new layer, the present number of the layer that takes its place.

    Raises:
        StreamlineError: it names layers in a way of which their new numbers do not follow.
    """
    found = getattr(config, "quantization_config", None)
    if found is None:
        return
    fields = found if isinstance(found, dict) else vars(found)
    # Only the number of a layer follows this path, `.` perhaps written as in a regular expression.
    path = rf"{re.escape(layers.rpartition('.')[2])}\\*\."
    for field, value in fields.items():
        strings = isinstance(value, list) and all(isinstance(each, str) for each in value)
        if strings and field in _LISTS_OF_PATTERNS:
            fields[field] = _patterns_of_same(value, list(linear_modules_of(meta_model(float_config(config)))), origins)
        elif strings:
            fields[field] = [new for each in value for new in _renumbered(field, each, path, origins)]
        elif re.search(rf"{path}[\[(]?\d", str(value)):
            raise _cannot_follow(field)


def _patterns_of_same(patterns: list[str], names: list[str], origins: Sequence[int]) -> list[str]:
    """Patterns that choose, in the new model, the modules which are chosen in the present one; old ones if they do."""

    def chosen(name: str, *which: str) -> bool:
        return not should_convert_module(name, list(which))

    new_names = dict(followed(names, [[origin] for origin in origins]))
    wanted = {new for new, old in new_names.items() if chosen(old, *patterns)}
    named = {each: {new for new in new_names if chosen(new, each)} for each in patterns}
    idle = {each for each in patterns if not any(chosen(name, each) for name in names)}
    kept = [each for each in patterns if each in idle or (named[each] and named[each] <= wanted)]
    rest = wanted.difference(*(named[each] for each in kept))
    return [*kept, *(name for name in new_names if name in rest)]


def _renumbered(field: str, name: str, path: str, origins: Sequence[int]) -> list[str]:
    literal = list(re.finditer(rf"({path})(\d+)(?=\\*\.|\$|$)", name))
    if not literal and not re.search(r"(?<![A-Za-z_\d])\d", name):
        return [name]
    if len(literal) != 1:
        raise _cannot_follow(field)
    [match] = literal
    new_layers = [place for place, origin in enumerate(origins) if origin == int(match[2])]
    return [f"{name[: match.start()]}{match[1]}{place}{name[match.end() :]}" for place in new_layers]


def _cannot_follow(field: str) -> StreamlineError:
    return StreamlineError(
        f"quantization_config.{field}: names layers in a form that cannot follow their new numbers; prune the float "
        "model and quantize then"
    )

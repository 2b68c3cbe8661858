"""The `quantization_config` in a model's config: the quantizer that wrote it, and the layers that it names.

Each quantization library has its own fields in it.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedConfig
from transformers.quantizers.auto import AutoHfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module

from optimum.streamline.errors import StreamlineError, first_line

from .architectures import Architecture
from .linear_modules import linear_modules_of, meta_model
from .module_patterns import renumbered_names, within

# The fields in which libraries list the modules that stay in float, as patterns that `should_convert_module` matches.
_LISTS_OF_PATTERNS = ("llm_int8_skip_modules", "modules_to_not_convert")


def quantization_fields(config: PreTrainedConfig) -> dict[str, Any]:
    """The fields of `quantization_config`; empty for a model that is not quantized.

    Raises:
        StreamlineError: `quantization_config` is not a mapping.
    """
    found = getattr(config, "quantization_config", None)
    if found is None:
        return {}
    if not isinstance(found, dict) and not hasattr(found, "to_dict"):
        raise StreamlineError(f"config.json: quantization_config is {found!r}: must be fields, such as quant_method")
    fields: dict[str, Any] = found if isinstance(found, dict) else found.to_dict()
    return fields


def quantization_name(config: PreTrainedConfig) -> str | None:
    """The quantizer that made a model.

    Returns:
        A key of `quantization.quantizers.QUANTIZERS`, such as `bnb-nf4`; for other quantizers the `quant_method`, such
        as `gptq`; `None` for a model that is not quantized.
    """
    fields = quantization_fields(config)
    if not fields:
        return None
    method = str(getattr(fields.get("quant_method"), "value", fields.get("quant_method", "unknown")))
    if method == "bitsandbytes":
        return f"bnb-{fields.get('bnb_4bit_quant_type', 'fp4')}" if fields.get("load_in_4bit") else "bnb-int8"
    if method == "torchao" and "int4" in str(fields.get("quant_type")).lower():
        return "torchao-int4"
    return method


def check_readable(config: PreTrainedConfig, device: str) -> bool:
    """Refuse a quantized model that transformers cannot load on this machine.

    The check asks transformers' own quantizer class. There is no list of formats to keep up to date.

    Args:
        config: The config of a quantized model.
        device: `cpu` or `cuda`.

    Returns:
        Whether transformers can save the model in the same format again. Some formats it can only dequantize while
        loading.

    Raises:
        StreamlineError: a package or device that the format needs is missing.
    """
    name, found = quantization_name(config), copy.deepcopy(config.quantization_config)
    try:
        quantizer = AutoHfQuantizer.from_config(found, pre_quantized=True)
        quantizer.validate_environment(device_map={"": device}, weights_only=True)
    except Exception as error:  # each quantizer raises its own
        # A quantizer uses names from its package without importing it first, so a missing package raises NameError.
        reason = "its package is not installed" if isinstance(error, NameError) else first_line(error)
        raise StreamlineError(
            f"model: its weights are quantized ({name}), which cannot be read here ({reason}); install the package "
            "that made them, or give the float model"
        ) from None
    return bool(quantizer.is_serializable()) and not getattr(quantizer.quantization_config, "dequantize", False)


def check_writable(config: PreTrainedConfig, device: str) -> None:
    """Refuse to edit a quantized model that transformers cannot save in the same format.

    Args:
        config: The model's config. A model that is not quantized passes.
        device: `cpu` or `cuda`.

    Raises:
        StreamlineError: as `check_readable`; or transformers can read the format but not save it.
    """
    if quantization_name(config) is not None and not check_readable(config, device):
        raise StreamlineError(
            f"model: its weights are quantized ({quantization_name(config)}), which transformers can read on {device} "
            "but not save; prune the float model, then quantize it"
        )


def float_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """A copy of the config without its quantization."""
    plain = copy.deepcopy(config)
    if hasattr(plain, "quantization_config"):
        del plain.quantization_config
    return plain


def renumber_quantization(
    config: PreTrainedConfig, architecture: Architecture, origins: Sequence[int], mlp_origins: Sequence[int]
) -> None:
    """Update the layer indices in `quantization_config` for a new list of layers, in place.

    Args:
        config: The model's config.
        architecture: The model's architecture.
        origins: For each new layer, the index of the old layer that its attention comes from.
        mlp_origins: For each new layer, the index of the old layer that its MLP comes from.

    Raises:
        StreamlineError: a field names layers in a form that cannot be renumbered, such as a range in a regular
            expression.
    """
    found = getattr(config, "quantization_config", None)
    if found is None:
        return
    fields = found if isinstance(found, dict) else vars(found)
    # Only a layer index follows this path. In a regular expression the dot is escaped.
    path = rf"{re.escape(architecture.layers.rpartition('.')[2])}\\*\."
    follow = _Followed(path, architecture, origins, mlp_origins)
    for field, value in fields.items():
        strings = isinstance(value, list) and all(isinstance(each, str) for each in value)
        if strings and field in _LISTS_OF_PATTERNS:
            fields[field] = _renumbered_patterns(
                value, list(linear_modules_of(meta_model(float_config(config)))), follow
            )
        elif strings:
            fields[field] = [new for each in value for new in _renumbered(field, each, follow)]
        elif re.search(rf"{path}[\[(]?\d", str(value)):
            raise _cannot_follow(field)


@dataclass(frozen=True)
class _Followed:
    """How layers are named, and which old layers the new ones come from.

    Args:
        path: A regular expression for what stands before the number of a layer.
        architecture: The model's architecture.
        origins: For each new layer, the index of the old layer that its attention comes from.
        mlp_origins: The same for its MLP.
    """

    path: str
    architecture: Architecture
    origins: Sequence[int]
    mlp_origins: Sequence[int]

    @property
    def parts(self) -> set[str]:
        """The names of a layer's attention and MLP, and of their norms."""
        architecture = self.architecture
        return {architecture.attention, architecture.attention_norm, *architecture.mlp_part}

    def new_layers(self, old: int, module: str) -> list[tuple[int, tuple[str, ...]]]:
        """The new layers that hold a module of an old layer.

        Args:
            old: The index of the old layer.
            module: The path of the module in the layer; empty for the whole layer.

        Returns:
            For each: its index, and the paths in it; an empty path for the module itself.
        """
        of_mlp = within(module, self.architecture.mlp_part)
        found: list[tuple[int, tuple[str, ...]]] = []
        for index, (origin, mlp_origin) in enumerate(zip(self.origins, self.mlp_origins, strict=True)):
            if old == origin == mlp_origin or (module and old == (mlp_origin if of_mlp else origin)):
                found.append((index, ("",)))
            elif not module and old in (origin, mlp_origin):  # half of it is in another layer
                found.append((index, (self.architecture.attention,) if old == origin else self.architecture.mlp))
        return found


def _renumbered_patterns(patterns: list[str], names: list[str], follow: _Followed) -> list[str]:
    """Patterns that match, in the new model, the modules that `patterns` match in the old one.

    Old patterns stay if they match nothing else in the new model. Other modules are listed by name.
    """

    def excluded(name: str, *by: str) -> bool:
        return not should_convert_module(name, list(by))

    origins, mlp_origins = ([[origin] for origin in each] for each in (follow.origins, follow.mlp_origins))
    new_names = dict(renumbered_names(names, origins, mlp_origins, follow.architecture.mlp_part))
    wanted = {new for new, old in new_names.items() if excluded(old, *patterns)}
    matched = {each: {new for new in new_names if excluded(new, each)} for each in patterns}
    unused = {each for each in patterns if not any(excluded(name, each) for name in names)}
    still_right = [each for each in patterns if each in unused or (matched[each] and matched[each] <= wanted)]
    rest = wanted.difference(*(matched[each] for each in still_right))
    return [*still_right, *(name for name in new_names if name in rest)]


def _renumbered(field: str, name: str, follow: _Followed) -> list[str]:
    """The new names for one module name of `quantization_config`: one per new layer, none if it was removed."""
    literal = list(re.finditer(rf"({follow.path})(\d+)(?=\\*\.|\$|$)", name))
    if not literal and not re.search(r"(?<![A-Za-z_\d])\d", name):
        return [name]
    if len(literal) != 1:
        raise _cannot_follow(field)
    [match] = literal
    rest = name[match.end() :]
    new_names: list[str] = []
    first = re.match(r"\\*\.(\w+)(?=\\*\.|\$|$)", rest)
    # A pattern such as `.*` or `m.*` may match modules of both parts: it speaks of the whole layer.
    module = rest.replace("\\", "").strip(".$") if first and first[1] in follow.parts else ""
    for index, paths in follow.new_layers(int(match[2]), module):
        if paths != ("",) and rest:
            raise _cannot_follow(field)  # such as a regular expression for the whole layer
        start = f"{name[: match.start()]}{match[1]}{index}"
        new_names += [f"{start}.{path}" if path else f"{start}{rest}" for path in paths]
    return new_names


def _cannot_follow(field: str) -> StreamlineError:
    return StreamlineError(
        f"quantization_config.{field}: names layers in a form that cannot follow their new numbers; prune the float "
        "model, then quantize it"
    )

"""Quantizers of checkpoints: one table. bitsandbytes and torchao do the work, through transformers.

Weights only, of linear layers; the output projection and embeddings stay in float, as transformers has it. ONNX graphs
have quantizers of their own, in `optimum.exporters.streamline.quantize`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from optimum.streamline.errors import StreamlineError, require_extra

if TYPE_CHECKING:
    import torch

NONE = "none"
GROUP = 32


@dataclass(frozen=True)
class Quantizer:
    """One way to quantize a checkpoint.

    Args:
        text: What it does, for a user who chooses.
        package: The library that does it; an extra of this distribution has the same name.
        group: How many weights share a scale where the numbers that a product reads must be whole groups; else 1.
        config: Makes transformers' `quantization_config`, given the modules to leave in float, what the rest is
            computed in, and the device.
    """

    text: str
    package: str
    config: Callable[[Sequence[str], torch.dtype, str], Any]
    group: int = 1


def _bnb_int8(kept: Sequence[str], dtype: torch.dtype, device: str) -> Any:
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=list(kept))


def _bnb_nf4(kept: Sequence[str], dtype: torch.dtype, device: str) -> Any:
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=list(kept),
    )


def _torchao_int4(kept: Sequence[str], dtype: torch.dtype, device: str) -> Any:
    import torch
    from torchao.quantization import Int4WeightOnlyConfig, IntxWeightOnlyConfig, PerGroup
    from torchao.quantization.quantize_.workflows import Int4PackingFormat
    from transformers import TorchAoConfig

    if device == "cuda":
        # The form that its kernel reads, for which numbers are in bfloat16.
        packed = Int4WeightOnlyConfig(group_size=GROUP, int4_packing_format=Int4PackingFormat.TILE_PACKED_TO_4D)
        return TorchAoConfig(packed, modules_to_not_convert=list(kept))
    # torchao 0.18 packs 4-bit numbers for accelerators only; what it can save for a CPU has one in each byte.
    int4 = torch.int4  # type: ignore[attr-defined]  # torch's own types lack it
    apart = IntxWeightOnlyConfig(weight_dtype=int4, granularity=PerGroup(GROUP))
    return TorchAoConfig(apart, modules_to_not_convert=list(kept))


QUANTIZERS: dict[str, Quantizer] = {
    "bnb-int8": Quantizer("weights in 8 bits, activations too (LLM.int8, bitsandbytes)", "bitsandbytes", _bnb_int8),
    "bnb-nf4": Quantizer("weights in 4 bits, NormalFloat, blocks of 64 (bitsandbytes)", "bitsandbytes", _bnb_nf4),
    "torchao-int4": Quantizer(
        "weights in 4 bits, groups of 32 (torchao; on a CPU a byte holds one)", "torchao", _torchao_int4, GROUP
    ),
}


def check_quantizer(name: str) -> Quantizer:
    """The quantizer of this name, if it can be used.

    Raises:
        StreamlineError: there is none, or its library is not installed.
    """
    if name not in QUANTIZERS:
        raise StreamlineError(f"quantize {name!r}: not of a checkpoint; one of {', '.join(QUANTIZERS)}")
    quantizer = QUANTIZERS[name]
    require_extra(quantizer.package, quantizer.package)
    return quantizer

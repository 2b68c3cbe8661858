"""The table of checkpoint quantizers. bitsandbytes and torchao quantize, through transformers.

They quantize the weights of linear modules. The output head and the embeddings stay in float, as transformers' own
defaults have it. Exported graphs have other quantizers, in `optimum.exporters.streamline`.
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
    """A quantizer of checkpoints.

    Args:
        description: One line for the user.
        package: The library that quantizes. The extra of this distribution that installs it has the same name.
        config: A function that makes the `quantization_config` of transformers, from the names of the modules that stay
            in float, the dtype of the computation, and the device.
        group: The number of weights that share a scale, if the inputs of every module must divide into whole groups.
            Otherwise 1.
    """

    description: str
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
        # The packing that torchao's CUDA kernel reads; that kernel computes in bfloat16.
        packed = Int4WeightOnlyConfig(group_size=GROUP, int4_packing_format=Int4PackingFormat.TILE_PACKED_TO_4D)
        return TorchAoConfig(packed, modules_to_not_convert=list(kept))
    # torchao 0.18 packs 4-bit weights for accelerators only. On a CPU it can save them only with one weight in a byte.
    int4 = torch.int4  # type: ignore[attr-defined]  # torch's own types lack it
    apart = IntxWeightOnlyConfig(weight_dtype=int4, granularity=PerGroup(GROUP))
    return TorchAoConfig(apart, modules_to_not_convert=list(kept))


QUANTIZERS: dict[str, Quantizer] = {
    "bnb-int8": Quantizer("8-bit weights and activations (LLM.int8, bitsandbytes)", "bitsandbytes", _bnb_int8),
    "bnb-nf4": Quantizer("4-bit NormalFloat weights in blocks of 64 (bitsandbytes)", "bitsandbytes", _bnb_nf4),
    "torchao-int4": Quantizer(
        "4-bit weights in groups of 32 (torchao; one byte each on a CPU)", "torchao", _torchao_int4, GROUP
    ),
}


def check_quantizer(name: str) -> Quantizer:
    """Return the quantizer called `name`.

    Raises:
        StreamlineError: there is no such quantizer, or its library is not installed.
    """
    if name not in QUANTIZERS:
        raise StreamlineError(f"quantize {name!r}: cannot quantize a checkpoint; use one of {', '.join(QUANTIZERS)}")
    quantizer = QUANTIZERS[name]
    require_extra(quantizer.package, quantizer.package)
    return quantizer

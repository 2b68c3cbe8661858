"""Make the models of `ci/bench gpu`: on the device, from a config, with random weights, and quantized in place."""

from __future__ import annotations

import gc
import importlib
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

from gpu_cases import Shape, kept_layers

# bitsandbytes warns at each call of an int8 layer that it casts bf16 to fp16. The warning would be timed too.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

# The standard deviation of the weights. With Llama's 0.02 and a hidden size of 4096, almost every input column of
# `down_proj` has a value above LLM.int8's threshold of 6 within 2048 tokens, and is also multiplied in 16 bits. In a
# trained 7B model few columns are.
DEVIATION = 0.01
THRESHOLD = 6.0


def make_config(shape: Shape, layers: int) -> LlamaConfig:
    """The transformers config of a shape with `layers` layers; the output projection is not tied to the embedding."""
    return LlamaConfig(
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        vocab_size=shape.vocab,
        max_position_embeddings=4096,
        initializer_range=DEVIATION,
        tie_word_embeddings=False,
    )


def _make(shape: Shape, layers: int, device: torch.device) -> Any:
    from_config: Any = AutoModelForCausalLM.from_config  # transformers has no type hints for it
    with device:
        model = from_config(make_config(shape, layers), dtype=torch.bfloat16, attn_implementation="sdpa")
    return model.eval().requires_grad_(False)


def build(shape: Shape, weights: str, device: torch.device) -> dict[str, Any]:
    """Make the models `dense` and `pruned`; `pruned` has the first layers of `dense` and shares their weights.

    Args:
        shape: The dimensions.
        weights: A key of `CONVERSIONS`.
        device: The device.
    """
    torch.manual_seed(0)
    dense = _make(shape, shape.layers, device)
    convert = CONVERSIONS[weights]
    if convert is not None:
        for layer in dense.model.layers:
            for block in (layer.self_attn, layer.mlp):
                for name, linear in list(block.named_children()):
                    if isinstance(linear, nn.Linear):
                        setattr(block, name, convert(linear))  # frees the bf16 weight
    pruned = _make(shape, kept_layers(shape), torch.device("meta"))
    pruned.lm_head = dense.lm_head
    for name, module in dense.model.named_children():
        setattr(pruned.model, name, module[: kept_layers(shape)] if name == "layers" else module)
    release()
    return {"dense": dense, "pruned": pruned}


def _to_int8(linear: nn.Linear) -> Any:
    """LLM.int8() of bitsandbytes: a scale per row; activation columns above the threshold are multiplied in 16 bits."""
    bnb = _bitsandbytes()
    rows, columns = linear.weight.shape
    layer = bnb.nn.Linear8bitLt(columns, rows, bias=False, has_fp16_weights=False, threshold=THRESHOLD, device="meta")
    codes, scales, _ = bnb.functional.int8_vectorwise_quant(linear.weight.data.to(torch.float16))
    layer.weight = bnb.nn.Int8Params(codes, requires_grad=False, has_fp16_weights=False, CB=codes, SCB=scales)
    return layer.eval()


def _to_nf4(linear: nn.Linear) -> Any:
    """NF4 of bitsandbytes: blocks of 64 with one fp32 scale each, as transformers does by default; matmuls in bf16."""
    bnb = _bitsandbytes()
    rows, columns = linear.weight.shape
    layer = bnb.nn.Linear4bit(columns, rows, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4", device="meta")
    weight = bnb.nn.Params4bit(
        linear.weight.data, blocksize=64, compress_statistics=False, quant_type="nf4", module=layer
    )
    layer.weight = weight.to(linear.weight.device)
    return layer.eval()


def _bitsandbytes() -> Any:
    """Import bitsandbytes, which bf16 does not need; untyped, because it has no type hints."""
    return importlib.import_module("bitsandbytes")


# The conversion of a linear module for each kind of weights; `None` leaves it in bf16.
CONVERSIONS: dict[str, Callable[[nn.Linear], Any] | None] = {
    "bf16": None,
    "bnb-int8": _to_int8,
    "bnb-nf4": _to_nf4,
}


def release() -> None:
    """Free the memory that nothing references."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def weight_bytes(model: Any) -> tuple[int, int]:
    """The bytes of all weights and scales, and of those that a token is multiplied by: all but the input embedding."""
    total = sum(each.nbytes for each in model.parameters())
    for module in model.modules():
        # The int8 scales move from the weight to the layer's state at the first call.
        scales = [getattr(getattr(module, holder, None), "SCB", None) for holder in ("weight", "state")]
        state = getattr(module, "quant_state", None)
        scales.append(getattr(state, "absmax", None))
        total += sum(each.nbytes for each in scales if each is not None)
    return total, total - model.get_input_embeddings().weight.nbytes

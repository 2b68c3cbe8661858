"""From a torch model to an ONNX graph: the one file that meets transformers' exporters.

They are experimental, so the extra `onnx` pins their minor version and `parity.py` judges every graph. The
graph comes out with their names; `names.py` gives it those of the ecosystem. Tracing one layer of each kind
and stamping out the rest is a second way to the same graph and belongs beside this one.
"""

from __future__ import annotations

import onnx_ir as ir
import torch
from transformers import GenerationConfig, PreTrainedModel
from transformers.exporters.configs import OnnxConfig
from transformers.exporters.exporter_onnx import OnnxExporter
from transformers.exporters.utils import decompose_for_generation

OPSET = 23
"""The first with `Attention`, `RMSNormalization` and `RotaryEmbedding`; 24 falls back to decomposed norms."""


def trace(model: PreTrainedModel) -> ir.Model:
    """One graph for prefill (empty past), continuation and decode, for any batch, honouring the attention mask.

    Args:
        model: In evaluation mode, in the dtype to export.

    Returns:
        A graph of standard operators, its weights in memory.
    """
    greedy = GenerationConfig(do_sample=False, num_beams=1, use_cache=True)
    stages = decompose_for_generation(model, _sample(), generation_config=greedy, multi_token_decode=True)
    module, inputs = stages["decode"]  # a shallow copy of `model`
    assert isinstance(module, PreTrainedModel)
    config = OnnxConfig(dynamic=True, opset_version=OPSET)
    program: ir.Model = OnnxExporter().export(module, inputs, config).program
    return program


def _sample() -> dict[str, torch.Tensor]:
    # Two rows, or the batch is frozen at one; one of them left-padded, or the mask is found to be unused
    # and its input dropped. Which tokens is of no consequence: only shapes are traced. Three of them, so
    # that no sliding window in use is full and every cache entry has the length of the text.
    return {
        "input_ids": torch.ones((2, 3), dtype=torch.int64),
        "attention_mask": torch.tensor([[0, 1, 1], [1, 1, 1]]),
    }

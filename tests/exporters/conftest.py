"""Fixtures with real exports of tiny random models. Each is made once per session, because an export takes seconds."""

from __future__ import annotations

import string
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import onnx
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from optimum.exporters.streamline import export_checkpoint
from optimum.exporters.streamline.onnx.runner import OnnxRunner
from optimum.streamline.checkpoints.loading import load_stock, load_tokenizer
from optimum.streamline.checkpoints.saving import save_model
from optimum.streamline.editing.apply import apply_plan
from optimum.streamline.editing.plan import Plan
from optimum.streamline.model_files.artifact import Artifact
from optimum.streamline.model_files.source import ModelSource
from optimum.streamline.models.architectures import architecture_of, decoder_layers
from optimum.streamline.models.skipped_sublayers import ATTENTION, MLP, mark_skipped, zero_output
from reference import REFERENCE
from tiny import tiny_model

GEMMA2_KINDS = {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"], "sliding_window": 6}
# Each case: architecture, skipped sublayers ("dead" in the names), dtype, and config fields.
CASES = {
    "llama": ("llama", (), "fp32", {"num_hidden_layers": 2, "tie_word_embeddings": True}),
    "dead first": ("llama", ((0, ATTENTION),), "fp32", {"num_hidden_layers": 3}),
    "dead middle": ("llama", ((1, ATTENTION),), "fp32", {"num_hidden_layers": 3}),
    "fp16": ("llama", (), "fp16", {"num_hidden_layers": 2}),
    "gpt2": ("gpt2", (), "fp32", {"n_layer": 2}),
    "opt": ("opt", (), "fp32", {"num_hidden_layers": 2}),
    "dead mlp": ("llama", ((0, MLP), (1, ATTENTION), (1, MLP)), "fp32", {"num_hidden_layers": 3}),
    "gpt2 dead mlp": ("gpt2", ((1, MLP),), "fp32", {"n_layer": 2}),
    "opt dead mlp": ("opt", ((0, MLP),), "fp32", {"num_hidden_layers": 2}),
    # Gemma 2 has norms after the sublayers, which stay when a sublayer is skipped; norms with two types in fp16; and
    # two kinds of attention.
    "gemma2": ("gemma2", ((0, ATTENTION),), "fp16", {"num_hidden_layers": 3, **GEMMA2_KINDS}),
}


@dataclass(frozen=True)
class Exported:
    checkpoint: Path
    artifact: Artifact

    @property
    def folder(self) -> Path:
        return Path(self.artifact.path)

    @property
    def graph(self) -> onnx.GraphProto:
        return onnx.load(self.folder / "model.onnx", load_external_data=False).graph

    def count(self, operator: str) -> int:
        return sum(node.op_type == operator for node in self.graph.node)

    def runner(self) -> OnnxRunner:
        return OnnxRunner(self.folder)

    def stock(self) -> PreTrainedModel:
        """The checkpoint in stock transformers, which computes skipped sublayers with their zeros."""
        return AutoModelForCausalLM.from_pretrained(self.checkpoint, dtype=torch.float32).eval()


def save_tiny(folder: Path, case: str) -> Path:
    architecture, skipped, _, fields = CASES[case]
    model = tiny_model(architecture, **fields)
    row = architecture_of(model.config)
    marks: dict[int, list[str]] = {}
    for index, sublayer in skipped:
        zero_output(decoder_layers(model, row)[index], row, sublayer)
        marks.setdefault(index, []).append(sublayer)
    mark_skipped(model.config, marks)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Exported]:
    """A function that exports a case of `CASES`."""

    @cache
    def make(case: str) -> Exported:
        folder = tmp_path_factory.mktemp(case.replace(" ", "-"))
        checkpoint = save_tiny(folder / "checkpoint", case)
        if case == "llama":
            byte_level_tokenizer().save_pretrained(checkpoint)
        return Exported(checkpoint, export_checkpoint(str(checkpoint), folder / "onnx", dtype=CASES[case][2]))

    return make


@pytest.fixture(scope="session")
def pruned_reference(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """The export of the trained reference model without three of its layers."""
    folder = tmp_path_factory.mktemp("pruned-reference")
    model = load_stock(ModelSource(REFERENCE), torch.float32)
    apply_plan(model, Plan(16, (3, 5, 11)), None)
    save_model(model, load_tokenizer(ModelSource(REFERENCE)), torch.float32, folder / "checkpoint")
    return Exported(folder / "checkpoint", export_checkpoint(str(folder / "checkpoint"), folder / "onnx"))


def byte_level_tokenizer() -> PreTrainedTokenizerFast:
    # The last two symbols are the byte-level forms of a space and a newline.
    symbols = string.ascii_letters + string.digits + string.punctuation + "\u0120\u010a"
    vocabulary = {"<|endoftext|>": 0, "<pad>": 1, **{symbol: index + 2 for index, symbol in enumerate(symbols)}}
    vocabulary["th"] = len(vocabulary)
    backend = Tokenizer(models.BPE(vocabulary, [("t", "h")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>", pad_token="<pad>")

"""Write the manifest that `transformers.exporters.ExportedModel.from_pretrained` reads before it opens an engine."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import torch
import transformers
from transformers.exporters.base import EXPORT_MANIFEST_FILE, EXPORT_SCHEMA_VERSION
from transformers.exporters.metadata import ExportMetadata
from transformers.modeling_outputs import CausalLMOutputWithPast

from optimum.streamline.checkpoints.loading import DTYPES

from .engine_record import ENGINE_FILE

FORMAT = "tensorrt"
COMPONENT = "model"


def describe(architecture: str, dtype: str) -> ExportMetadata:
    """The metadata of an engine for transformers.

    Args:
        architecture: The name of the model's class.
        dtype: `fp32`, `fp16` or `bf16`.
    """
    tokens = {"rank": 2, "dtype": "int64"}
    _, spec = torch.utils._pytree.tree_flatten(CausalLMOutputWithPast(logits=torch.empty(0)))
    return ExportMetadata(
        architecture=architecture,
        packages={"transformers": transformers.__version__},
        export_config={"export_format": FORMAT, "dtype": dtype},
        export_dtype=str(DTYPES[dtype]).removeprefix("torch."),
        export_device="cuda",
        kwargs={"input_ids": tokens, "attention_mask": tokens, "past_key_values": {"container": "EngineCache"}},
        out_spec=torch.utils._pytree.treespec_dumps(spec),
    )


def write_manifest(folder: Path, architecture: str, dtype: str) -> None:
    """Write the manifest into the folder of an engine.

    Args:
        folder: The artifact's folder.
        architecture: The name of the model's class.
        dtype: `fp32`, `fp16` or `bf16`.
    """
    component = {"file": ENGINE_FILE, "metadata": asdict(describe(architecture, dtype))}
    manifest = {
        "schema_version": EXPORT_SCHEMA_VERSION,
        "export_format": FORMAT,
        "components": {COMPONENT: component},
    }
    (folder / EXPORT_MANIFEST_FILE).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")

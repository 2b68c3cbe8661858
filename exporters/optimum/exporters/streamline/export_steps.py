"""Steps that the export to ONNX and the export to TensorRT share."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from optimum.streamline.errors import ParityError, StreamlineError, require_extra

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

    from optimum.streamline.checkpoints.source import ModelSource

T = TypeVar("T")


LOG_FILE = "export.log"
DTYPES = ("fp32", "fp16", "bf16")


def check_packages(extra: str) -> None:
    """Refuse to make a graph without the packages that make one.

    Raises:
        StreamlineError: naming the package that is missing, and the extra that brings it.
    """
    for package in ("onnx", "onnxscript", "transformers.exporters"):  # older transformers lack the last
        require_extra(package, extra)


def check_config(config: PretrainedConfig) -> None:
    """Refuse a model whose graph could not be made, or not be compared with torch.

    Raises:
        StreamlineError: naming the field.
    """
    from optimum.exporters.streamline.parity.compare import LONGEST_TEXT

    rope = getattr(config, "rope_parameters", None) or {}
    if "dynamic" in {
        rope.get("rope_type"),
        *(each.get("rope_type") for each in rope.values() if isinstance(each, dict)),
    }:
        raise StreamlineError("rope_type 'dynamic': cannot be exported, its angles change with the length of the text")
    context = config.max_position_embeddings
    if context < LONGEST_TEXT:
        raise StreamlineError(
            f"max_position_embeddings {context}: must be at least {LONGEST_TEXT} for the comparison with torch"
        )


def try_few_layers(model: PreTrainedModel, attempt: Callable[[list[int]], T]) -> tuple[T, str]:
    """What `attempt` makes of a graph that a few traced layers were stamped out to, or of all if they will not do.

    Returns:
        That, and why all layers had to be traced; empty where few were enough.
    """
    from optimum.exporters.streamline.tracing.skeleton import layers_to_trace
    from optimum.exporters.streamline.tracing.stamp_layers import CannotStampError

    every, few = list(range(model.config.num_hidden_layers)), layers_to_trace(model)
    whole_because = ""
    if few != every:
        try:
            return attempt(few), ""
        except (CannotStampError, ParityError) as error:
            whole_because = str(error)
    return attempt(every), whole_because


def write_companions(model: PreTrainedModel, source: ModelSource, folder: Path) -> None:
    """Write what clients read beside a graph: the model's config, how it generates, its tokenizer.

    Raises:
        ParityError: the tokenizer, read back, gives other tokens.
    """
    from optimum.streamline.checkpoints.loading import load_tokenizer
    from optimum.streamline.checkpoints.read_back import compare_tokenizer
    from optimum.streamline.checkpoints.transformers4_config import add_older_names
    from optimum.streamline.checkpoints.transformers4_tokenizer import save_tokenizer

    config = copy.deepcopy(model.config)
    if hasattr(config, "auto_map"):  # no code is run beside a graph
        del config.auto_map
    config.save_pretrained(folder)
    add_older_names(folder)
    model.generation_config.save_pretrained(folder)
    try:
        tokenizer = load_tokenizer(source)
    except StreamlineError:  # a checkpoint without a tokenizer is a model all the same
        return
    save_tokenizer(tokenizer, folder)
    compare_tokenizer(folder, tokenizer, source.trust_remote_code)

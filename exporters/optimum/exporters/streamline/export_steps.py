"""Steps that both exports share, to ONNX and to TensorRT: checks, the choice of traced layers, and companion files."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from optimum.streamline.errors import ParityError, StreamlineError, require_extra

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

    from optimum.streamline.model_files.source import ModelSource

T = TypeVar("T")

LOG_FILE = "export.log"
DTYPES = ("fp32", "fp16", "bf16")


def check_packages(extra: str) -> None:
    """Refuse an export if a package that tracing needs is missing.

    Args:
        extra: The extra of this distribution that installs the packages: `onnx` or `tensorrt`.

    Raises:
        StreamlineError: naming the missing package and the extra that installs it.
    """
    for package in ("onnx", "onnxscript", "transformers.exporters"):  # older versions of transformers lack the last
        require_extra(package, extra)


def check_config(config: PretrainedConfig) -> None:
    """Refuse a model that cannot be traced or cannot be compared with torch.

    Args:
        config: The model's config.

    Raises:
        StreamlineError: naming the field of the config and its value.
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
    """Call `attempt` with one traced layer of each kind; if that fails, with all layers, which takes longer.

    Args:
        model: The model to export.
        attempt: A function from the indices of the layers to trace to its result. It raises `CannotStampError` or
            `ParityError` if the graph made from these layers is not good.

    Returns:
        The result of `attempt`, and the reason why all layers were traced; an empty reason if few were enough.

    Raises:
        CannotStampError: `attempt` failed with all layers too; so for `ParityError`.
    """
    from optimum.exporters.streamline.tracing.skeleton import layers_to_trace
    from optimum.exporters.streamline.tracing.stamp_layers import CannotStampError

    all_layers, few_layers = list(range(model.config.num_hidden_layers)), layers_to_trace(model)
    whole_because = ""
    if few_layers != all_layers:
        try:
            return attempt(few_layers), ""
        except (CannotStampError, ParityError) as error:
            whole_because = str(error)
    return attempt(all_layers), whole_because


def write_companions(model: PreTrainedModel, source: ModelSource, folder: Path) -> None:
    """Write the files that clients read beside a graph: config, generation config and tokenizer.

    Args:
        model: The model.
        source: The checkpoint, whose tokenizer is copied; a checkpoint without one is accepted.
        folder: The folder of the export.

    Raises:
        ParityError: the tokenizer, saved and loaded again, gives other tokens.
    """
    from optimum.streamline.checkpoints.loading import load_tokenizer
    from optimum.streamline.checkpoints.read_back import compare_tokenizer
    from optimum.streamline.model_files.transformers4_config import add_older_names
    from optimum.streamline.model_files.transformers4_tokenizer import save_tokenizer

    config = copy.deepcopy(model.config)
    if hasattr(config, "auto_map"):  # a graph needs no modeling code
        del config.auto_map
    config.save_pretrained(folder)
    add_older_names(folder)
    model.generation_config.save_pretrained(folder)
    try:
        tokenizer = load_tokenizer(source)
    except StreamlineError:  # a checkpoint without a tokenizer can be exported too
        return
    save_tokenizer(tokenizer, folder)
    compare_tokenizer(folder, tokenizer, source.trust_remote_code)

"""A model that the caller has in memory, as a source: its files are written only when a step needs files."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from optimum.streamline.errors import StreamlineError
from optimum.streamline.model_files.source import ModelSource
from optimum.streamline.models.architectures import architecture_of
from optimum.streamline.models.quantization_config import quantization_name

from .saving import save_model


@dataclass(frozen=True, eq=False)
class ModelInMemory(ModelSource):
    """A transformers model in memory, and its tokenizer. Nothing here changes either.

    Args:
        model: A label, which `source_in_memory` makes from the name in the model's config.
        loaded: The model itself, with float weights.
        tokenizer: The tokenizer that belongs to it.
    """

    loaded: PreTrainedModel = field(kw_only=True, repr=False)
    tokenizer: PreTrainedTokenizerBase = field(kw_only=True, repr=False)

    @property
    def is_local(self) -> bool:
        """Always: it is no repository of the Hub."""
        return True

    @property
    def name(self) -> str:
        """The label, which holds no path of this machine."""
        return self.model

    @property
    def folder(self) -> Path:
        """A temporary folder with the model's checkpoint, written the first time; it goes with this object."""
        return Path(self._folder.name)

    @property
    def own_folder(self) -> Path:
        """The same folder."""
        return self.folder

    @property
    def base(self) -> None:
        """None: the model is no adapter."""
        return

    def of(self, model: str) -> ModelSource:
        """Another model, read from a folder."""
        return ModelSource(model)

    def contents(self) -> Iterator[tuple[str, str]]:
        """Name and SHA-256 of the config and of each weight. Other hashes than those of a checkpoint's files."""
        yield "config", hashlib.sha256(self.loaded.config.to_json_string(use_diff=False).encode()).hexdigest()
        for name, value in sorted(self.loaded.state_dict().items()):
            data = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
            yield f"{name} {value.dtype} {list(value.shape)}", hashlib.sha256(data).hexdigest()

    @cached_property
    def _folder(self) -> TemporaryDirectory[str]:
        folder = TemporaryDirectory(prefix="streamline-model-")
        save_model(self.loaded, self.tokenizer, None, Path(folder.name))
        return folder


def source_in_memory(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> ModelInMemory:
    """The source for a model in memory.

    Raises:
        StreamlineError: its architecture cannot be handled, or its weights are quantized or not all on one device.
    """
    architecture_of(model.config)
    devices = sorted({str(parameter.device) for parameter in model.parameters()})
    if len(devices) > 1 or "meta" in devices:
        raise StreamlineError(
            f"model {type(model).__name__}: its weights are on {' and '.join(devices)}; load it on one device, or give "
            "the folder of its checkpoint"
        )
    if name := quantization_name(model.config):
        raise StreamlineError(f"model {type(model).__name__}: is quantized ({name}); give the folder of its checkpoint")
    label = Path(str(model.config.name_or_path or "")).name or type(model).__name__
    return ModelInMemory(f"{label} (in memory)", loaded=model, tokenizer=tokenizer)

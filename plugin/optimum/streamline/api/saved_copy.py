"""The folder that `Streamliner` saved its pruned model in, and whether folder and model are still what they were."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from optimum.streamline.checkpoints.provenance import changed_files
from optimum.streamline.checkpoints.read_back import tensor_checksums
from optimum.streamline.errors import StreamlineError
from optimum.streamline.model_files.source import ModelSource


@dataclass(frozen=True)
class SavedCopy:
    """A saved copy of a model in memory, and what the model was when it was saved.

    Args:
        folder: The checkpoint's folder.
        files: Names of the files that were written, without logs.
        config: The model's config as JSON.
        checksums: Type, shape and checksum of each of the model's tensors, by name.
    """

    folder: Path
    files: tuple[str, ...] = field(compare=False)
    config: str = field(repr=False)
    checksums: dict[str, tuple[Any, ...]] = field(repr=False)

    @classmethod
    def of(cls, model: PreTrainedModel, folder: Path) -> SavedCopy:
        """The copy of `model` that was just saved in `folder`."""
        files = tuple(sorted(file.name for file in folder.iterdir() if file.suffix != ".log"))
        return cls(folder, files, model.config.to_json_string(use_diff=False), tensor_checksums(model))

    def is_current(self, model: PreTrainedModel) -> bool:
        """Whether neither the folder nor the model was changed since. A user may edit both by hand."""
        return self._has_its_files() and self == SavedCopy.of(model, self.folder)

    def _has_its_files(self) -> bool:
        with suppress(StreamlineError):
            return self.folder.is_dir() and changed_files(ModelSource(str(self.folder))) == []
        return False

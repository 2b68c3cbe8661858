"""Find the weight files of a checkpoint, as transformers does, and read the tensors' names, types and shapes.

A checkpoint's weights are the files that its index names, or its single weight file. Other weight files in the folder
are ignored. Size, fingerprint, download and type checks all use this file. transformers searches in the same order, but
only while it loads a model.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from optimum.streamline.errors import StreamlineError, first_line
from optimum.streamline.models.bare_layers import BARE_VARIANT
from optimum.streamline.system.git_lfs import POINTER_LIMIT, is_lfs_pointer

from .artifact import is_artifact

CONFIG_FILE = "config.json"
ADAPTER_CONFIG_FILE = "adapter_config.json"


# Pairs of a single weight file and an index of several, in the order in which transformers looks for them.
_SAFETENSORS = (
    ("model.safetensors", "model.safetensors.index.json"),
    (f"model.{BARE_VARIANT}.safetensors", f"model.safetensors.index.{BARE_VARIANT}.json"),
)
_PICKLED = (("pytorch_model.bin", "pytorch_model.bin.index.json"),)
_TYPES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
FLOAT_TYPES = frozenset(_TYPES.values())
HUB_COMPANIONS = ("*.json", "*.jinja", "*.model", "*.txt", "*.py", "README.md", "adapter_model.safetensors")


@dataclass(frozen=True)
class StoredTensor:
    """The header of one tensor in a weight file.

    Args:
        name: Its name.
        type: Its type as safetensors names it, such as `BF16`.
        shape: Its shape.
    """

    name: str
    type: str
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """The tensor's size in bytes."""
        bits = re.search(r"\d+", self.type)  # the first number in F32, U8 or F8_E4M3; BOOL has none and takes 8
        return math.prod(self.shape) * (int(bits[0]) if bits else 8) // 8


@dataclass(frozen=True)
class WeightFiles:
    """The files that hold a checkpoint's weights.

    Args:
        files: The files, sorted by name.
        index: The index that names them, if there are several.
        pickled: Whether they are `.bin` files, which torch reads with `weights_only`.
    """

    files: tuple[Path, ...]
    index: Path | None = None
    pickled: bool = False

    @property
    def bytes(self) -> int:
        """The size of the files on disk, in bytes."""
        return sum(file.stat().st_size for file in self.files)

    def tensors(self) -> Iterator[StoredTensor]:
        """Read the headers of all tensors, file by file.

        Raises:
            StreamlineError: a file cannot be read.
        """
        for file in self.files:
            try:
                yield from _pickled_tensors(file) if self.pickled else _safe_tensors(file)
            except StreamlineError:
                raise
            except UnpicklingError:
                raise StreamlineError(
                    f"{file}: holds pickled objects other than tensors, which could run code; if you trust it, load "
                    "the model in transformers and save it with save_pretrained, which writes safetensors"
                ) from None
            except Exception as error:  # each format raises exceptions of its own
                raise StreamlineError(
                    f"{file}: cannot be read ({first_line(error)}); it may be incomplete, fetch it again"
                ) from None


def find_weights(folder: Path) -> WeightFiles:
    """Find the weight files of the checkpoint in `folder`.

    Raises:
        StreamlineError: there are none; the index is broken; a file that the index names is missing or in another
            folder; or a file is empty or a Git LFS pointer.
    """
    for single, index in (*_SAFETENSORS, *_PICKLED):
        pickled = (single, index) in _PICKLED
        if (folder / single).is_file():
            return WeightFiles(_checked((folder / single,)), pickled=pickled)
        if (folder / index).is_file():
            return WeightFiles(_checked(_indexed_files(folder / index)), folder / index, pickled)
    others = [
        file.name for file in sorted(folder.glob("*")) if file.suffix in (".safetensors", ".bin", ".gguf", ".pth")
    ]
    hint = f"; transformers does not look for the name {others[0]}" if others else ""
    raise StreamlineError(
        f"model {str(folder)!r}: has no weights, neither {_SAFETENSORS[0][0]} nor {_SAFETENSORS[0][1]}{hint}"
    )


def weight_and_config_files(folder: Path) -> list[Path]:
    """The files that define what a model computes: config, weight index if there is one, and weight files."""
    weights = find_weights(folder)
    return [folder / CONFIG_FILE, *([weights.index] if weights.index else []), *weights.files]


def fetch_weights(folder: Path, fetch: Callable[[list[str]], object]) -> None:
    """Fetch the weight files of a repository that transformers would load, and no others.

    Args:
        folder: The local folder, which holds the small files, such as indexes, already.
        fetch: Downloads files of these names into `folder`, and ignores names that the repository does not have.
    """
    if is_artifact(folder):
        fetch(["model.onnx", "model.onnx.data", "model.engine"])
        return
    for single, index in (*_SAFETENSORS, *_PICKLED):
        if (folder / index).is_file():
            fetch(_names_in(folder / index))
            return
        fetch([single])
        if (folder / single).is_file():
            return


def has_safetensors(folder: Path) -> bool:
    """Whether `folder` holds a model's weights in safetensors, under a name that transformers looks for."""
    return any((folder / name).is_file() for names in _SAFETENSORS for name in names)


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds a PEFT adapter, with or without a full model."""
    return (folder / ADAPTER_CONFIG_FILE).is_file()


def _indexed_files(index: Path) -> tuple[Path, ...]:
    """The files that a weight index names.

    Raises:
        StreamlineError: the index is broken, or a file is missing or in another folder.
    """
    files = tuple(index.parent / name for name in _names_in(index))
    for file in files:
        if not file.is_file():
            raise StreamlineError(f"{index}: names {file.name!r}, which is missing; fetch {file.name} again")
    return files


def _names_in(index: Path) -> list[str]:
    """The file names in a weight index, sorted."""
    try:
        names = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
        files = sorted({str(name) for name in names})
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        raise StreamlineError(f"{index}: is not a weight index, it has no usable weight_map") from None
    for name in files:
        if Path(name).name != name:
            raise StreamlineError(f"{index}: names {name!r}; weights must lie in the checkpoint's own folder")
    if not files:
        raise StreamlineError(f"{index}: names no weight files; fetch it again")
    return files


def _checked(files: tuple[Path, ...]) -> tuple[Path, ...]:
    """Refuse empty files and Git LFS pointers; returns the files."""
    for file in files:
        with file.open("rb") as stream:
            start = stream.read(POINTER_LIMIT)
        if not start:
            raise StreamlineError(f"{file}: is empty; fetch it again")
        if is_lfs_pointer(start):
            raise StreamlineError(
                f"{file}: is a Git LFS pointer, not the weights; run `git lfs pull` in its repository"
            )
    return files


def _safe_tensors(file: Path) -> Iterator[StoredTensor]:
    """The headers of the tensors in a safetensors file, sorted by name."""
    try:
        with safe_open(file, framework="numpy") as tensors:
            for name in sorted(tensors.keys()):
                part: Any = tensors.get_slice(name)
                yield StoredTensor(name, str(part.get_dtype()), tuple(part.get_shape()))
    except SafetensorError as error:
        raise StreamlineError(
            f"{file}: is not a safetensors file, or is incomplete ({error}); fetch it again"
        ) from None


def _pickled_tensors(file: Path) -> Iterator[StoredTensor]:
    """The headers of the tensors in a `.bin` file."""
    # `weights_only` refuses everything except tensors and plain containers, so no code in the file runs.
    state: dict[str, torch.Tensor] = torch.load(file, map_location="meta", weights_only=True)
    for name, value in state.items():
        kind = _TYPES.get(value.dtype, str(value.dtype).removeprefix("torch.").upper())
        yield StoredTensor(name, kind, tuple(value.shape))

"""Which files are the checkpoint: the weights that its index names, or its single file, and nothing that lies beside.

Size, fingerprint, download, copy and the types of the stored tensors all ask here. Files are found in the order in
which transformers looks for them, which it does only to load a model. Knows no architecture, and reads no values but
those of a `.bin` file's header.
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

from .artifact import is_artifact

CONFIG_FILE = "config.json"
ADAPTER_CONFIG_FILE = "adapter_config.json"


# Single files, and indexes that name several, in the order in which transformers looks for them.
_SAFE = (
    ("model.safetensors", "model.safetensors.index.json"),
    (f"model.{BARE_VARIANT}.safetensors", f"model.safetensors.index.{BARE_VARIANT}.json"),
)
_PICKLED = (("pytorch_model.bin", "pytorch_model.bin.index.json"),)
# A Git LFS pointer is a text of three lines in place of the file.
_POINTER, _POINTER_SIZE = b"version https://git-lfs", 1024
_TYPES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
FLOAT_TYPES = frozenset(_TYPES.values())
HUB_COMPANIONS = ("*.json", "*.jinja", "*.model", "*.txt", "*.py", "README.md", "adapter_model.safetensors")


@dataclass(frozen=True)
class StoredTensor:
    """One tensor as a file holds it.

    Args:
        name: Its name in the file.
        type: Its type as safetensors writes it, such as `BF16`.
        shape: Its shape.
    """

    name: str
    type: str
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """Bytes it takes."""
        bits = re.search(r"\d+", self.type)  # F32, U8, F8_E4M3; BOOL has none
        return math.prod(self.shape) * (int(bits[0]) if bits else 8) // 8


@dataclass(frozen=True)
class WeightFiles:
    """The files that hold a checkpoint's weights.

    Args:
        files: The files, by name.
        index: The file that names them, where there are several.
        pickled: Whether they are `.bin` files, which torch reads with `weights_only`.
    """

    files: tuple[Path, ...]
    index: Path | None = None
    pickled: bool = False

    @property
    def bytes(self) -> int:
        """Bytes they take on disk."""
        return sum(file.stat().st_size for file in self.files)

    def tensors(self) -> Iterator[StoredTensor]:
        """The tensors they hold, in the order of the files.

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
                    f"{file}: holds more than tensors, and what it holds could run code; where you trust it, save its "
                    "model with save_pretrained, which writes safetensors"
                ) from None
            except Exception as error:  # each format raises its own
                raise StreamlineError(f"{file}: cannot be read ({first_line(error)}); is it whole?") from None


def find_weights(folder: Path) -> WeightFiles:
    """The weights of the checkpoint in `folder`.

    Raises:
        StreamlineError: there are none; or an index is broken, or names a file that is not there or lies elsewhere.
    """
    for single, index in (*_SAFE, *_PICKLED):
        pickled = (single, index) in _PICKLED
        if (folder / single).is_file():
            return WeightFiles(_whole((folder / single,)), pickled=pickled)
        if (folder / index).is_file():
            return WeightFiles(_whole(_indexed_files(folder / index)), folder / index, pickled)
    found = [file.name for file in sorted(folder.glob("*")) if file.suffix in (".safetensors", ".bin", ".gguf", ".pth")]
    beside = f"; {found[0]} is not a name that transformers looks for" if found else ""
    raise StreamlineError(f"model {str(folder)!r}: has no weights, neither {_SAFE[0][0]} nor {_SAFE[0][1]}{beside}")


def checkpoint_files(folder: Path) -> list[Path]:
    """The files that make a checkpoint the model it is: config, index and weights."""
    weights = find_weights(folder)
    return [folder / CONFIG_FILE, *([weights.index] if weights.index else []), *weights.files]


def fetch_weights(folder: Path, fetch: Callable[[list[str]], object]) -> None:
    """Fetch those weights of a repository that the model is read from; its small files are in `folder` already.

    Args:
        fetch: Fetches files of these names into `folder`, and passes over those that the repository does not have.
    """
    if is_artifact(folder):
        fetch(["model.onnx", "model.onnx.data", "model.engine"])
        return
    for single, index in (*_SAFE, *_PICKLED):
        if (folder / index).is_file():
            fetch(_names_in(folder / index))
            return
        fetch([single])
        if (folder / single).is_file():
            return


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds a PEFT adapter, with or without a full model beside it."""
    return (folder / ADAPTER_CONFIG_FILE).is_file()


def _indexed_files(index: Path) -> tuple[Path, ...]:
    """The files that an index of weights names.

    Raises:
        StreamlineError: it is broken, or names a file that is not there or lies in another folder.
    """
    files = tuple(index.parent / name for name in _names_in(index))
    for file in files:
        if not file.is_file():
            raise StreamlineError(f"{index}: names {file.name!r}, which is not there")
    return files


def _names_in(index: Path) -> list[str]:
    try:
        names = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
        files = sorted({str(name) for name in names})
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        raise StreamlineError(f"{index}: is not an index of weights, it has no usable weight_map") from None
    for name in files:
        if Path(name).name != name:
            raise StreamlineError(f"{index}: names {name!r}; weights must lie in the checkpoint's own folder")
    if not files:
        raise StreamlineError(f"{index}: names no file of weights")
    return files


def _whole(files: tuple[Path, ...]) -> tuple[Path, ...]:
    for file in files:
        with file.open("rb") as stream:
            start = stream.read(_POINTER_SIZE)
        if not start:
            raise StreamlineError(f"{file}: is empty; fetch it again")
        if len(start) < _POINTER_SIZE and start.startswith(_POINTER):
            raise StreamlineError(
                f"{file}: is a Git LFS pointer, not the weights; run `git lfs pull` in its repository"
            )
    return files


def _safe_tensors(file: Path) -> Iterator[StoredTensor]:
    try:
        with safe_open(file, framework="numpy") as tensors:
            for name in sorted(tensors.keys()):
                part: Any = tensors.get_slice(name)
                yield StoredTensor(name, str(part.get_dtype()), tuple(part.get_shape()))
    except SafetensorError as error:
        raise StreamlineError(f"{file}: is not a whole safetensors file ({error})") from None


def _pickled_tensors(file: Path) -> Iterator[StoredTensor]:
    # `weights_only` refuses everything that is not tensors and plain containers: no code of the file's runs.
    state: dict[str, torch.Tensor] = torch.load(file, map_location="meta", weights_only=True)
    for name, value in state.items():
        kind = _TYPES.get(value.dtype, str(value.dtype).removeprefix("torch.").upper())
        yield StoredTensor(name, kind, tuple(value.shape))

"""Merge a PEFT adapter into its base model and save the result as an ordinary checkpoint.

`ModelSource.folder` does this for every adapter, so that the rest of the program reads only full checkpoints.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import SAFETENSORS_WEIGHTS_NAME, PeftType
from safetensors import safe_open
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from optimum.streamline.errors import StreamlineError, first_line
from optimum.streamline.models.quantization_config import quantization_name

from .hub import fetch_checkpoint
from .tokenizer_files import has_tokenizer
from .transformers4_config import add_older_names
from .transformers4_tokenizer import save_tokenizer
from .weight_files import ADAPTER_CONFIG_FILE, CONFIG_FILE, has_safetensors, is_adapter

# The names under which an adapter file may hold a whole embedding, beside the weights that it trained.
_WHOLE = ("weight", "base_layer.weight", "modules_to_save.weight", "original_module.weight")
# The largest allowed logit difference, as a share of the largest logit. Merging changes the order of fp32 additions,
# which causes less; an adapter that was lost or applied twice causes more.
_TOLERANCE = 1e-3
_COMPARED_TOKENS = 64


@dataclass(frozen=True)
class _Adapter:
    """What is known of an adapter before its base is loaded.

    Args:
        folder: The adapter's folder.
        kind: Its `peft_type`, such as `LORA`.
        base: Its `base_model_name_or_path`; `None` if it names none.
        revision: The Hub revision of the base; `None` for the main branch.
        shapes: The shape of each of its weights, by name.
    """

    folder: Path
    kind: str
    base: str | None
    revision: str | None
    shapes: dict[str, tuple[int, ...]]

    def error(self, fault: str, error: Exception | None = None) -> StreamlineError:
        """An error about this adapter, which quotes `error` if one is given."""
        return StreamlineError(f"adapter {self.folder}: {fault}" + (f" ({first_line(error)})" if error else ""))


def merged_adapter(
    folder: Path, into: Path, *, cache_dir: str | None = None, trust_remote_code: bool = False
) -> tuple[str, str | None]:
    """Merge an adapter into its base in fp32, and write a checkpoint in the base's dtype.

    The base is the full model in the adapter's own folder if there is one, otherwise the model that
    `adapter_config.json` names. The tokenizer is the adapter's own if it has one, otherwise the base's. If neither has
    one, none is written.

    Args:
        folder: The adapter's local folder.
        into: The folder to write.
        cache_dir: Cache folder for Hub downloads; by default the one of transformers.
        trust_remote_code: Whether code from the base checkpoint may run.

    Returns:
        Name and revision of the base. The name is `folder` itself if the base is in it.

    Raises:
        StreamlineError: peft cannot merge this type of adapter; its weights are missing, pickled, or for another model;
            its base cannot be loaded; or the merged model's logits differ from those of base and adapter together.
    """
    adapter = _read_adapter(folder)
    with _locate_base(adapter) as (name, location):
        options: dict[str, Any] = {"cache_dir": cache_dir, "trust_remote_code": trust_remote_code}
        revision = None if os.path.exists(name) else adapter.revision
        base_folder = location if os.path.exists(location) else _fetched_base(adapter, name, cache_dir)
        base = _load_base(adapter, name, base_folder, options)
        stored_dtype = base.dtype
        merged = _merge(adapter, base.float().eval())
        tokenizer = _tokenizer(adapter, base_folder, merged, options)
    module: nn.Module = merged  # for mypy: the `to` of PreTrainedModel is not typed
    module.to(stored_dtype)
    merged.config.dtype = stored_dtype
    merged.save_pretrained(into)
    add_older_names(into)
    if tokenizer is not None:
        save_tokenizer(tokenizer, into)
    return name, revision


def _fetched_base(adapter: _Adapter, name: str, cache_dir: str | None) -> str:
    """Download the base model; returns its local folder."""
    try:
        return str(fetch_checkpoint(name, cache_dir, adapter.revision))
    except StreamlineError as error:
        raise adapter.error(f"its base {name!r} cannot be loaded", error) from None


def _read_adapter(folder: Path) -> _Adapter:
    """Read `adapter_config.json` and the shapes of the weights."""
    try:
        fields = json.loads((folder / ADAPTER_CONFIG_FILE).read_text(encoding="utf-8"))
        kind = PeftType(fields["peft_type"])
        tuner = PEFT_TYPE_TO_TUNER_MAPPING[kind]
    except (OSError, ValueError, KeyError, TypeError):
        raise StreamlineError(
            f"adapter {folder}: {ADAPTER_CONFIG_FILE} names no peft_type that this peft knows"
        ) from None
    if not issubclass(tuner, BaseTuner):
        raise StreamlineError(f"adapter {folder}: peft_type {kind.value} changes no weights, and cannot be merged")
    base = fields.get("base_model_name_or_path")
    return _Adapter(
        folder, kind.value, base if isinstance(base, str) else None, fields.get("revision"), _shapes(folder)
    )


def _shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """The shape of each weight in an adapter's safetensors file, by name."""
    file = folder / SAFETENSORS_WEIGHTS_NAME
    if not file.is_file():
        raise StreamlineError(
            f"adapter {folder}: has no {file.name}; save the adapter in safetensors, a pickle is not read"
        )
    try:
        with safe_open(file, "pt") as tensors:
            return {key: tuple(tensors.get_slice(key).get_shape()) for key in tensors.keys()}  # noqa: SIM118
    except Exception as error:  # safetensors raises exceptions of its own
        raise StreamlineError(f"adapter {folder}: {file.name} cannot be read ({first_line(error)})") from None


@contextmanager
def _locate_base(adapter: _Adapter) -> Iterator[tuple[str, str]]:
    """The name of the base, and the folder or Hub id to load it from.

    If the base is in the adapter's own folder, the second is a temporary folder without the adapter's files.
    """
    folder, named = adapter.folder, adapter.base
    if (folder / CONFIG_FILE).is_file() and has_safetensors(folder):
        with TemporaryDirectory() as base_only:
            # If the adapter's files were there, transformers would load the base that they name instead.
            for file in folder.iterdir():
                if not file.name.startswith("adapter_"):
                    (Path(base_only) / file.name).symlink_to(file.resolve())
            yield str(folder), base_only
        return
    if not named:
        raise adapter.error(f"{ADAPTER_CONFIG_FILE} names no base_model_name_or_path; write it there")
    if not Path(named).exists() and (Path(named).is_absolute() or named.startswith(".")):
        raise adapter.error(f"its base {named!r} does not exist; write the folder or Hub id into {ADAPTER_CONFIG_FILE}")
    if is_adapter(Path(named)):
        raise adapter.error(f"its base {named!r} is an adapter; merge that first, and name the result")
    yield named, named


def _load_base(adapter: _Adapter, name: str, folder: str, options: dict[str, Any]) -> PreTrainedModel:
    """Load the base model in its own dtype."""
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", use_safetensors=True, **options)
    except Exception as error:  # safetensors and transformers raise exceptions of their own
        raise adapter.error(f"its base {name!r} cannot be loaded", error) from None
    base: PreTrainedModel = loaded
    if quantization_name(base.config) is not None:
        raise adapter.error(f"its base {name!r} is quantized; name the float model as its base")
    return base


def _merge(adapter: _Adapter, base: PreTrainedModel) -> PreTrainedModel:
    """Merge the adapter into the base, and check that the logits stay the same."""
    embedding: Any = base.get_input_embeddings()
    head: Any = base.get_output_embeddings()
    adapted = _load_on_base(adapter, base)
    ids = torch.linspace(0, embedding.weight.shape[0] - 1, _COMPARED_TOKENS).long()[None]
    tied = head is not None and head.weight is embedding.weight
    try:
        before = _logits(adapted, ids)
        if tied:  # untie them first, or merging into one would change the other
            head.weight = nn.Parameter(head.weight.detach().clone())
        merged: PreTrainedModel = adapted.merge_and_unload(safe_merge=True)
    except Exception as error:  # peft raises different exceptions for different types
        raise adapter.error(f"peft cannot merge this {adapter.kind}", error) from None
    if tied:
        _tie_where_equal(merged)
    difference = (_logits(merged, ids) - before).abs().max()
    if not difference <= _TOLERANCE * before.abs().max():
        raise adapter.error(f"merged, this {adapter.kind} computes something else: a logit differs by {difference:.2g}")
    return merged


def _load_on_base(adapter: _Adapter, base: PreTrainedModel) -> PeftModel:
    """Load the adapter on its base. The embeddings are resized first if the adapter has more tokens."""
    embeddings = (base.get_input_embeddings(), base.get_output_embeddings())
    names = [name for name, module in base.named_modules() if any(module is each for each in embeddings)]
    whole = adapter.shapes.keys() & {f"base_model.model.{name}.{each}" for name in names for each in _WHOLE}
    try:
        for rows in {adapter.shapes[key][0] for key in whole} - {_weight(embeddings[0]).shape[0]}:
            base.resize_token_embeddings(rows, mean_resizing=False)
        adapted = PeftModel.from_pretrained(base, str(adapter.folder), torch_device="cpu").eval()
    except Exception as error:  # peft checks little before it fails
        raise adapter.error("cannot be loaded on its base", error) from None
    # peft ignores weights that fit no module, and leaves a module without weights as it was initialized.
    expected = set(get_peft_model_state_dict(adapted, save_embedding_layers=False))
    if strange := sorted((expected ^ adapter.shapes.keys()) - whole):
        raise adapter.error(f"its weights do not match the layers of its base, first {strange[0]!r}")
    return adapted


def _tie_where_equal(model: PreTrainedModel) -> None:
    """Tie the output embedding to the input embedding again if both are still equal, in place."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    equal = torch.equal(_weight(embedding), _weight(head))
    if equal:
        head.weight = _weight(embedding)
    model.config.tie_word_embeddings = equal


def _weight(embedding: Any) -> nn.Parameter:
    """The weight of an embedding, with its type for mypy."""
    weight: nn.Parameter = embedding.weight
    return weight


def _logits(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """The logits `[1, tokens, vocabulary]` of token ids `[1, tokens]`."""
    with torch.inference_mode():
        logits: torch.Tensor = model(input_ids=ids).logits
    return logits


def _tokenizer(
    adapter: _Adapter, base_folder: str, model: PreTrainedModel, options: dict[str, Any]
) -> PreTrainedTokenizerBase | None:
    """The adapter's tokenizer, or else the base's; `None` if neither can be loaded."""
    own = has_tokenizer(adapter.folder)
    folder = str(adapter.folder) if own else base_folder
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder, config=model.config, **options)
    except Exception as error:
        if own:
            raise adapter.error("its tokenizer cannot be read", error) from None
        return None
    return tokenizer

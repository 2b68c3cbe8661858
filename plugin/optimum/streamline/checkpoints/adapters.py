"""PEFT adapters as models: merged into their base, which makes them the plain checkpoints that all else reads.

Reads and writes by itself, so that what reads checkpoints can ask it.
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

# What an adapter may hold of an embedding, whole, beside what it learned.
_WHOLE = ("weight", "base_layer.weight", "modules_to_save.weight", "original_module.weight")
# Of the largest logit: fp32 sums in another order differ by less, and an adapter that was lost or doubled by more.
_TOLERANCE = 1e-3
_COMPARED_TOKENS = 64


@dataclass(frozen=True)
class _Adapter:
    """An adapter's folder, its type, its base's name and revision, and the shapes of its weights by name."""

    folder: Path
    kind: str
    base: str | None
    revision: str | None
    shapes: dict[str, tuple[int, ...]]

    def error(self, fault: str, error: Exception | None = None) -> StreamlineError:
        return StreamlineError(f"adapter {self.folder}: {fault}" + (f" ({first_line(error)})" if error else ""))


def merged_adapter(
    folder: Path, into: Path, *, cache_dir: str | None = None, trust_remote_code: bool = False
) -> tuple[str, str | None]:
    """Merge an adapter into its base, in fp32, and write a plain checkpoint in the base's own dtype.

    The base is the full model in the same folder, if there is one, else what `base_model_name_or_path` names. The
    tokenizer is the adapter's own, if it has one, else the base's; where neither has one, none is written.

    Args:
        folder: The adapter's, on this machine.
        into: The folder to write.
        cache_dir: Where Hub downloads are kept; transformers' own place by default.
        trust_remote_code: Whether code from the base may run.

    Returns:
        Name and revision of the base: the folder itself, or the model and revision that `adapter_config.json` names.

    Raises:
        StreamlineError: the adapter is of a type that does not merge, its weights are a pickle, missing or another
            model's, its base cannot be read, or the merged model does not compute what the adapter does.
    """
    adapter = _read_adapter(folder)
    with _place_of_base(adapter) as (name, place):
        options: dict[str, Any] = {"cache_dir": cache_dir, "trust_remote_code": trust_remote_code}
        revision = None if os.path.exists(name) else adapter.revision
        where = place if os.path.exists(place) else _fetched_base(adapter, name, cache_dir)
        base = _load_base(adapter, name, where, options)
        stored = base.dtype
        merged = _merge(adapter, base.float().eval())
        tokenizer = _tokenizer(adapter, where, merged, options)
    module: nn.Module = merged  # transformers' own `to` carries no types
    module.to(stored)
    merged.config.dtype = stored
    merged.save_pretrained(into)
    add_older_names(into)
    if tokenizer is not None:
        save_tokenizer(tokenizer, into)
    return name, revision


def _fetched_base(adapter: _Adapter, name: str, cache_dir: str | None) -> str:
    try:
        return str(fetch_checkpoint(name, cache_dir, adapter.revision))
    except StreamlineError as error:
        raise adapter.error(f"its base {name!r} cannot be loaded", error) from None


def _read_adapter(folder: Path) -> _Adapter:
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
    file = folder / SAFETENSORS_WEIGHTS_NAME
    if not file.is_file():
        raise StreamlineError(f"adapter {folder}: has no {file.name}, and a pickle is not read; save it as that")
    try:
        with safe_open(file, "pt") as tensors:
            return {key: tuple(tensors.get_slice(key).get_shape()) for key in tensors.keys()}  # noqa: SIM118
    except Exception as error:  # safetensors raises its own
        raise StreamlineError(f"adapter {folder}: {file.name} cannot be read ({first_line(error)})") from None


@contextmanager
def _place_of_base(adapter: _Adapter) -> Iterator[tuple[str, str]]:
    """What the base is called, and what it is loaded from: a folder without the adapter's files, or a Hub id."""
    folder, named = adapter.folder, adapter.base
    if (folder / CONFIG_FILE).is_file() and has_safetensors(folder):
        with TemporaryDirectory() as place:
            for file in folder.iterdir():  # beside an adapter transformers reads another base than this
                if not file.name.startswith("adapter_"):
                    (Path(place) / file.name).symlink_to(file.resolve())
            yield str(folder), place
        return
    if not named:
        raise adapter.error(f"{ADAPTER_CONFIG_FILE} names no base_model_name_or_path; write it there")
    if not Path(named).exists() and (Path(named).is_absolute() or named.startswith(".")):
        raise adapter.error(f"its base {named!r} is not there; write the folder or Hub id into {ADAPTER_CONFIG_FILE}")
    if is_adapter(Path(named)):
        raise adapter.error(f"its base {named!r} is an adapter; merge that first, and name the result")
    yield named, named


def _load_base(adapter: _Adapter, name: str, place: str, options: dict[str, Any]) -> PreTrainedModel:
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(place, dtype="auto", use_safetensors=True, **options)
    except Exception as error:  # safetensors and the Hub client each raise their own
        raise adapter.error(f"its base {name!r} cannot be loaded", error) from None
    base: PreTrainedModel = loaded
    if quantization_name(base.config) is not None:
        raise adapter.error(f"its base {name!r} is quantized; name the one in float as its base")
    return base


def _merge(adapter: _Adapter, base: PreTrainedModel) -> PreTrainedModel:
    embedding: Any = base.get_input_embeddings()
    head: Any = base.get_output_embeddings()
    adapted = _put_on(adapter, base)
    ids = torch.linspace(0, embedding.weight.shape[0] - 1, _COMPARED_TOKENS).long()[None]
    tied = head is not None and head.weight is embedding.weight
    try:
        before = _logits(adapted, ids)
        if tied:  # or what is merged into one would change the other
            head.weight = nn.Parameter(head.weight.detach().clone())
        merged: PreTrainedModel = adapted.merge_and_unload(safe_merge=True)
    except Exception as error:  # of a type, or a use of one, that peft cannot merge
        raise adapter.error(f"peft cannot merge this {adapter.kind}", error) from None
    if tied:
        _tie_where_equal(merged)
    difference = (_logits(merged, ids) - before).abs().max()
    if not difference <= _TOLERANCE * before.abs().max():
        raise adapter.error(f"merged, this {adapter.kind} computes something else, by {difference:.2g} in a logit")
    return merged


def _put_on(adapter: _Adapter, base: PreTrainedModel) -> PeftModel:
    """The base with the adapter, and with room for the tokens of one that holds embeddings of its own."""
    embeddings = (base.get_input_embeddings(), base.get_output_embeddings())
    names = [name for name, module in base.named_modules() if any(module is each for each in embeddings)]
    whole = adapter.shapes.keys() & {f"base_model.model.{name}.{each}" for name in names for each in _WHOLE}
    try:
        for rows in {adapter.shapes[key][0] for key in whole} - {_weight(embeddings[0]).shape[0]}:
            base.resize_token_embeddings(rows, mean_resizing=False)
        adapted = PeftModel.from_pretrained(base, str(adapter.folder), torch_device="cpu").eval()
    except Exception as error:  # of peft, which checks little itself
        raise adapter.error("cannot be put on its base", error) from None
    # peft leaves out weights that have no place, and leaves places that have no weights as they were made.
    expected = set(get_peft_model_state_dict(adapted, save_embedding_layers=False))
    if strange := sorted((expected ^ adapter.shapes.keys()) - whole):
        raise adapter.error(f"its weights are not those of its base's layers, first {strange[0]!r}")
    return adapted


def _tie_where_equal(model: PreTrainedModel) -> None:
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    equal = torch.equal(_weight(embedding), _weight(head))
    if equal:
        head.weight = _weight(embedding)
    model.config.tie_word_embeddings = equal


def _weight(embedding: Any) -> nn.Parameter:
    weight: nn.Parameter = embedding.weight
    return weight


def _logits(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        logits: torch.Tensor = model(input_ids=ids).logits
    return logits


def _tokenizer(
    adapter: _Adapter, place: str, model: PreTrainedModel, options: dict[str, Any]
) -> PreTrainedTokenizerBase | None:
    own = has_tokenizer(adapter.folder)
    if own:
        place = str(adapter.folder)
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(place, config=model.config, **options)
    except Exception as error:
        if own:
            raise adapter.error("its tokenizer cannot be read", error) from None
        return None
    return tokenizer

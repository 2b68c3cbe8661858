"""Writing a pruned model as a checkpoint with its record and its card, read back before it is delivered."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from optimum.streamline.checkpoints.loading import read_config
from optimum.streamline.checkpoints.model_in_memory import ModelInMemory
from optimum.streamline.checkpoints.provenance import write_record
from optimum.streamline.checkpoints.read_back import read_back, release_weights
from optimum.streamline.checkpoints.saving import save_model
from optimum.streamline.model_files.remote_code import carry_code
from optimum.streamline.models.module_patterns import renumbered_names
from optimum.streamline.quantization.loading import check_quantizable, load_quantizing
from optimum.streamline.quantization.quantizers import QUANTIZERS
from optimum.streamline.reporting.model_card import CARD_FILE, model_card
from optimum.streamline.reporting.record import PruningRecord
from optimum.streamline.system.notify import Notify

from .prepared import Prepared
from .quantize import write_quantization


def write_checkpoint(prepared: Prepared, record: PruningRecord, folder: Path, notify: Notify) -> PruningRecord:
    """Write weights, tokenizer, `streamline.json` and the card into `folder`, and read the checkpoint back.

    Args:
        prepared: Its model is the pruned one, which is of no use afterwards.
        record: What was done to the model.

    Returns:
        The record, with how the folder compared with the model in memory.

    Raises:
        ParityError: what was written is not the model.
        StreamlineError: a weight is not finite in the type that it is stored in.
    """
    record = replace(record, read_back=_save(prepared, record, folder, notify))
    write_record(record.to_dict(), folder)
    (folder / CARD_FILE).write_text(model_card(record), encoding="utf-8")
    return record


def _save(prepared: Prepared, record: PruningRecord, folder: Path, notify: Notify) -> dict[str, Any]:
    """Write the model, quantized if that comes last, and read it back; returns what `read_back` does."""
    source, recipe, model = prepared.source, prepared.recipe, prepared.model
    quantizes = recipe.quantization.quantizer in QUANTIZERS
    if quantizes and not recipe.quantize_first:
        in_float = check_quantizable(read_config(source), recipe.quantization.quantizer, recipe.excluded)
        now = [new for new, _ in renumbered_names(in_float, [place.originals for place in record.change.new_layers])]
        with TemporaryDirectory(dir=folder) as scratch:
            save_model(model, prepared.tokenizer, prepared.stored, Path(scratch))
            release_weights(model)
            model = load_quantizing(source.with_model(scratch), recipe.quantization.quantizer, now, recipe.device)
    save_model(model, prepared.tokenizer, None if quantizes else prepared.stored, folder)
    if not isinstance(source, ModelInMemory):  # transformers writes the code of a model in memory itself
        carry_code(source, folder)
    if quantizes:
        notify(write_quantization(model, source, recipe.quantization.quantizer, recipe.excluded, folder))
    ids = None if prepared.calibration is None else prepared.calibration.ids
    start = time.monotonic()
    found = read_back(folder, model, prepared.tokenizer, ids, source.trust_remote_code)
    prepared.seconds["read back"] = time.monotonic() - start
    return found

"""Write a pruned model as a checkpoint with its record and model card, and read it back before it is delivered."""

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
from optimum.streamline.editing.apply import renamed_modules
from optimum.streamline.model_files.remote_code import carry_code
from optimum.streamline.quantization.loading import check_quantizable, load_quantizing
from optimum.streamline.quantization.quantizers import QUANTIZERS
from optimum.streamline.reporting.model_card import CARD_FILE, model_card
from optimum.streamline.reporting.record import PruningRecord
from optimum.streamline.system.notify import Notify

from .planning import Prepared
from .quantize import write_quantization


def write_checkpoint(prepared: Prepared, record: PruningRecord, folder: Path, notify: Notify) -> PruningRecord:
    """Write weights, tokenizer, `streamline.json` and the model card into `folder`, and read the checkpoint back.

    Args:
        prepared: Holds the pruned model. Do not use the model afterwards: its weights may be cast or freed.
        record: What was done to the model.
        folder: The folder to write.
        notify: Gets one line on the modules left in float, if the checkpoint is quantized.

    Returns:
        The record, completed by the comparison of the checkpoint with the model in memory.

    Raises:
        ParityError: the checkpoint computes something else than the model in memory.
        StreamlineError: a weight is not finite in the type in which it is stored.
    """
    record = replace(record, read_back=_save(prepared, record, folder, notify))
    write_record(record.to_dict(), folder)
    (folder / CARD_FILE).write_text(model_card(record), encoding="utf-8")
    return record


def _save(prepared: Prepared, record: PruningRecord, folder: Path, notify: Notify) -> dict[str, Any]:
    """Write the model, quantize it if the recipe quantizes last, and return the result of `read_back`."""
    source, recipe, model = prepared.source, prepared.recipe, prepared.model
    quantizes = recipe.quantization.quantizer in QUANTIZERS
    if quantizes and not recipe.quantize_first:
        in_float = check_quantizable(read_config(source), recipe.quantization.quantizer, recipe.excluded)
        kept = [new for new, _ in renamed_modules(in_float, record.change.new_layers, model.config)]
        with TemporaryDirectory(dir=folder) as scratch:
            save_model(model, prepared.tokenizer, prepared.stored, Path(scratch))
            release_weights(model)
            model = load_quantizing(source.with_model(scratch), recipe.quantization.quantizer, kept, recipe.device)
    save_model(model, prepared.tokenizer, None if quantizes else prepared.stored, folder)
    if not isinstance(source, ModelInMemory):  # for a model in memory, transformers writes the code itself
        carry_code(source, folder)
    if quantizes:
        notify(write_quantization(model, source, recipe.quantization.quantizer, recipe.excluded, folder))
    ids = None if prepared.calibration is None else prepared.calibration.ids
    start = time.monotonic()
    found = read_back(folder, model, prepared.tokenizer, ids, source.trust_remote_code)
    prepared.seconds["read back"] = time.monotonic() - start
    return found

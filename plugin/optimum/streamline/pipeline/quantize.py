"""Quantize a checkpoint: load it with a quantizer, save it, and write what was quantized.

This file prunes nothing. `write_checkpoint.py` calls `write_quantization` for a pruned model.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
import transformers
from transformers import PreTrainedModel

from optimum.streamline.checkpoints.loading import check_checkpoint, check_device, load_tokenizer, source_notes
from optimum.streamline.checkpoints.provenance import changed_files, write_record
from optimum.streamline.checkpoints.read_back import read_back
from optimum.streamline.checkpoints.record_file import read_record
from optimum.streamline.checkpoints.saving import save_model
from optimum.streamline.model_files.remote_code import carry_code
from optimum.streamline.model_files.source import ModelSource, fingerprint
from optimum.streamline.model_files.weight_files import find_weights
from optimum.streamline.models.linear_modules import linear_modules_of, meta_model
from optimum.streamline.models.quantization_config import float_config
from optimum.streamline.models.quantized_weights import quantized_modules
from optimum.streamline.quantization.loading import check_quantizable, load_quantizing
from optimum.streamline.quantization.quantizers import QUANTIZERS
from optimum.streamline.reporting.model_card import CARD_FILE, quantized_card
from optimum.streamline.system.atomic_output import staged_folder
from optimum.streamline.system.environment import package_version
from optimum.streamline.system.library_logs import LOG_FILE, captured_logs
from optimum.streamline.system.notify import Notify

QUANTIZATION_FILE = "quantization.json"


def quantize(
    source: ModelSource,
    out: Path,
    quantizer: str,
    exclude: Sequence[str] = (),
    *,
    device: str = "cpu",
    overwrite: bool = False,
    verbose: bool = False,
    notify: Notify = print,
) -> None:
    """Write the quantized checkpoint `out`. The folder appears only when it is complete.

    Args:
        source: The float checkpoint.
        out: The folder to write.
        quantizer: A key of `QUANTIZERS`.
        exclude: Patterns of the modules that stay in float (`models.module_patterns`).
        device: `cpu` or `cuda`. The weights are quantized there; `torchao-int4` packs them for this device.
        overwrite: Whether an earlier output in `out` is replaced.
        verbose: Whether messages of other libraries go to the terminal, instead of to `streamline.log` in `out`.
        notify: Gets one line for each finding.

    Raises:
        StreamlineError: the model or the quantizer cannot be used, or `out` cannot be written.
    """
    check_device(device)
    config = check_checkpoint(source)
    for line in source_notes(source, config):
        notify(line)
    kept = check_quantizable(config, quantizer, exclude)
    with staged_folder(out, (source.model,), overwrite) as folder, captured_logs(folder / LOG_FILE, verbose):
        tokenizer = load_tokenizer(source)
        model = load_quantizing(source, quantizer, kept, device)
        save_model(model, tokenizer, None, folder)
        carry_code(source, folder)
        in_float = write_quantization(model, source, quantizer, exclude, folder)
        _write_companions(source, quantizer, folder)
        read_back(folder, model, tokenizer, None, source.trust_remote_code)
        before, after = (find_weights(each).bytes / 1e6 for each in (source.folder, folder))
    notify(f"quantized ({quantizer}): {before:.1f} MB became {after:.1f} MB")
    notify(in_float)
    notify(f"saved {out}")


def write_quantization(
    model: PreTrainedModel, source: ModelSource, quantizer: str, exclude: Sequence[str], folder: Path
) -> str:
    """Write `quantization.json`: the quantizer, how many modules were quantized, and which stayed in float.

    Args:
        model: The quantized model.
        source: The float original. Layer numbers in `exclude` are numbers of its layers.
        quantizer: A key of `QUANTIZERS`.
        exclude: Patterns of the modules that stay in float.
        folder: The folder of the checkpoint.

    Returns:
        One line on the modules that stayed in float.
    """
    quantized = set(quantized_modules(model))
    linear_modules = linear_modules_of(meta_model(float_config(model.config)))
    in_float = [name for name in linear_modules if name not in quantized]
    weights = sum(module.weights for module in linear_modules.values())
    share = sum(linear_modules[name].weights for name in in_float) / weights
    fields = {
        "quantize": quantizer,
        "quantize_exclude": list(exclude),
        "source": {"model": source.model, "commit": source.commit, "fingerprint": fingerprint(source)},
        "quantized": len(quantized),
        "float": in_float,
        "float_share": round(share, 4),
        "versions": {
            "optimum-streamline": package_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }
    (folder / QUANTIZATION_FILE).write_text(json.dumps(fields, indent=1) + "\n")
    return f"left in float: {_listed(in_float, linear_modules)} ({share:.1%} of the weights of all linear modules)"


def _listed(names: Iterable[str], every: Iterable[str]) -> str:
    """Module names in one line. Names that differ only in numbers become one, with `(N of M)` if some are missing.

    Args:
        names: The names to list.
        every: The names of all modules.
    """
    found, all_of_kind = (Counter(re.sub(r"\.\d+(?=\.|$)", ".*", name) for name in each) for each in (names, every))
    counted = (
        kind if count == all_of_kind[kind] else f"{kind} ({count} of {all_of_kind[kind]})"
        for kind, count in found.items()
    )
    return ", ".join(counted) or "nothing"


def _write_companions(source: ModelSource, quantizer: str, folder: Path) -> None:
    """Write the model card of a quantized checkpoint, and copy the record of the float checkpoint if it has one."""
    record = read_record(str(source.folder))
    if record is not None:
        edited = [f"before it was quantized, {each}" for each in changed_files(source) or ()]
        write_record({**record, "edited": edited}, folder)
    card = source.folder / CARD_FILE
    text = card.read_text(encoding="utf-8") if card.is_file() else None
    (folder / CARD_FILE).write_text(quantized_card(source, QUANTIZERS[quantizer].description, text), encoding="utf-8")

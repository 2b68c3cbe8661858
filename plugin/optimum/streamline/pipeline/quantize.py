"""Quantize a checkpoint: load it with a quantizer of `quantization/quantizers.py`, save it, and report what was done.

Knows nothing of layers being removed; `prune.py` calls this before or after.
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
    how: str,
    exclude: Sequence[str] = (),
    *,
    device: str = "cpu",
    overwrite: bool = False,
    verbose: bool = False,
    notify: Notify = print,
) -> None:
    """Make the quantized checkpoint `out`: whole, or not at all.

    Args:
        how: A key of `quantizers.QUANTIZERS`.
        exclude: What to leave in float: numbers of layers, and names of modules in which `*` stands for anything.
        device: Where it is quantized, and for `torchao-int4` where it can be run.

    Raises:
        StreamlineError: the model or the quantizer cannot be used, or `out` cannot be written.
    """
    check_device(device)
    config = check_checkpoint(source)
    for line in source_notes(source, config):
        notify(line)
    kept = check_quantizable(config, how, exclude)
    with staged_folder(out, (source.model,), overwrite) as folder, captured_logs(folder / LOG_FILE, verbose):
        tokenizer = load_tokenizer(source)
        model = load_quantizing(source, how, kept, device)
        save_model(model, tokenizer, None, folder)
        carry_code(source, folder)
        in_float = write_quantization(model, source, how, exclude, folder)
        _write_companions(source, how, folder)
        read_back(folder, model, tokenizer, None, source.trust_remote_code)
        before, after = (find_weights(each).bytes / 1e6 for each in (source.folder, folder))
    notify(f"quantized ({how}): {before:.1f} MB became {after:.1f} MB")
    notify(in_float)
    notify(f"saved {out}")


def write_quantization(
    model: PreTrainedModel, source: ModelSource, how: str, exclude: Sequence[str], folder: Path
) -> str:
    """Write `quantization.json`: what was quantized, by what, and what was not.

    Args:
        source: The float model that was given, whose layers' numbers those in `exclude` are.

    Returns:
        A line on what stayed in float.
    """
    quantized = set(quantized_modules(model))
    products = linear_modules_of(meta_model(float_config(model.config)))
    in_float = [name for name in products if name not in quantized]
    share = sum(products[name].weights for name in in_float) / sum(each.weights for each in products.values())
    fields = {
        "quantize": how,
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
    return f"left in float: {_listed(in_float, products)} ({share:.1%} of the weights that are multiplied by)"


def _listed(names: Iterable[str], every: Iterable[str]) -> str:
    """Names of modules, those that differ by their layers' numbers as one, with how many of these they are."""
    found, all_of_kind = (Counter(re.sub(r"\.\d+(?=\.|$)", ".*", name) for name in each) for each in (names, every))
    counted = (
        kind if count == all_of_kind[kind] else f"{kind} ({count} of {all_of_kind[kind]})"
        for kind, count in found.items()
    )
    return ", ".join(counted) or "nothing"


def _write_companions(source: ModelSource, how: str, folder: Path) -> None:
    """Write the card of a quantized checkpoint, and keep the record of its making if there is one."""
    made = source.folder
    record = read_record(str(made))
    if record is not None:
        edited = [f"before it was quantized, {each}" for each in changed_files(source) or ()]
        write_record({**record, "edited": edited}, folder)
    card = made / CARD_FILE
    text = card.read_text(encoding="utf-8") if card.is_file() else None
    (folder / CARD_FILE).write_text(quantized_card(source, QUANTIZERS[how].description, text), encoding="utf-8")

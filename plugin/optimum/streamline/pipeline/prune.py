"""From a checkpoint and a recipe to a shallower checkpoint: load, score, plan, heal, edit, save.

Reads as prose; each step lives in its own file. Knows neither exports nor validation.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from optimum.streamline.checkpoints.loading import (
    DTYPES,
    load_stock,
    load_tokenizer,
    read_config,
    source_notes,
    stored_dtype,
)
from optimum.streamline.checkpoints.provenance import write_record
from optimum.streamline.checkpoints.read_back import read_back, release
from optimum.streamline.checkpoints.remote_code import carry_code
from optimum.streamline.checkpoints.saving import save_model
from optimum.streamline.checkpoints.source import ModelSource, fingerprint
from optimum.streamline.editing.apply import EditInputs, build_replacement, planned_config
from optimum.streamline.editing.plan import Plan
from optimum.streamline.errors import StreamlineError
from optimum.streamline.healing.stages import Healer, HealingResult
from optimum.streamline.healing.training_checkpoints import healing_workspace, open_workspace
from optimum.streamline.methods.base import MethodInputs
from optimum.streamline.methods.registry import method_of
from optimum.streamline.models.bare_layers import NEEDS_LOAD, bare_layers
from optimum.streamline.models.module_patterns import followed
from optimum.streamline.models.quantization_config import quantization_name
from optimum.streamline.models.skipped_sublayers import layers_without_attention
from optimum.streamline.quantization.loading import check_quantizable, load_quantizing
from optimum.streamline.quantization.quantizers import QUANTIZERS
from optimum.streamline.recipe.recipe import Recipe
from optimum.streamline.reporting.model_card import CARD_FILE, model_card
from optimum.streamline.reporting.record import PruningRecord
from optimum.streamline.scoring.similarity import Scores, measure_scores
from optimum.streamline.system.atomic_output import claimed_by_main, staged_by_main
from optimum.streamline.system.distributed import from_main, is_main, join_processes
from optimum.streamline.system.environment import package_version
from optimum.streamline.system.library_logs import LOG_FILE, captured_logs
from optimum.streamline.text.windows import Windows, seen_text

from .preflight import _checked_config, check_recipe, refuse_unpacking
from .quantize import write_quantization
from .texts import _heal_text, _text_of_choice, _windows, inputs_of

Notify = Callable[[str], None]
Score = Callable[[Windows], Scores]


@dataclass
class Prepared:
    """A model, its scores and the plan for it, before any weight moves.

    Args:
        stored: What the result is stored in; `None` if as it was read, which is how quantized weights stay.
        chosen_on: What the choice is made on: `calibration`, and what plans are compared on where they are.
        heal_text: What is trained on, where something is.
    """

    source: ModelSource
    recipe: Recipe
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    stored: torch.dtype | None
    chosen_on: Windows
    heal_text: Windows | None
    scores: Scores
    plan: Plan
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def calibration(self) -> Windows:
        """What layers are scored, maps fitted and channels measured on: the recipe's `samples` windows."""
        return self.chosen_on.part(0, self.recipe.samples)


def score(source: ModelSource, recipe: Recipe, notify: Notify) -> tuple[Scores, Windows]:
    """Layer importances of a model on the calibration text.

    Raises:
        StreamlineError: a bad model or text.
    """
    config = _checked_config(source, recipe)
    for line in source_notes(source, config):
        notify(line)
    windows = _windows(recipe, load_tokenizer(source), config, recipe.calibration, recipe.samples, "calibration")
    notify(windows.line("calibration"))
    return measure_scores(load_stock(source, torch.float32, recipe.device), windows), windows


def prepare(source: ModelSource, recipe: Recipe, notify: Notify, scored: Score | None = None) -> Prepared:
    """Load a model, score its layers and plan what becomes of them.

    Computation is in fp32 whatever the checkpoint is stored in: a score is a difference of nearly equal numbers.

    Args:
        scored: Scores the layers, if that is not to be done in the model as it is loaded.
    """
    check_recipe(source, recipe)
    notify(f"loading {source.model}")
    start = time.monotonic()
    config = read_config(source)
    for line in source_notes(source, config):
        notify(line)
    tokenizer = load_tokenizer(source)
    chosen_on = _text_of_choice(recipe, tokenizer, config)
    calibration = chosen_on.part(0, recipe.samples)
    held_out = chosen_on.part(recipe.samples, len(chosen_on.ids)) if len(chosen_on.ids) > recipe.samples else None
    # Not needed yet, but a text that cannot be read is better found now than after hours of a greedy search.
    heal_text = _heal_text(recipe, tokenizer, config) if recipe.healing else None
    notify(chosen_on.line("calibration"))
    if heal_text is not None:
        notify(heal_text.line("healing"))
    # Before the model is loaded: there may not be room for what else is loaded to score them.
    begun = time.monotonic()
    scored_elsewhere = scored(calibration) if scored else None
    scoring = time.monotonic() - begun
    quantizes = recipe.quantize_first and recipe.quantize in QUANTIZERS
    if quantizes:
        in_float = check_quantizable(config, recipe.quantize, recipe.excluded)
        model = load_quantizing(source, recipe.quantize, in_float, recipe.device)
    else:
        model = load_stock(source, torch.float32, recipe.device)
        refuse_unpacking(model)
    loaded = time.monotonic()
    if scored_elsewhere is None:
        notify(f"scoring {config.num_hidden_layers} layers on {len(calibration.ids)} windows of {recipe.length} tokens")
    scores = scored_elsewhere or measure_scores(model, calibration)
    plan = method_of(recipe, config).plan(recipe, MethodInputs(model, calibration, scores, held_out))
    planned = planned_config(model.config, plan)
    if len(layers_without_attention(planned)) == planned.num_hidden_layers:
        raise StreamlineError("model: no layer with attention would be left; remove fewer, or other layers")
    if plan.tried:
        notify(f"loss on held-out text, nats per token: {_losses(plan)}")
    notify(plan.describe())
    seconds = {"load": loaded - start - scoring, "score": time.monotonic() - loaded + scoring}
    kept = quantizes or quantization_name(config) is not None
    stored = None if kept else DTYPES[recipe.dtype or stored_dtype(source)]
    return Prepared(source, recipe, model, tokenizer, stored, chosen_on, heal_text, scores, plan, seconds)


def _losses(plan: Plan) -> str:
    return ", ".join(f"{name} {'no plan' if loss is None else f'{loss:.4f}'}" for name, loss in plan.tried)


def prune(
    source: ModelSource,
    recipe: Recipe,
    out: Path,
    *,
    overwrite: bool,
    verbose: bool,
    notify: Notify,
    scored: Score | None = None,
) -> PruningRecord:
    """Make the checkpoint `out`: whole, or not at all.

    Args:
        scored: As in `prepare`.
        verbose: Whether other libraries' messages go to the terminal rather than to `api.log`.

    Raises:
        StreamlineError: a bad recipe, model or text, or an output that cannot be written.
    """
    join_processes(recipe.device)
    if not is_main():
        notify = _notify_nobody
    with (
        claimed_by_main(out, inputs_of(source, recipe), overwrite),
        healing_workspace(out, recipe.fingerprint) as workspace,
        staged_by_main(out, overwrite) as staging,
        captured_logs(staging and staging / LOG_FILE, verbose),
    ):
        prepared = prepare(source, recipe, notify, scored)
        # Nearly equal numbers may fall either way on another processor: all train one model.
        prepared.plan = from_main(prepared.plan)
        record = change(prepared, notify, workspace)
        if staging is not None:
            record = replace(record, read_back=_save(prepared, record, staging, notify))
            write_record(record.to_dict(), staging)
            (staging / CARD_FILE).write_text(model_card(record), encoding="utf-8")
    note = f", which {NEEDS_LOAD}" if bare_layers(prepared.model.config) else ""
    notify(f"saved {out}{note}")
    return record


def _save(prepared: Prepared, record: PruningRecord, folder: Path, notify: Notify) -> dict[str, Any]:
    """Write the checkpoint, quantized if that comes last, and read it back; the model is of no use afterwards.

    Returns:
        As `read_back`.

    Raises:
        ParityError: what was written is not the model.
    """
    source, recipe, model = prepared.source, prepared.recipe, prepared.model
    quantizes = recipe.quantize in QUANTIZERS
    if quantizes and not recipe.quantize_first:
        in_float = check_quantizable(read_config(source), recipe.quantize, recipe.excluded)
        now = [new for new, _ in followed(in_float, [place.originals for place in record.change.new_layers])]
        with TemporaryDirectory(dir=folder) as scratch:
            save_model(model, prepared.tokenizer, prepared.stored, Path(scratch))
            release(model)
            model = load_quantizing(source.of(scratch), recipe.quantize, now, recipe.device)
    save_model(model, prepared.tokenizer, None if quantizes else prepared.stored, folder)
    carry_code(source, folder)
    if quantizes:
        notify(write_quantization(model, source, recipe.quantize, recipe.excluded, folder))
    start = time.monotonic()
    found = read_back(folder, model, prepared.tokenizer, prepared.calibration.ids, source.trust_remote_code)
    prepared.seconds["read back"] = time.monotonic() - start
    return found


def _notify_nobody(message: str) -> None:
    """One process speaks for all."""


def change(prepared: Prepared, notify: Notify, workspace: Path | None = None) -> PruningRecord:
    """Heal and edit the prepared model, in place; returns what was done.

    Args:
        workspace: Where trainings keep checkpoints, to go on from after a kill.

    Raises:
        StreamlineError: a training fails.
    """
    recipe, model, plan = prepared.recipe, prepared.model, prepared.plan
    source = fingerprint(prepared.source)
    data = {"calibration": seen_text(prepared.chosen_on)}
    replacement = build_replacement(model, plan, prepared.calibration, recipe.seed)
    healer: Healer | None = None
    if prepared.heal_text is not None:
        data["heal"] = seen_text(prepared.heal_text)
        if workspace is not None and open_workspace(workspace, _workspace_key(prepared, source, prepared.heal_text)):
            notify(f"going on from the checkpoints in {workspace}")
        healer = Healer(recipe, model, plan, prepared.heal_text, notify, workspace)
    start = time.monotonic()
    if healer is not None:
        healer.before_edit(replacement.layer if replacement else None)
    edit_inputs = EditInputs(prepared.calibration, replacement, healer.after_merge if healer else None)
    changed = method_of(recipe, model.config).apply(model, plan, edit_inputs)
    healed: tuple[HealingResult, ...] = ()
    if healer is not None:
        healer.after_edit(changed.new_layers)
        healed = tuple(healer.results)
        prepared.seconds["heal"] = time.monotonic() - start
    return PruningRecord(
        source=prepared.source,
        source_fingerprint=source,
        recipe=recipe,
        scores=prepared.scores,
        plan=plan,
        change=changed,
        healing=healed,
        data=data,
        seconds=prepared.seconds,
        quantized=quantization_name(model.config) or "",
    )


def _workspace_key(prepared: Prepared, source: str, text: Windows) -> dict[str, str]:
    return {
        "recipe": prepared.recipe.fingerprint,
        "source": source,
        "calibration": prepared.chosen_on.fingerprint,
        "heal": text.fingerprint,
        # It does not follow from the rest: what is chosen is nearly equal numbers' order, which hangs on the machine.
        "plan": repr(prepared.plan),
        "optimum-streamline": package_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }

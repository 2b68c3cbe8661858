"""Make a checkpoint with fewer layers from a checkpoint and a recipe: load, score, plan, heal, edit, save.

This file has the order of the steps; each step has its own file. Export and validation follow in `run.py`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import torch
import transformers

from optimum.streamline.checkpoints.loading import load_stock, load_tokenizer, read_config, source_notes
from optimum.streamline.editing.apply import EditInputs, build_replacement
from optimum.streamline.editing.plan import Plan
from optimum.streamline.healing.stages import Healer, HealingResult
from optimum.streamline.healing.training_checkpoints import healing_workspace, open_workspace
from optimum.streamline.methods.registry import method_of
from optimum.streamline.model_files.source import ModelSource, fingerprint
from optimum.streamline.models.bare_layers import NEEDS_LOAD, bare_layers
from optimum.streamline.models.quantization_config import quantization_name
from optimum.streamline.recipe.recipe import Recipe
from optimum.streamline.reporting.record import PruningRecord
from optimum.streamline.scoring.similarity import Scores, measure_scores
from optimum.streamline.system.atomic_output import locked_output_by_main, staged_by_main
from optimum.streamline.system.distributed import from_main, is_main, join_processes
from optimum.streamline.system.environment import package_version
from optimum.streamline.system.library_logs import LOG_FILE, captured_logs
from optimum.streamline.system.notify import Notify, silent
from optimum.streamline.text.windows import Windows, seen_text

from .planning import Prepared, choose_plan, load_original, quantizes_first
from .preflight import check_recipe, checked_config, result_dtype
from .texts import calibration_text, inputs_of, text_of_choice, text_of_healing
from .write_checkpoint import write_checkpoint

Score = Callable[[Windows], Scores]
"""A function that scores the layers on the calibration windows."""


def score(source: ModelSource, recipe: Recipe, notify: Notify) -> tuple[Scores, Windows]:
    """Score the layers of a model on the calibration text.

    Returns:
        The scores, and the calibration windows.

    Raises:
        StreamlineError: the model or the text cannot be used.
    """
    config = checked_config(source, recipe)
    for line in source_notes(source, config):
        notify(line)
    windows = calibration_text(recipe, load_tokenizer(source), config)
    notify(windows.line("calibration"))
    return measure_scores(load_stock(source, torch.float32, recipe.device), windows), windows


def prepare(source: ModelSource, recipe: Recipe, notify: Notify, scored: Score | None = None) -> Prepared:
    """Load a model, score its layers and choose the plan.

    Args:
        source: The original.
        recipe: The recipe.
        notify: Gets one line for each finding and each slow step.
        scored: A function that scores the layers elsewhere, such as in a quantized graph. By default the loaded model
            is scored.

    Raises:
        StreamlineError: the recipe, the model or a text cannot be used.
    """
    check_recipe(source, recipe)
    notify(f"loading {source.model}")
    start = time.monotonic()
    config = read_config(source)
    for line in source_notes(source, config):
        notify(line)
    tokenizer = load_tokenizer(source)
    chosen_on = text_of_choice(recipe, tokenizer, config)
    calibration = chosen_on.part(0, recipe.calibration.samples)
    # Needed only later, but a text that cannot be read should fail before hours of search.
    heal_text = text_of_healing(recipe, tokenizer, config) if recipe.resolved_trainings else None
    notify(chosen_on.line("calibration"))
    if heal_text is not None:
        notify(heal_text.line("healing"))
    # Score elsewhere before the model is loaded: there may be no memory for both.
    begun = time.monotonic()
    scored_elsewhere = scored(calibration) if scored else None
    scoring = time.monotonic() - begun
    model = load_original(source, recipe, config)
    loaded = time.monotonic()
    if scored_elsewhere is None:
        notify(f"scoring {config.num_hidden_layers} layers on {len(calibration.ids)} windows of {recipe.length} tokens")
    scores = scored_elsewhere or measure_scores(model, calibration)
    plan = choose_plan(model, recipe, config, chosen_on, scores)
    if plan.tried:
        notify(f"loss on held-out text, nats per token: {_losses(plan)}")
    notify(plan.describe())
    seconds = {"load": loaded - start - scoring, "score": time.monotonic() - loaded + scoring}
    kept = quantizes_first(recipe) or quantization_name(config) is not None
    stored = None if kept else result_dtype(source, recipe)
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
    """Write the pruned checkpoint `out`. The folder appears only when it is complete.

    Args:
        source: The original.
        recipe: The recipe.
        out: The folder to write.
        overwrite: Whether an earlier output in `out` is replaced.
        verbose: Whether messages of other libraries go to the terminal, instead of to `streamline.log` in `out`.
        notify: Gets one line for each finding and each slow step.
        scored: As in `prepare`.

    Raises:
        StreamlineError: the recipe, the model or a text cannot be used, or the output cannot be written.
    """
    join_processes(recipe.device)
    if not is_main():
        notify = silent  # the main process speaks for all
    with (
        locked_output_by_main(out, inputs_of(source, recipe), overwrite),
        healing_workspace(out, recipe.fingerprint) as workspace,
        staged_by_main(out, overwrite) as staging,
        captured_logs(staging and staging / LOG_FILE, verbose),
    ):
        prepared = prepare(source, recipe, notify, scored)
        # Scores can be nearly equal, so rounding may give each process another plan. All must train the same model.
        prepared.plan = from_main(prepared.plan)
        record = change(prepared, notify, workspace)
        if staging is not None:
            record = write_checkpoint(prepared, record, staging, notify)
    note = f", which {NEEDS_LOAD}" if bare_layers(prepared.model.config) else ""
    notify(f"saved {out}{note}")
    return record


def change(prepared: Prepared, notify: Notify, workspace: Path | None = None) -> PruningRecord:
    """Heal and edit the prepared model, in place.

    Args:
        prepared: The model with its plan.
        notify: Gets one line for each finding and each slow step.
        workspace: The folder of the training checkpoints, from which an interrupted run continues. `None` saves none.

    Returns:
        What was done.

    Raises:
        StreamlineError: a training fails.
    """
    recipe, model, plan = prepared.recipe, prepared.model, prepared.plan
    source = fingerprint(prepared.source)
    data = {} if prepared.chosen_on is None else {"calibration": seen_text(prepared.chosen_on)}
    replacement = build_replacement(model, plan, prepared.calibration, recipe.seed)
    healer: Healer | None = None
    if prepared.heal_text is not None:
        data["heal"] = seen_text(prepared.heal_text)
        if workspace is not None and open_workspace(workspace, _workspace_key(prepared, source, prepared.heal_text)):
            notify(f"continuing from the training checkpoints in {workspace}")
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
        "calibration": prepared.chosen_on.fingerprint if prepared.chosen_on else "",
        "heal": text.fingerprint,
        # Scores can be nearly equal, so rounding on another machine may give another plan.
        "plan": repr(prepared.plan),
        "optimum-streamline": package_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }

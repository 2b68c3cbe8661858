"""Make a checkpoint with fewer layers from a checkpoint and a recipe: load, score, plan, heal, edit, save.

This file has the order of the steps; each step has its own file. Export and validation follow in `run.py`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import transformers
from transformers import PreTrainedConfig, PreTrainedModel

from optimum.streamline.checkpoints.loading import (
    DTYPES,
    load_on_disk,
    load_stock,
    load_tokenizer,
    read_config,
    source_notes,
)
from optimum.streamline.costs.healing_memory import warning
from optimum.streamline.editing.apply import Change, EditInputs, build_replacement
from optimum.streamline.editing.plan import Plan
from optimum.streamline.healing.output_cache import OutputCache, output_cache
from optimum.streamline.healing.self_text import sample_text, self_text_folder
from optimum.streamline.healing.settings import needs_original
from optimum.streamline.healing.stages import Healer, HealingResult
from optimum.streamline.healing.training_checkpoints import (
    healing_workspace,
    is_begun,
    open_workspace,
    plan_folder,
)
from optimum.streamline.healing.trials import Trials
from optimum.streamline.methods.auto import makes_trials
from optimum.streamline.methods.registry import method_of
from optimum.streamline.model_files.source import ModelSource, fingerprint
from optimum.streamline.models.bare_layers import NEEDS_LOAD, bare_layers
from optimum.streamline.models.quantization_config import quantization_name
from optimum.streamline.models.sharded_weights import sharded_copy
from optimum.streamline.quantization.compact_copy import compact_copy
from optimum.streamline.recipe.recipe import Recipe
from optimum.streamline.reporting.record import PruningRecord
from optimum.streamline.scoring.similarity import Scores, measure_scores
from optimum.streamline.system.atomic_output import locked_output_by_main, staged_by_main
from optimum.streamline.system.distributed import from_main, is_main, join_processes, process_count, sharding
from optimum.streamline.system.environment import package_version
from optimum.streamline.system.library_logs import LOG_FILE, captured_logs
from optimum.streamline.system.memory import give_back_freed_tensors
from optimum.streamline.system.notify import Notify, silent
from optimum.streamline.text.overlap import check_disjoint
from optimum.streamline.text.prompts import Prompts
from optimum.streamline.text.replaced_tokens import versions_of
from optimum.streamline.text.windows import Windows, seen_text

from .estimating import disk_warning
from .larger_than_memory import computing_dtype, scoring_device, stays_on_disk, why_in_memory, why_on_disk
from .planning import Prepared, choose_plans, load_original, named_plan, quantizes_first, reads_calibration
from .preflight import check_recipe, checked_config, result_dtype
from .texts import calibration_text, inputs_of, text_of_choice, text_of_healing
from .write_checkpoint import write_checkpoint

VERSIONS_FILE = "versions.safetensors"
"""The healing text with other tokens, in the folder of the training checkpoints."""

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
    with TemporaryDirectory(prefix="streamline-") as scratch:
        name = quantization_name(config)
        if stays_on_disk(source, recipe, config, f"scores quantized weights ({name})" if name else ""):
            notify(why_on_disk(recipe))
            model = load_on_disk(source, Path(scratch), computing_dtype(source, recipe), scoring_device(recipe))
        else:
            model = load_stock(source, computing_dtype(source, recipe), recipe.device)
        return measure_scores(model, windows), windows


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
    if recipe.max_memory is not None:  # else not, because it takes time (measured: docs/reference/healing.md)
        give_back_freed_tensors()
    notify(f"loading {source.model}")
    start = time.monotonic()
    config = read_config(source)
    for line in source_notes(source, config):
        notify(line)
    tokenizer = load_tokenizer(source)
    chosen_on = text_of_choice(recipe, tokenizer, config) if reads_calibration(recipe) else None
    # Needed only later, but a text that cannot be read should fail before hours of search.
    heal_text = text_of_healing(recipe, tokenizer, config) if recipe.resolved_trainings else None
    if chosen_on is not None:
        notify(chosen_on.line("calibration"))
    if heal_text is not None:
        notify(heal_text.line("healing"))
    stays = stays_on_disk(source, recipe, config, why_in_memory(recipe, config))
    if line := warning(recipe, config, stays):
        notify(line)
    kept = quantizes_first(recipe) or quantization_name(config) is not None
    stored = None if kept else result_dtype(source, recipe)
    # Score elsewhere before the model is loaded: there may be no memory for both.
    begun = time.monotonic()
    scores = None
    if scored is not None and chosen_on is not None and recipe.resolved_method != "explicit":
        scores = scored(chosen_on.part(0, recipe.calibration.samples))
    scoring = time.monotonic() - begun
    on_disk = None
    if stays:
        on_disk = TemporaryDirectory(prefix="streamline-")
        notify(why_on_disk(recipe))
        model = load_on_disk(source, Path(on_disk.name), computing_dtype(source, recipe), scoring_device(recipe))
    else:
        model = load_original(source, recipe, config)
    loaded = time.monotonic()
    scores, plans = _scored_plans(model, recipe, config, chosen_on, scores, notify)
    seconds = {"load": loaded - start - scoring, "score": time.monotonic() - loaded + scoring}
    candidates = plans if len(plans) > 1 else ()
    return Prepared(
        source, recipe, model, tokenizer, stored, chosen_on, heal_text, scores, plans[0], candidates, seconds, on_disk
    )


def _scored_plans(
    model: PreTrainedModel,
    recipe: Recipe,
    config: PreTrainedConfig,
    chosen_on: Windows | None,
    scores: Scores | None,
    notify: Notify,
) -> tuple[Scores | None, tuple[Plan, ...]]:
    """The scores of the layers, and the plans; for layers that the recipe names, no scores and the named plan."""
    if chosen_on is None or recipe.resolved_method == "explicit":
        plans: tuple[Plan, ...] = (named_plan(recipe, config),)
    else:
        calibration = chosen_on.part(0, recipe.calibration.samples)
        if scores is None:
            windows = f"{len(calibration.ids)} windows of {recipe.length} tokens"
            notify(f"scoring {config.num_hidden_layers} layers on {windows}")
            scores = measure_scores(model, calibration)
        plans = choose_plans(model, recipe, config, chosen_on, scores, makes_trials(recipe))
    if plans[0].tried:
        notify(f"loss on held-out text, nats per token: {_losses(plans[0])}")
    if len(plans) == 1:
        notify(plans[0].describe())
    return scores, plans


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
    judged_on: Windows | None = None,
    exports: bool = False,
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
        judged_on: The evaluation windows, if the caller evaluates on them afterwards. Healing text that the original
            samples must not hold their text.
        exports: Whether the caller exports both models into `out` afterwards, which takes room on the disk too.

    Raises:
        StreamlineError: the recipe, the model or a text cannot be used, or the output cannot be written.
    """
    join_processes(recipe.device)
    if not is_main():
        notify = silent  # the main process speaks for all
    with (
        locked_output_by_main(out, inputs_of(source, recipe), overwrite),
        self_text_folder(out) as sampled,
        healing_workspace(out, recipe.fingerprint) as workspace,
        staged_by_main(out, overwrite) as staging,
        captured_logs(staging and staging / LOG_FILE, verbose),
    ):
        if line := disk_warning(source, recipe, out, exports):
            notify(line)
        prepared = prepare(source, recipe, notify, scored)
        # Scores can be nearly equal, so rounding may give each process another plan. All must train the same model.
        prepared.plan, prepared.candidates = from_main((prepared.plan, prepared.candidates))
        sample_heal_text(prepared, notify, sampled, judged_on)
        record = change(prepared, notify, workspace)
        if staging is not None:
            record = write_checkpoint(prepared, record, staging, notify)
        if prepared.on_disk is not None:
            prepared.on_disk.cleanup()
    note = f", which {NEEDS_LOAD}" if bare_layers(prepared.model.config) else ""
    notify(f"saved {out}{note}")
    return record


def sample_heal_text(
    prepared: Prepared, notify: Notify, folder: Path | None = None, judged_on: Windows | None = None
) -> None:
    """Let the prepared original sample the healing text, in place of its prompts. Does nothing for other text.

    Args:
        prepared: The model with its plan. Its `heal_text` becomes the sampled windows.
        notify: Gets one line on what is sampled.
        folder: Where the sampled text is kept, so that an interrupted run does not sample it again. `None` keeps none.
        judged_on: Evaluation windows whose text it must not hold.

    Raises:
        StreamlineError: the model cannot generate text, or the text holds evaluation text.
    """
    prompts = prepared.heal_text
    if not isinstance(prompts, Prompts):
        return
    source, start = fingerprint(prepared.source), time.monotonic()
    prepared.heal_text = text = sample_text(
        prepared.model,
        prepared.tokenizer,
        prompts,
        seed=prepared.recipe.seed,
        source=source,
        notify=notify,
        folder=folder,
    )
    prepared.seconds["sample"] = time.monotonic() - start
    if judged_on is not None:
        check_disjoint(text.sketch, text.spec, judged_on.sketch, judged_on.spec)


def change(prepared: Prepared, notify: Notify, workspace: Path | None = None) -> PruningRecord:
    """Heal and edit the prepared model, in place.

    Args:
        prepared: The model with its plan, and with healing text that is sampled already (`sample_heal_text`).
        notify: Gets one line for each finding and each slow step.
        workspace: The folder of the training checkpoints, from which an interrupted run continues. `None` saves none.

    Returns:
        What was done.

    Raises:
        StreamlineError: a training fails.
    """
    assert not isinstance(prepared.heal_text, Prompts), "sample_heal_text comes first"
    source = fingerprint(prepared.source)
    data = {} if prepared.chosen_on is None else {"calibration": seen_text(prepared.chosen_on)}
    if prepared.heal_text is not None:
        data["heal"] = seen_text(prepared.heal_text)
        if workspace is not None:
            open_workspace(workspace, _workspace_key(prepared, source, prepared.heal_text))
            if any(is_begun(workspace, each) for each in (prepared.plan, *prepared.candidates)):
                notify(f"continuing from the training checkpoints in {workspace}")
    start = time.monotonic()
    with _output_cache(prepared, workspace) as cache:
        original = _original_apart(prepared, cache)
        versions = _versions(prepared, workspace, original)
        prepared.plan = _best_after_trials(prepared, notify, workspace, cache, versions)
        changed, healed = _edit_and_heal(prepared, notify, workspace, cache, versions, original)
    if prepared.heal_text is not None:
        prepared.seconds["heal"] = time.monotonic() - start
    return PruningRecord(
        source=prepared.source,
        source_fingerprint=source,
        recipe=prepared.recipe,
        scores=prepared.scores,
        plan=prepared.plan,
        change=changed,
        healing=healed,
        data=data,
        seconds=prepared.seconds,
        quantized=quantization_name(prepared.model.config) or "",
    )


def _output_cache(prepared: Prepared, workspace: Path | None) -> AbstractContextManager[OutputCache | None]:
    if not isinstance(prepared.heal_text, Windows) or sharding() is not None:
        return nullcontext()
    trials = bool(prepared.candidates)
    return output_cache(prepared.recipe, prepared.heal_text, prepared.model.config, workspace, trials)


def _original_apart(prepared: Prepared, cache: OutputCache | None) -> PreTrainedModel | None:
    """The original for distillation, if it is kept in another way than the model that is edited: shared, or compact."""
    recipe = prepared.recipe
    if "distill" not in recipe.resolved_trainings:
        return None
    if sharding() is not None:
        return sharded_copy(prepared.model.eval(), recipe.device, DTYPES[recipe.healing.dtype]).requires_grad_(False)
    if recipe.healing.original == "fp32":
        return None
    original = compact_copy(prepared.model, recipe.healing.original, recipe.device)
    if cache is None or needs_original(recipe, cached=True):
        return original
    cache.complete(original)
    return None


def _versions(prepared: Prepared, workspace: Path | None, original: PreTrainedModel | None) -> torch.Tensor | None:
    """The healing text with other tokens, for the passes of `distill` after the first; `None` if tokens stay."""
    recipe, text = prepared.recipe, prepared.heal_text
    if not isinstance(text, Windows) or not recipe.resolved_replace:
        return None
    file = workspace and workspace / VERSIONS_FILE
    model = prepared.model if original is None else original
    return versions_of(model, text.ids, recipe.healing.epochs - 1, recipe.resolved_replace, recipe.seed, file)


def _edit_and_heal(
    prepared: Prepared,
    notify: Notify,
    workspace: Path | None,
    cache: OutputCache | None,
    versions: torch.Tensor | None,
    original: PreTrainedModel | None,
) -> tuple[Change, tuple[HealingResult, ...]]:
    """Edit the prepared model by its plan, with the trainings before, during and after the edit."""
    recipe, plan = prepared.recipe, prepared.plan
    model = prepared.model
    replacement = build_replacement(model, plan, prepared.calibration, recipe.seed)
    healer: Healer | None = None
    if isinstance(prepared.heal_text, Windows):
        folder = workspace and plan_folder(workspace, plan)
        healer = Healer(recipe, model, plan, prepared.heal_text, notify, folder, original, cache, versions)
        healer.before_edit(replacement.layer if replacement else None)
    edit_inputs = EditInputs(prepared.calibration, replacement, healer.after_merge if healer else None)
    changed = method_of(recipe, model.config).apply(model, plan, edit_inputs)
    if healer is None:
        return changed, ()
    healer.after_edit(changed.new_layers)
    return changed, tuple(healer.results)


def _best_after_trials(
    prepared: Prepared,
    notify: Notify,
    workspace: Path | None,
    cache: OutputCache | None,
    versions: torch.Tensor | None,
) -> Plan:
    """The plan of the prepared model, chosen by trial trainings if there are several."""
    text, calibration = prepared.heal_text, prepared.calibration
    if not prepared.candidates or not isinstance(text, Windows) or calibration is None:
        return prepared.plan
    with nullcontext(workspace) if workspace else TemporaryDirectory() as folder:
        trials = Trials(prepared.recipe, prepared.model, calibration, text, notify, Path(folder), cache, versions)
        best = trials.best(prepared.candidates)
    notify(best.describe())
    return best


def _workspace_key(prepared: Prepared, source: str, text: Windows) -> dict[str, str]:
    return {
        "recipe": prepared.recipe.fingerprint,
        "source": source,
        "calibration": prepared.chosen_on.fingerprint if prepared.chosen_on else "",
        "heal": text.fingerprint,
        "optimum-streamline": package_version(),
        "files": "weights, and the best weights beside them",  # another form of checkpoints gets another text
        "sharded": "" if sharding() is None else f"{process_count()} processes",  # each has files of its parts
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }

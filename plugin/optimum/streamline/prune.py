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
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from .bare_layers import NEEDS_LOAD, bare_layers
from .card import CARD_FILE, model_card
from .checkpoint import (
    DTYPES,
    check_checkpoint,
    load_stock,
    load_tokenizer,
    read_config,
    save_model,
    source_notes,
    stored_dtype,
)
from .dead import layers_without_attention
from .edit import Materials, build_replacement, planned_config
from .errors import StreamlineError
from .evidence import Evidence
from .healing import Healed, Healer, check_heal_windows, check_healing, heal_windows
from .healing.workspace import healing_workspace, open_workspace
from .logs import LOG_FILE, captured_logs
from .methods import METHODS, method_of
from .module_patterns import followed
from .outputs import claimed_by_main, staged_by_main
from .overlap import check_disjoint
from .plan import Plan
from .processes import from_main, is_main, join_processes
from .provenance import write_record
from .quantization_config import quantization_name
from .quantize import check_quantizable, load_quantizing, write_quantization
from .quantized_pruning import check_quantization, refuse_unpacking
from .quantizers import QUANTIZERS
from .read_back import read_back, release
from .recipe import Recipe
from .record import Record, seen_text
from .remote_code import carry_code
from .scores import Scores, measure_scores
from .source import Source, fingerprint
from .text import local_path
from .windows import TooShortError, Windows, read_windows

Say = Callable[[str], None]
Score = Callable[[Windows], Scores]


@dataclass
class Prepared:
    """A model, its scores and the plan for it, before any weight moves.

    Args:
        stored: What the result is stored in; `None` if as it was read, which is how quantized weights stay.
        chosen_on: What the choice is made on: `calibration`, and what plans are compared on where they are.
        heal_text: What is trained on, where something is.
    """

    source: Source
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


def check_recipe(source: Source, recipe: Recipe) -> None:
    """Everything about a recipe that can be refused without loading a weight.

    Raises:
        StreamlineError: the model, the method, a count or a length is wrong.
    """
    config = _checked_config(source, recipe)
    if recipe.dtype is None and quantization_name(config) is None:
        stored_dtype(source)  # refuses what a result could not be stored in
    method_of(recipe, config)
    check_quantization(recipe, config)
    check_healing(recipe)
    check_heal_windows(recipe, config.num_hidden_layers)


def _checked_config(source: Source, recipe: Recipe) -> PreTrainedConfig:
    config = check_checkpoint(source)
    longest = getattr(config, "max_position_embeddings", None)
    if longest is not None and recipe.length > longest:
        raise StreamlineError(
            f"length {recipe.length}: the model reads at most {longest} tokens (max_position_embeddings)"
        )
    return config


def score(source: Source, recipe: Recipe, say: Say) -> tuple[Scores, Windows]:
    """Layer importances of a model on the calibration text.

    Raises:
        StreamlineError: a bad model or text.
    """
    config = _checked_config(source, recipe)
    for line in source_notes(source, config):
        say(line)
    windows = _windows(recipe, load_tokenizer(source), config, recipe.calibration, recipe.samples, "calibration")
    say(windows.line("calibration"))
    return measure_scores(load_stock(source, torch.float32, recipe.device), windows), windows


def prepare(source: Source, recipe: Recipe, say: Say, scored: Score | None = None) -> Prepared:
    """Load a model, score its layers and plan what becomes of them.

    Computation is in fp32 whatever the checkpoint is stored in: a score is a difference of nearly equal numbers.

    Args:
        scored: Scores the layers, if that is not to be done in the model as it is loaded.
    """
    check_recipe(source, recipe)
    say(f"loading {source.model}")
    start = time.monotonic()
    config = read_config(source)
    for line in source_notes(source, config):
        say(line)
    tokenizer = load_tokenizer(source)
    chosen_on = _text_of_choice(recipe, tokenizer, config)
    calibration = chosen_on.part(0, recipe.samples)
    held_out = chosen_on.part(recipe.samples, len(chosen_on.ids)) if len(chosen_on.ids) > recipe.samples else None
    # Not needed yet, but a text that cannot be read is better found now than after hours of a greedy search.
    heal_text = _heal_text(recipe, tokenizer, config) if recipe.healing else None
    say(chosen_on.line("calibration"))
    if heal_text is not None:
        say(heal_text.line("healing"))
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
        say(f"scoring {config.num_hidden_layers} layers on {len(calibration.ids)} windows of {recipe.length} tokens")
    scores = scored_elsewhere or measure_scores(model, calibration)
    plan = method_of(recipe, config).plan(recipe, Evidence(model, calibration, scores, held_out))
    planned = planned_config(model.config, plan)
    if len(layers_without_attention(planned)) == planned.num_hidden_layers:
        raise StreamlineError("model: no layer with attention would be left; remove fewer, or other layers")
    if plan.tried:
        say(f"loss on held-out text, nats per token: {_losses(plan)}")
    say(plan.describe())
    seconds = {"load": loaded - start - scoring, "score": time.monotonic() - loaded + scoring}
    kept = quantizes or quantization_name(config) is not None
    stored = None if kept else DTYPES[recipe.dtype or stored_dtype(source)]
    return Prepared(source, recipe, model, tokenizer, stored, chosen_on, heal_text, scores, plan, seconds)


def _losses(plan: Plan) -> str:
    return ", ".join(f"{name} {'no plan' if loss is None else f'{loss:.4f}'}" for name, loss in plan.tried)


def inputs_of(source: Source, recipe: Recipe) -> tuple[str, ...]:
    """What a run reads, which no output may replace."""
    texts = (recipe.calibration, recipe.heal_data, recipe.eval_data)
    models = (source.model, *([source.base.model] if source.base else []))
    return *models, *(str(local_path(spec)[0]) for spec in texts)


def prune(
    source: Source,
    recipe: Recipe,
    out: Path,
    *,
    overwrite: bool,
    verbose: bool,
    say: Say,
    scored: Score | None = None,
) -> Record:
    """Make the checkpoint `out`: whole, or not at all.

    Args:
        scored: As in `prepare`.
        verbose: Whether other libraries' messages go to the terminal rather than to `streamline.log`.

    Raises:
        StreamlineError: a bad recipe, model or text, or an output that cannot be written.
    """
    join_processes(recipe.device)
    if not is_main():
        say = _say_nothing
    with (
        claimed_by_main(out, inputs_of(source, recipe), overwrite),
        healing_workspace(out, recipe.fingerprint) as workspace,
        staged_by_main(out, overwrite) as staging,
        captured_logs(staging and staging / LOG_FILE, verbose),
    ):
        prepared = prepare(source, recipe, say, scored)
        # Nearly equal numbers may fall either way on another processor: all train one model.
        prepared.plan = from_main(prepared.plan)
        record = change(prepared, say, workspace)
        if staging is not None:
            record = replace(record, read_back=_save(prepared, record, staging, say))
            write_record(record.to_dict(), staging)
            (staging / CARD_FILE).write_text(model_card(record), encoding="utf-8")
    note = f", which {NEEDS_LOAD}" if bare_layers(prepared.model.config) else ""
    say(f"saved {out}{note}")
    return record


def _save(prepared: Prepared, record: Record, folder: Path, say: Say) -> dict[str, Any]:
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
        now = [new for new, _ in followed(in_float, [place.originals for place in record.change.places])]
        with TemporaryDirectory(dir=folder) as scratch:
            save_model(model, prepared.tokenizer, prepared.stored, Path(scratch))
            release(model)
            model = load_quantizing(source.of(scratch), recipe.quantize, now, recipe.device)
    save_model(model, prepared.tokenizer, None if quantizes else prepared.stored, folder)
    carry_code(source, folder)
    if quantizes:
        say(write_quantization(model, source, recipe.quantize, recipe.excluded, folder))
    start = time.monotonic()
    found = read_back(folder, model, prepared.tokenizer, prepared.calibration.ids, source.trust_remote_code)
    prepared.seconds["read back"] = time.monotonic() - start
    return found


def _say_nothing(message: str) -> None:
    """One process speaks for all."""


def change(prepared: Prepared, say: Say, workspace: Path | None = None) -> Record:
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
            say(f"going on from the checkpoints in {workspace}")
        healer = Healer(recipe, model, plan, prepared.heal_text, say, workspace)
    start = time.monotonic()
    if healer is not None:
        healer.before_edit(replacement.layer if replacement else None)
    materials = Materials(prepared.calibration, replacement, healer.after_merge if healer else None)
    changed = method_of(recipe, model.config).apply(model, plan, materials)
    healed: tuple[Healed, ...] = ()
    if healer is not None:
        healer.after_edit(changed.places)
        healed = tuple(healer.done)
        prepared.seconds["heal"] = time.monotonic() - start
    return Record(
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
    from . import __version__

    return {
        "recipe": prepared.recipe.fingerprint,
        "source": source,
        "calibration": prepared.chosen_on.fingerprint,
        "heal": text.fingerprint,
        # It does not follow from the rest: what is chosen is nearly equal numbers' order, which hangs on the machine.
        "plan": repr(prepared.plan),
        "optimum-streamline": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def _text_of_choice(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig) -> Windows:
    """The calibration windows, and after them those to compare plans on where the method does."""
    held_out = METHODS[recipe.method_name].held_out(recipe)
    try:
        return _windows(recipe, tokenizer, config, recipe.calibration, recipe.samples + held_out, "calibration")
    except TooShortError as error:
        if not held_out:
            raise
        raise StreamlineError(
            f"{error}; samples are {recipe.samples}, and method {recipe.method_name} reads {held_out} more windows to "
            "compare what its candidates choose"
        ) from None


def _heal_text(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig) -> Windows:
    count = heal_windows(recipe.heal_tokens, recipe.length)
    return _windows(recipe, tokenizer, config, recipe.heal_data, count, "train")


@dataclass(frozen=True)
class Texts:
    """All text of a run.

    Args:
        judged_on: The evaluation windows.
        chosen_on: Those that choices are made on, by purpose: `calibration`, and `heal` where there is healing.
    """

    judged_on: Windows
    chosen_on: dict[str, Windows]


def read_texts(source: Source, recipe: Recipe) -> Texts:
    """Read all text of a run, the judgement's apart from the choices'.

    Raises:
        StreamlineError: a text cannot be read or is too short, or the choices are made on what they are judged on.
    """
    tokenizer, config = load_tokenizer(source), read_config(source)
    judged_on = _windows(recipe, tokenizer, config, recipe.eval_data, recipe.eval_samples, "eval")
    chosen_on = {"calibration": _text_of_choice(recipe, tokenizer, config)}
    if recipe.healing:
        chosen_on["heal"] = _heal_text(recipe, tokenizer, config)
    for windows in chosen_on.values():
        check_disjoint(windows.sketch, windows.spec, judged_on.sketch, judged_on.spec)
    return Texts(judged_on, chosen_on)


def _windows(
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerBase,
    config: PreTrainedConfig,
    spec: str,
    count: int,
    part: str,
) -> Windows:
    return read_windows(spec, tokenizer, count, recipe.length, recipe.seed, config.vocab_size, part)

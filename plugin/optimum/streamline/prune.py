"""From a checkpoint and a recipe to a shallower checkpoint: load, score, plan, heal, edit, save.

Reads as prose; each step lives in its own file. Knows neither exports nor validation.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from .card import model_card
from .checkpoint import DTYPES, RECORD_FILE, Source, fingerprint, load_stock, load_tokenizer, read_config, save_model
from .dead import dead_sublayers
from .edit import build_replacement, planned_config
from .errors import StreamlineError
from .heal import HealLog, HealSettings, default_lr, heal_windows, train_replacement
from .logs import LOG_FILE, captured_logs
from .methods import method_of
from .outputs import staged_folder
from .plan import Plan
from .recipe import Recipe
from .record import Record, seen_text
from .scores import Scores, measure_scores
from .windows import Windows, check_disjoint, read_windows

Say = Callable[[str], None]


@dataclass
class Prepared:
    """A model, its scores and the plan for it, before any weight moves."""

    source: Source
    recipe: Recipe
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    stored: torch.dtype
    calibration: Windows
    scores: Scores
    plan: Plan
    seconds: dict[str, float] = field(default_factory=dict)


def check_recipe(source: Source, recipe: Recipe) -> None:
    """Everything about a recipe that can be refused without loading a weight.

    Raises:
        StreamlineError: the model, the method, a count or a length is wrong.
    """
    method_of(recipe, _checked_config(source, recipe).num_hidden_layers)


def _checked_config(source: Source, recipe: Recipe) -> PreTrainedConfig:
    config = read_config(source)
    longest = getattr(config, "max_position_embeddings", None)
    if longest is not None and recipe.length > longest:
        raise StreamlineError(
            f"length {recipe.length}: the model reads at most {longest} tokens (max_position_embeddings)"
        )
    return config


def score(source: Source, recipe: Recipe) -> tuple[Scores, Windows]:
    """Layer importances of a model on the calibration text.

    Raises:
        StreamlineError: a bad model or text.
    """
    _checked_config(source, recipe)
    tokenizer = load_tokenizer(source)
    windows = _windows(recipe, tokenizer, recipe.calibration, recipe.samples, "calibration")
    return measure_scores(load_stock(source, torch.float32, recipe.device), windows), windows


def prepare(source: Source, recipe: Recipe, say: Say) -> Prepared:
    """Load a model, score its layers and plan what becomes of them.

    Computation is in fp32 whatever the checkpoint is stored in: a score is a difference of nearly equal numbers.
    """
    check_recipe(source, recipe)
    say(f"loading {source.model}")
    start = time.monotonic()
    config = read_config(source)
    tokenizer = load_tokenizer(source)
    calibration = _windows(recipe, tokenizer, recipe.calibration, recipe.samples, "calibration")
    model = load_stock(source, torch.float32, recipe.device)
    loaded = time.monotonic()
    say(f"scoring {config.num_hidden_layers} layers on {len(calibration.ids)} windows of {recipe.length} tokens")
    scores = measure_scores(model, calibration)
    plan = method_of(recipe, scores.layers).plan(recipe, scores)
    planned = planned_config(model.config, plan)
    if len(dead_sublayers(planned)) == planned.num_hidden_layers:
        raise StreamlineError(
            f"replacement {recipe.replacement!r}: no layer with attention would be left; remove fewer"
        )
    say(plan.describe())
    seconds = {"load": loaded - start, "score": time.monotonic() - loaded}
    stored = DTYPES[recipe.dtype] if recipe.dtype else _stored_dtype(config)
    return Prepared(source, recipe, model, tokenizer, stored, calibration, scores, plan, seconds)


def _stored_dtype(config: PreTrainedConfig) -> torch.dtype:
    return config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32


def inputs_of(source: Source, recipe: Recipe) -> tuple[str, ...]:
    """What a run reads, which no output may replace."""
    return source.model, recipe.calibration, recipe.heal_data, recipe.eval_data


def prune(source: Source, recipe: Recipe, out: Path, *, overwrite: bool, verbose: bool, say: Say) -> Record:
    """Make the checkpoint `out`: whole, or not at all.

    Args:
        verbose: Whether other libraries' messages go to the terminal rather than to `streamline.log`.

    Raises:
        StreamlineError: a bad recipe, model or text, or an output that cannot be written.
    """
    with (
        staged_folder(out, inputs_of(source, recipe), overwrite) as staging,
        captured_logs(staging / LOG_FILE, verbose),
    ):
        prepared = prepare(source, recipe, say)
        record = _change(prepared, say)
        save_model(prepared.model, prepared.tokenizer, prepared.stored, staging)
        (staging / RECORD_FILE).write_text(record.to_json())
        (staging / "README.md").write_text(model_card(record))
    say(f"saved {out}")
    return record


def _change(prepared: Prepared, say: Say) -> Record:
    recipe, model, plan = prepared.recipe, prepared.model, prepared.plan
    data = {"calibration": seen_text(prepared.calibration)}
    replacement = build_replacement(model, plan)
    healing: HealLog | None = None
    if replacement is not None and recipe.healing == "hidden-mse":
        count = heal_windows(recipe.heal_tokens, recipe.length)
        text = _windows(recipe, prepared.tokenizer, recipe.heal_data, count, "train")
        data["heal"] = seen_text(text)
        say(f"training the replacement on {len(text.ids)} windows, {recipe.heal_epochs} times")
        start = time.monotonic()
        lr = recipe.heal_lr or default_lr(model.config.hidden_size)
        settings = HealSettings(lr=lr, epochs=recipe.heal_epochs, seed=recipe.seed)
        healing = train_replacement(model, plan, replacement.layer, text, settings)
        prepared.seconds["heal"] = time.monotonic() - start
    change = method_of(recipe, plan.total).apply(model, plan, replacement)
    return Record(
        source=prepared.source.model,
        source_fingerprint=fingerprint(prepared.source.model, prepared.source.cache_dir),
        recipe=recipe,
        scores=prepared.scores,
        plan=plan,
        change=change,
        healing=healing,
        data=data,
        seconds=prepared.seconds,
    )


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
    tokenizer = load_tokenizer(source)
    judged_on = _windows(recipe, tokenizer, recipe.eval_data, recipe.eval_samples, "eval")
    chosen_on = {"calibration": _windows(recipe, tokenizer, recipe.calibration, recipe.samples, "calibration")}
    if recipe.healing != "none":
        count = heal_windows(recipe.heal_tokens, recipe.length)
        chosen_on["heal"] = _windows(recipe, tokenizer, recipe.heal_data, count, "train")
    for windows in chosen_on.values():
        check_disjoint(windows.runs(), windows.spec, judged_on)
    return Texts(judged_on, chosen_on)


def _windows(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, spec: str, count: int, part: str) -> Windows:
    return read_windows(spec, tokenizer, count, recipe.length, recipe.seed, part)

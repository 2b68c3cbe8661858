"""Measure models against their original on the recipe's evaluation text. No model may have been made with it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from optimum.streamline.checkpoints.loading import check_checkpoint, load_tokenizer, source_notes
from optimum.streamline.errors import StreamlineError
from optimum.streamline.evaluation.contamination import refuse_seen_text
from optimum.streamline.evaluation.latency import ROUNDS
from optimum.streamline.evaluation.multiple_choice import read_questions
from optimum.streamline.evaluation.results import Report
from optimum.streamline.evaluation.validate import ComparedModel, validate
from optimum.streamline.recipe.quantities import memory_limit
from optimum.streamline.recipe.recipe import Recipe
from optimum.streamline.system.notify import Notify

from .texts import evaluation_text


def validate_models(
    compared_models: Sequence[ComparedModel],
    recipe: Recipe,
    *,
    questions: Path | None = None,
    rounds: int = ROUNDS,
    notify: Notify = print,
) -> Report:
    """Measure models against their original, all in this run, and judge the candidates.

    Args:
        compared_models: The models to measure, the original first.
        recipe: Its evaluation text, budget, dtype, device, `max_memory` and seed are used.
        questions: A file of multiple-choice questions, one JSON object a line.
        rounds: Timed rounds, each one prefill and one decode of every model, in turn if all fit into memory together.
        notify: Gets one line for each note on a model, and one line on the evaluation text.

    Raises:
        StreamlineError: a model, the text or the questions cannot be used, or a candidate was made with this text.
        WorkerError: a process that timed a model died.
    """
    limit = memory_limit(recipe.max_memory)
    if limit is not None and recipe.device != "cpu":
        raise StreamlineError(
            f"max-memory {recipe.max_memory!r}: limits the memory of the CPU, and the models run on {recipe.device}; "
            "leave it out"
        )
    configs = [check_checkpoint(compared.source, of_export=True) for compared in compared_models]
    for compared, config in zip(compared_models, configs, strict=True):
        for line in source_notes(compared.source, config):
            notify(f"{compared.label}: {line}")
    tokenizer = load_tokenizer(compared_models[0].source)
    asked = read_questions(questions, tokenizer) if questions else None
    windows = evaluation_text(recipe, tokenizer, configs[0])
    notify(windows.line("evaluation"))
    for compared in compared_models[1:]:
        refuse_seen_text(str(compared.source.folder), windows)
    return validate(
        compared_models,
        windows,
        recipe.budget,
        recipe.evaluation.judge,
        questions=asked,
        dtype=recipe.dtype or "fp32",
        device=recipe.device,
        seed=recipe.seed,
        max_memory=limit,
        notify=notify,
        rounds=rounds,
    )

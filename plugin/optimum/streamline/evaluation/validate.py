"""Validation: measuring models against their original in one run, and judging them by a budget.

Each measurement has its own file. This one runs them in order, and pairs every model with its baseline.
"""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from optimum.streamline.checkpoints.loading import check_checkpoint, stored_dtype
from optimum.streamline.checkpoints.provenance import changed_files, model_hashes
from optimum.streamline.errors import StreamlineError
from optimum.streamline.model_files.artifact import Artifact, is_artifact
from optimum.streamline.model_files.source import ModelSource, fingerprint
from optimum.streamline.models.quantization_config import quantization_name
from optimum.streamline.recipe.recipe import Budget, Judge
from optimum.streamline.runtime.opening import open_runner
from optimum.streamline.system.environment import describe_machine
from optimum.streamline.system.notify import Notify
from optimum.streamline.text.tokenizer_checks import compare_tokenizers
from optimum.streamline.text.windows import Windows

from .accuracy import Accuracy, measure_accuracy
from .intervals import RESAMPLES, grouped
from .latency import DECODE_TOKENS, PROMPT_LENGTH, ROUNDS, WARMUP_ROUNDS, Timing, median_time, speedup
from .multiple_choice import Answers, Questions, answer_questions
from .one_at_a_time import NOTE, fit_together, measure_one_at_a_time
from .results import Measurement, Report, Role
from .theoretical_cost import Cost, cost_of, disk_bytes, stored_weight_bytes
from .timing_processes import Job, WorkerResult, time_alternating
from .verdict import judge


@dataclass(frozen=True)
class ComparedModel:
    """A model to measure.

    Args:
        label: Its name in the report, different for each model.
        path: The folder or Hub id of a checkpoint, or the folder of an artifact.
        role: `original` for the original, in any runtime; `candidate` for a model made from it.
        cache_dir: The folder for Hub downloads; by default transformers' own.
        trust_remote_code: Whether Python code in the checkpoint may run.
        revision: The revision of a Hub id (`ModelSource`).
    """

    label: str
    path: str
    role: Role = "candidate"
    cache_dir: str | None = None
    trust_remote_code: bool = False
    revision: str | None = None

    @property
    def source(self) -> ModelSource:
        """The source of its files."""
        return ModelSource(self.path, self.cache_dir, self.trust_remote_code, self.revision)


@dataclass(frozen=True)
class TimedTokens:
    """The numbers of tokens that are timed: `length` in the prompt, then `decoded` one by one."""

    length: int
    decoded: int


@dataclass(frozen=True)
class RawMeasurement:
    """The raw results of one model, before it is compared with its baseline."""

    compared: ComparedModel
    dtype: str
    cost: Cost
    disk_bytes: int
    runtime: str
    files: dict[str, str]
    changed: tuple[str, ...]
    accuracy: Accuracy
    answers: Answers | None
    timed: WorkerResult


def compared_models_of(original: ModelSource, candidates: Sequence[str]) -> list[ComparedModel]:
    """The models to measure, labelled by the names of their folders, or by their paths if two names are the same.

    Args:
        original: The source of the original. Its `cache_dir` and `trust_remote_code` apply to all models.
        candidates: Folders of checkpoints and artifacts, and Hub ids, also as `name@revision`.

    Returns:
        The original first, then the candidates in order.
    """
    sources = [original, *(replace(original, model=path, revision=None) for path in candidates)]
    paths = [source.model + (f"@{source.revision}" if source.revision else "") for source in sources]
    names = [Path(path).name or path for path in paths]
    labels = [name if names.count(name) == 1 else path for name, path in zip(names, paths, strict=True)]
    compared_models = [
        ComparedModel(label, source.model, "candidate", source.cache_dir, source.trust_remote_code, source.revision)
        for label, source in zip(labels, sources, strict=True)
    ]
    return [replace(compared_models[0], role="original"), *compared_models[1:]]


def mark_original_exports(compared_models: Sequence[ComparedModel]) -> list[ComparedModel]:
    """The models, with role `original` for every float export of the same weights as the first model's."""
    exports = [compared for compared in compared_models[1:] if _is_float_export(compared)]
    if not exports:
        return list(compared_models)
    original = _source_fingerprint(compared_models[0])
    same = [compared for compared in exports if _source_fingerprint(compared) == original]
    return [replace(compared, role="original") if compared in same else compared for compared in compared_models]


def _is_float_export(compared: ComparedModel) -> bool:
    """Whether the model is an unquantized artifact whose files are as they were written."""
    if not is_artifact(compared.source.folder):
        return False
    return Artifact.read(compared.source.folder).quantize == "none" and not changed_files(compared.source)


@dataclass(frozen=True)
class Measurements:
    """The results of `measure`, in the order of the models.

    Args:
        rows: One measurement for each model.
        accuracies: The accuracy of each model, with its sums for each window.
        settings: See `Report`.
        questions: See `Report`.
    """

    rows: tuple[Measurement, ...]
    accuracies: tuple[Accuracy, ...]
    settings: dict[str, str | int]
    questions: dict[str, str | int | float] | None


def validate(
    compared_models: Sequence[ComparedModel],
    windows: Windows,
    budget: Budget,
    judged_by: Judge = "bound",
    **options: Any,
) -> Report:
    """Measure all models in this run, and judge the candidates by a budget.

    Args:
        compared_models: See `measure`.
        windows: See `measure`.
        budget: The limits for candidates.
        judged_by: What must be within a limit, as in `verdict.judge`.
        options: The other arguments of `measure`.

    Returns:
        The report.

    Raises:
        StreamlineError: as `measure`.
        WorkerError: as `measure`.
    """
    measured = measure(compared_models, windows, **options)
    machine = describe_machine(options.get("device", "cpu"))
    verdict, seed = judge(measured.rows, budget, judged_by), options.get("seed", 0)
    return Report(
        measured.rows, verdict, measured.settings, machine, windows.describe(), seed, questions=measured.questions
    )


def measure(
    compared_models: Sequence[ComparedModel],
    windows: Windows,
    *,
    questions: Questions | None = None,
    dtype: str = "fp32",
    device: str = "cpu",
    seed: int = 0,
    prompt_length: int = PROMPT_LENGTH,
    decode_tokens: int = DECODE_TOKENS,
    rounds: int = ROUNDS,
    max_memory: int | None = None,
    log: Path | None = None,
    notify: Notify = print,
) -> Measurements:
    """Measure all models in this run.

    Accuracy is compared with the first model. Speed and size are compared with the original in the same runtime, if it
    is among the models, and otherwise with the first model. `Measurement.baseline` names it. Models that do not fit
    into memory together are measured and timed one after another; the settings say so.

    Args:
        compared_models: The models, the original first. A float export of the original also gets the role `original`.
        windows: The evaluation text, on which nothing was chosen or trained. The timed tokens come from it too.
        questions: Multiple-choice questions (`multiple_choice.read_questions`) for accuracy and stability.
        dtype: The dtype that float checkpoints compute in: `fp32`, `fp16` or `bf16`. Artifacts have their own.
        device: `cpu` or `cuda`.
        seed: The seed of the bootstrap.
        prompt_length: The tokens of the timed prompt. It is reduced to what all models and the text allow, and the
            settings record both numbers.
        decode_tokens: The tokens decoded one by one after the prompt; reduced likewise.
        rounds: The number of timed rounds. In each, every model runs the prompt and the decoded tokens once.
        max_memory: The memory in bytes to make do with on a CPU; by default what is free.
        log: A file to append the output of the timing processes' libraries to.
        notify: A function that is told, in one line each, what a user should know about the comparison.

    Returns:
        The measurements.

    Raises:
        StreamlineError: the models, their tokenizers, the text or the settings do not allow a comparison, or a model
            cannot be run.
        WorkerError: a process that timed a model died.
    """
    compared_models = mark_original_exports(compared_models)
    _check(compared_models, windows, prompt_length, decode_tokens, rounds)
    configs = [check_checkpoint(compared.source, of_export=True) for compared in compared_models]
    named = [(compared.label, compared.source) for compared in compared_models[1:]]
    for line in compare_tokenizers(compared_models[0].source, named, windows.texts):
        notify(line)
    positions = min(config.max_position_embeddings for config in configs)
    if windows.ids.shape[1] > positions:
        raise StreamlineError(f"length {windows.ids.shape[1]}: the models take windows of at most {positions} tokens")
    if questions is not None:
        questions.check(positions, min(config.vocab_size for config in configs))
    prompt = _clip(prompt_length, decode_tokens, min(positions, windows.ids.numel()))
    computed = [_computed(compared, config, dtype) for compared, config in zip(compared_models, configs, strict=True)]
    dtypes, costs = zip(*computed, strict=True)
    files = [model_hashes(compared.source) for compared in compared_models]
    changed = [tuple(changed_files(compared.source) or ()) for compared in compared_models]
    sizes = [disk_bytes(compared.source.folder) for compared in compared_models]
    in_memory = [_bytes_in_memory(*each) for each in zip(compared_models, configs, costs, sizes, strict=True)]
    together = fit_together(in_memory, device, max_memory)
    if not together:
        notify(NOTE)
    runtimes, accuracies, answers = _judged(compared_models, windows, questions, dtype, device, together)
    tokens = windows.ids.flatten()[None, : prompt.length + prompt.decoded].numpy()
    jobs = [Job(each.label, str(each.source.folder), dtype, device, each.trust_remote_code) for each in compared_models]
    timed = [
        result
        for each in ([jobs] if together else [[job] for job in jobs])
        for result in time_alternating(each, tokens, prompt.length, rounds, WARMUP_ROUNDS, log)
    ]
    _refuse_other_files(compared_models, files)
    columns = (compared_models, dtypes, costs, sizes, runtimes, files, changed, accuracies, answers, timed)
    raw = [RawMeasurement(*each) for each in zip(*columns, strict=True)]
    rows = tuple(_measurement(model, raw[0], _baseline(model, raw), prompt, seed) for model in raw)
    settings: dict[str, str | int] = {
        "device": device,
        "prompt_length": prompt.length,
        "prompt_length_asked": prompt_length,
        "decode_tokens": prompt.decoded,
        "decode_tokens_asked": decode_tokens,
        "rounds": rounds,
        "warmup_rounds": WARMUP_ROUNDS,
        "resamples": RESAMPLES,
        "resampled": "documents" if grouped(windows.documents) else "windows",
        **({} if together else {"in_memory": "one at a time"}),
    }
    return Measurements(rows, tuple(accuracies), settings, _asked(questions, raw[0].answers))


def _check(
    compared_models: Sequence[ComparedModel], windows: Windows, prompt_length: int, decode_tokens: int, rounds: int
) -> None:
    labels = [compared.label for compared in compared_models]
    if not compared_models or compared_models[0].role != "original":
        raise StreamlineError("validate: the first model must be the original")
    if len(set(labels)) < len(labels):
        raise StreamlineError(f"validate: two models have one label: {', '.join(labels)}")
    for name, value, least in (
        ("prompt-length", prompt_length, 1),
        ("decode-tokens", decode_tokens, 1),
        ("rounds", rounds, 2),
        ("eval-samples", windows.ids.shape[0], 2),
        ("length", windows.ids.shape[1], 2),
    ):
        if value < least:
            raise StreamlineError(f"{name} {value}: must be at least {least}")


def _refuse_other_files(compared_models: Sequence[ComparedModel], files: Sequence[dict[str, str]]) -> None:
    for compared, before in zip(compared_models, files, strict=True):
        after = model_hashes(compared.source)
        for name in sorted({*before, *after}):
            if before.get(name) != after.get(name):
                raise StreamlineError(f"{compared.label}: {name} was changed while it was measured; measure it again")


def _source_fingerprint(compared: ComparedModel) -> str:
    if is_artifact(compared.source.folder):
        return Artifact.read(compared.source.folder).source_fingerprint
    return fingerprint(compared.source)


def _computed(compared: ComparedModel, config: PreTrainedConfig, dtype: str) -> tuple[str, Cost]:
    """The name of the dtype or quantizer that a model computes with, and its cost.

    `dtype` applies to float checkpoints.
    """
    if not is_artifact(compared.source.folder):
        quantized = quantization_name(config)
        if quantized is None:
            return dtype, cost_of(config, dtype)
        read = stored_weight_bytes(compared.source.folder, config)
        return quantized, replace(cost_of(config, stored_dtype(compared.source)), weight_bytes=read)
    artifact = Artifact.read(compared.source.folder)
    return artifact.precision, replace(cost_of(config, artifact.dtype), weight_bytes=artifact.weight_bytes)


def _bytes_in_memory(compared: ComparedModel, config: PreTrainedConfig, cost: Cost, on_disk: int) -> int:
    """The bytes that a model's weights take in memory. A float checkpoint is converted to the type it computes in."""
    if is_artifact(compared.source.folder) or quantization_name(config) is not None:
        return on_disk
    return cost.parameters * cost.element_bytes


def _clip(length: int, decoded: int, room: int) -> TimedTokens:
    """Reduce both numbers so that they fit into `room` tokens: at most half for decoding, the rest for the prompt."""
    decoded = min(decoded, room // 2)
    return TimedTokens(min(length, room - decoded), decoded)


def _judged(
    compared_models: Sequence[ComparedModel],
    windows: Windows,
    questions: Questions | None,
    dtype: str,
    device: str,
    together: bool,
) -> tuple[list[str], list[Accuracy], list[Answers] | list[None]]:
    openers = [
        partial(open_runner, str(each.source.folder), dtype, device, trust_remote_code=each.trust_remote_code)
        for each in compared_models
    ]
    labels = [compared.label for compared in compared_models]
    if not together:
        return measure_one_at_a_time(openers, labels, windows, questions)
    runners = [open_model() for open_model in openers]
    runtimes = [runner.runtime for runner in runners]
    accuracies = measure_accuracy(runners, labels, windows)
    answers = [None] * len(runners) if questions is None else answer_questions(runners, labels, questions)
    # The models are timed next, in other processes, which need the memory.
    runners.clear()
    gc.collect()
    return runtimes, accuracies, answers


def _asked(questions: Questions | None, original: Answers | None) -> dict[str, str | int | float] | None:
    if questions is None or original is None:
        return None
    return {
        "questions_file": questions.file,
        "questions": len(questions.items),
        "questions_fingerprint": questions.fingerprint,
        "questions_effective": original.effective_questions,
    }


def _baseline(model: RawMeasurement, raw: Sequence[RawMeasurement]) -> RawMeasurement:
    same = [each for each in raw if each.compared.role == "original" and each.runtime == model.runtime]
    return same[0] if same else raw[0]


def _measurement(
    model: RawMeasurement, original: RawMeasurement, baseline: RawMeasurement, prompt: TimedTokens, seed: int
) -> Measurement:
    own: Timing = model.timed.timing
    other: Timing = baseline.timed.timing
    # The mean context length over the decoded tokens.
    context = prompt.length + (prompt.decoded + 1) / 2
    return Measurement(
        label=model.compared.label,
        path=model.compared.path,
        commit=model.compared.source.commit,
        role=model.compared.role,
        runtime=model.runtime,
        dtype=model.dtype,
        baseline=baseline.compared.label,
        parameters=model.cost.parameters,
        live_parameters=model.cost.live_parameters,
        layers=model.cost.layers,
        attention_layers=model.cost.attention_layers,
        kv_bytes_per_token=model.cost.kv_bytes_per_token,
        disk_bytes=model.disk_bytes,
        size_ratio=model.disk_bytes / baseline.disk_bytes,
        perplexity=model.accuracy.perplexity(seed),
        perplexity_ratio=model.accuracy.perplexity_ratio(original.accuracy, seed),
        kl=model.accuracy.mean_kl(seed),
        agreement=model.accuracy.mean_agreement(seed),
        prefill_ms=median_time(own.prefill_ms, seed),
        decode_ms=median_time(own.decode_ms, seed),
        prefill_speedup=speedup(other.prefill_ms, own.prefill_ms, seed),
        decode_speedup=speedup(other.decode_ms, own.decode_ms, seed),
        ideal_prefill_speedup=baseline.cost.prefill_flops(prompt.length) / model.cost.prefill_flops(prompt.length),
        ideal_decode_speedup=baseline.cost.decode_bytes(context) / model.cost.decode_bytes(context),
        peak_bytes=model.timed.peak_bytes,
        question_accuracy=model.answers.accuracy(seed) if model.answers else None,
        stability=model.answers.stability(original.answers, seed) if model.answers and original.answers else None,
        files=model.files,
        changed=model.changed,
    )

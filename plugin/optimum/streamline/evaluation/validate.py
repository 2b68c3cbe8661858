"""Measuring models against their original in one run: the steps, in order.

Each step has a file of its own; this one pairs every model with what it is compared with. It knows nothing of how
a candidate was made.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from optimum.streamline.checkpoints.artifact import Artifact, is_artifact
from optimum.streamline.checkpoints.loading import check_checkpoint, stored_dtype
from optimum.streamline.checkpoints.provenance import changed_files, model_hashes
from optimum.streamline.checkpoints.source import ModelSource, fingerprint
from optimum.streamline.errors import StreamlineError
from optimum.streamline.models.quantization_config import quantization_name
from optimum.streamline.recipe.recipe import Budget, Judge
from optimum.streamline.runtime.opening import open_runner
from optimum.streamline.system.environment import describe_machine
from optimum.streamline.text.tokenizer_checks import compare_tokenizers
from optimum.streamline.text.windows import Windows

from .accuracy import Accuracy, measure_accuracy
from .intervals import RESAMPLES, grouped
from .latency import Timing, median_time, speedup
from .multiple_choice import Answers, Questions, ask
from .results import Measurement, Report, Role
from .theoretical_cost import Cost, cost_of, disk_bytes, stored_weight_bytes
from .timing_processes import Job, Timed, time_alternating
from .verdict import judge

WARMUP_ROUNDS = 2


@dataclass(frozen=True)
class ComparedModel:
    """A model to measure.

    Args:
        label: What the report calls it; each subject has its own.
        path: A checkpoint's folder or Hub id, or an artifact's folder.
        role: Whether it is the original, in whatever runtime, or made from it.
        cache_dir: Where Hub downloads are kept; transformers' own place by default.
        trust_remote_code: Whether code from the checkpoint may run.
        revision: Of a Hub id, as `ModelSource` has it.
    """

    label: str
    path: str
    role: Role = "candidate"
    cache_dir: str | None = None
    trust_remote_code: bool = False
    revision: str | None = None

    @property
    def source(self) -> ModelSource:
        """Where its files are read from; an artifact's folder holds its checkpoint's config."""
        return ModelSource(self.path, self.cache_dir, self.trust_remote_code, self.revision)


@dataclass(frozen=True)
class Prompt:
    """How many tokens are fed at once, and how many one by one after them."""

    length: int
    decoded: int


@dataclass(frozen=True)
class Facts:
    """What is known of a subject before and after it was run."""

    compared: ComparedModel
    dtype: str
    cost: Cost
    disk_bytes: int
    runtime: str
    files: dict[str, str]
    changed: tuple[str, ...]
    accuracy: Accuracy
    answers: Answers | None
    timed: Timed


def compared_models_of(original: ModelSource, candidates: Sequence[str]) -> list[ComparedModel]:
    """Subjects named after their folders, or by their whole paths where two folders have one name.

    Args:
        original: The first; its cache and its leave to run code are those of all, its revision is its own.
        candidates: Folders of checkpoints and exports, and Hub ids, also as `name@revision`.
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


def recognise(compared_models: Sequence[ComparedModel]) -> list[ComparedModel]:
    """The subjects, with the role `original` for every float export of the first one's very weights."""
    exports = [compared for compared in compared_models[1:] if _is_float_export(compared)]
    if not exports:
        return list(compared_models)
    original = _source_fingerprint(compared_models[0])
    same = [compared for compared in exports if _source_fingerprint(compared) == original]
    return [replace(compared, role="original") if compared in same else compared for compared in compared_models]


def _is_float_export(compared: ComparedModel) -> bool:
    """Whether it is an export as it was written, which nothing made less than its checkpoint."""
    if not is_artifact(compared.source.folder):
        return False
    return Artifact.read(compared.source.folder).quantize == "none" and not changed_files(compared.source)


@dataclass(frozen=True)
class Measured:
    """What was found of the subjects, in their order.

    Args:
        rows: One a subject.
        accuracies: The sums over each window that the rows' figures are of.
        settings: As in `Report`.
        questions: As in `Report`.
    """

    rows: tuple[Measurement, ...]
    accuracies: tuple[Accuracy, ...]
    settings: dict[str, str | int]
    questions: dict[str, str | int | float] | None


def validate(
    compared_models: Sequence[ComparedModel], windows: Windows, budget: Budget, judged_by: Judge = "bound", **how: Any
) -> Report:
    """Measure every subject against the original, all in this run, and judge the candidates.

    Args:
        subjects: As in `measure`.
        windows: As in `measure`.
        budget: What a candidate may cost, and must bring.
        judged_by: What must be within it, as in `verdict.judge`.
        how: The other arguments of `measure`.

    Raises:
        StreamlineError: as `measure`.
        WorkerError: as `measure`.
    """
    measured = measure(compared_models, windows, **how)
    machine = describe_machine(how.get("device", "cpu"))
    verdict, seed = judge(measured.rows, budget, judged_by), how.get("seed", 0)
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
    prompt_length: int = 256,
    decode_tokens: int = 32,
    rounds: int = 10,
    log: Path | None = None,
    notify: Callable[[str], None] = print,
) -> Measured:
    """Measure every subject against the original, all in this run.

    Accuracy is held against the first subject. Speed and size are held against the original in the same runtime
    where one is among the subjects, against the first otherwise; the row names which.

    Args:
        subjects: The original first. An export of it is recognised as the original in another runtime.
        windows: Text that nothing was chosen on; the tokens that are timed come from it too.
        questions: Multiple-choice questions (`multiple_choice.read_questions`): accuracy on them, and stability.
        dtype: What checkpoints are computed in; an artifact has its own.
        seed: Of the bootstrap.
        prompt_length: Tokens of the timed prompt; clipped, and recorded so, to what all models and the text allow.
        decode_tokens: Tokens decoded one by one after it; clipped likewise.
        rounds: Timed rounds, each one prefill and one decode of every subject in turn.
        log: File to append to what the timing processes' libraries say.
        say: What is told that a user should know of the comparison.

    Raises:
        StreamlineError: the subjects, their tokenizers, the text or the settings do not allow a comparison, or a model
            cannot be run.
        WorkerError: a process that timed a model died.
    """
    compared_models = recognise(compared_models)
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
    runtimes, accuracies, answers = _judged(compared_models, windows, questions, dtype, device)
    tokens = windows.ids.flatten()[None, : prompt.length + prompt.decoded].numpy()
    jobs = [Job(each.label, str(each.source.folder), dtype, device, each.trust_remote_code) for each in compared_models]
    timed = time_alternating(jobs, tokens, prompt.length, rounds, WARMUP_ROUNDS, log)
    sizes = [disk_bytes(compared.source.folder) for compared in compared_models]
    _refuse_other_files(compared_models, files)
    columns = (compared_models, dtypes, costs, sizes, runtimes, files, changed, accuracies, answers, timed)
    facts = [Facts(*each) for each in zip(*columns, strict=True)]
    rows = tuple(_measurement(own, facts[0], _baseline(own, facts), prompt, seed) for own in facts)
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
    }
    return Measured(rows, tuple(accuracies), settings, _asked(questions, facts[0].answers))


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
    """What a subject is computed in, in a word, and its cost; `dtype` is that of checkpoints in float."""
    if not is_artifact(compared.source.folder):
        quantized = quantization_name(config)
        if quantized is None:
            return dtype, cost_of(config, dtype)
        read = stored_weight_bytes(compared.source.folder, config)
        return quantized, replace(cost_of(config, stored_dtype(compared.source)), weight_bytes=read)
    artifact = Artifact.read(compared.source.folder)
    return artifact.precision, replace(cost_of(config, artifact.dtype), weight_bytes=artifact.weight_bytes)


def _clip(length: int, decoded: int, room: int) -> Prompt:
    """At most half of the room goes to decoding, and what is left to the prompt."""
    decoded = min(decoded, room // 2)
    return Prompt(min(length, room - decoded), decoded)


def _judged(
    compared_models: Sequence[ComparedModel], windows: Windows, questions: Questions | None, dtype: str, device: str
) -> tuple[list[str], list[Accuracy], list[Answers] | list[None]]:
    runners = [
        open_runner(str(each.source.folder), dtype, device, trust_remote_code=each.trust_remote_code)
        for each in compared_models
    ]
    runtimes = [runner.runtime for runner in runners]
    labels = [compared.label for compared in compared_models]
    accuracies = measure_accuracy(runners, labels, windows)
    answers = [None] * len(runners) if questions is None else ask(runners, labels, questions)
    # The models are timed next, in processes of their own: this one's copies must not crowd them.
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
        "questions_effective": original.effective,
    }


def _baseline(own: Facts, facts: Sequence[Facts]) -> Facts:
    same = [each for each in facts if each.compared.role == "original" and each.runtime == own.runtime]
    return same[0] if same else facts[0]


def _measurement(own: Facts, original: Facts, baseline: Facts, prompt: Prompt, seed: int) -> Measurement:
    mine: Timing = own.timed.timing
    theirs: Timing = baseline.timed.timing
    # The middle of the decoded tokens sees the mean context.
    context = prompt.length + (prompt.decoded + 1) / 2
    return Measurement(
        label=own.compared.label,
        path=own.compared.path,
        commit=own.compared.source.commit,
        role=own.compared.role,
        runtime=own.runtime,
        dtype=own.dtype,
        baseline=baseline.compared.label,
        parameters=own.cost.parameters,
        live_parameters=own.cost.live_parameters,
        layers=own.cost.layers,
        attention_layers=own.cost.attention_layers,
        kv_bytes_per_token=own.cost.kv_bytes_per_token,
        disk_bytes=own.disk_bytes,
        size_ratio=own.disk_bytes / baseline.disk_bytes,
        perplexity=own.accuracy.perplexity(seed),
        perplexity_ratio=own.accuracy.perplexity_ratio(original.accuracy, seed),
        kl=own.accuracy.mean_kl(seed),
        agreement=own.accuracy.mean_agreement(seed),
        prefill_ms=median_time(mine.prefill_ms, seed),
        decode_ms=median_time(mine.decode_ms, seed),
        prefill_speedup=speedup(theirs.prefill_ms, mine.prefill_ms, seed),
        decode_speedup=speedup(theirs.decode_ms, mine.decode_ms, seed),
        ideal_prefill_speedup=baseline.cost.prefill_flops(prompt.length) / own.cost.prefill_flops(prompt.length),
        ideal_decode_speedup=baseline.cost.decode_bytes(context) / own.cost.decode_bytes(context),
        peak_bytes=own.timed.peak_bytes,
        question_accuracy=own.answers.accuracy(seed) if own.answers else None,
        stability=own.answers.stability(original.answers, seed) if own.answers and original.answers else None,
        files=own.files,
        changed=own.changed,
    )

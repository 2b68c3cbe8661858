"""The whole chain in order: prune, export original and candidate, validate, report. Resumes where it stopped.

A step's output takes its name only when it is whole, so a step whose output is there is a step that is done.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from optimum.streamline.checkpoints.loading import read_config
from optimum.streamline.checkpoints.provenance import changed_files, model_hashes
from optimum.streamline.checkpoints.record_file import RECORD_FILE, read_record
from optimum.streamline.editing.plan import PlannedLayer
from optimum.streamline.errors import StreamlineError
from optimum.streamline.evaluation.results import Report
from optimum.streamline.evaluation.validate import ComparedModel, validate
from optimum.streamline.evaluation.verdict import judge
from optimum.streamline.model_files.artifact import Artifact, is_artifact
from optimum.streamline.model_files.source import ModelSource, fingerprint
from optimum.streamline.models.linear_modules import linear_modules_of, meta_model
from optimum.streamline.models.module_patterns import renumbered_names, select_modules
from optimum.streamline.models.quantization_config import float_config
from optimum.streamline.quantization.quantizers import NONE, QUANTIZERS
from optimum.streamline.recipe.recipe import Recipe
from optimum.streamline.reporting.files import write_report
from optimum.streamline.scoring.similarity import Scores
from optimum.streamline.system.atomic_output import REPORT_FILE, check_output, refuse_own_input, write_file
from optimum.streamline.system.distributed import process_count
from optimum.streamline.system.environment import describe_machine
from optimum.streamline.system.library_logs import LOG_FILE, captured_logs
from optimum.streamline.system.notify import Notify
from optimum.streamline.text.windows import Windows

from .exporting import CALIBRATION_WINDOWS, check_exportable, export, graph_quantization, has_graph, score_graph
from .preflight import check_recipe
from .prune import prune
from .quantize import QUANTIZATION_FILE
from .texts import Texts, inputs_of, read_texts

STEPS_FILE = "steps.json"
EXPORT, ORIGINAL_EXPORT = "onnx", "onnx-original"


def run(source: ModelSource, recipe: Recipe, out: Path, *, overwrite: bool, verbose: bool, notify: Notify) -> Report:
    """Everything the recipe asks for, into `out`; called again, what is done is not done again.

    `out` is the checkpoint itself; beside its files stand `onnx`, `onnx-original` and the report.

    Raises:
        StreamlineError: bad input, or `out` holds something else than an earlier stage of this very run.
    """
    if process_count() > 1:
        raise StreamlineError("run: works in one process; prune is the command that several can share")
    check_recipe(source, recipe)
    refuse_own_input(out, inputs_of(source, recipe))
    check_exportable(recipe)
    texts = read_texts(source, recipe)
    chain = _Chain(source, recipe, out, verbose, notify)
    if overwrite or not chain.resumes(texts):
        chain.step("prune", lambda: chain.prune(overwrite))
    if recipe.export.format != "none":
        chain.export(source.model, ORIGINAL_EXPORT)
        chain.export(str(out), EXPORT, texts)
    return chain.report(texts.judged_on)


class _Chain:
    """One run's place on disk, and how far it has come."""

    def __init__(self, source: ModelSource, recipe: Recipe, out: Path, verbose: bool, notify: Notify) -> None:
        self._source, self._recipe, self._out, self._verbose, self._notify = source, recipe, out, verbose, notify

    def resumes(self, texts: Texts) -> bool:
        """Whether `out` is the checkpoint this very run makes; refuses an `out` that is something else."""
        record = read_record(str(self._out))
        if record is None:
            check_output(self._out)
            return False
        other = self._difference(record, texts)
        if other is not None:
            raise StreamlineError(f"output {self._out}: {other}; choose another folder, or pass --overwrite")
        self._notify(f"{self._out} is there already: going on from it")
        return True

    def _difference(self, record: dict[str, Any], texts: Texts) -> str | None:
        if record["recipe_fingerprint"] != self._recipe.fingerprint:
            return "made from another recipe"
        if record["source"]["fingerprint"] != fingerprint(self._source):
            return "made from another model"
        for purpose, windows in texts.chosen_on.items():
            if record["data"].get(purpose, {}).get("fingerprint") != windows.fingerprint:
                return f"made from another {purpose} text, though of the same name"
        if (self._out / QUANTIZATION_FILE).is_file() and self._recipe.quantization.quantizer not in QUANTIZERS:
            return "quantized since it was made"
        changed = changed_files(ModelSource(str(self._out)))
        if changed is None:
            return f"{RECORD_FILE} has no hashes of the files, so they cannot be told from others"
        return changed[0] if changed else None

    def step(self, name: str, work: Callable[[], object]) -> None:
        """Do one step, and keep how long it took."""
        start = time.monotonic()
        work()
        seconds = {**self._seconds(), name: round(time.monotonic() - start, 1)}
        write_file(self._out / STEPS_FILE, json.dumps(seconds, indent=1) + "\n")

    def prune(self, overwrite: bool) -> None:
        """Make the checkpoint; its layers are scored in the quantized graph of the original where that comes first."""
        source, recipe, how = self._source, self._recipe, graph_quantization(self._recipe)
        options: dict[str, Any] = {"overwrite": overwrite, "verbose": self._verbose, "notify": self._notify}
        if not recipe.quantize_first or how == NONE:
            prune(source, recipe, self._out, **options)
            return

        def scored(windows: Windows) -> Scores:
            self._notify(f"quantizing the graph of {source.model} ({how}), to score its layers in it")
            with TemporaryDirectory(dir=self._out.absolute().parent, prefix=f".{self._out.name}.") as scratch:
                graph = self._export(source.model, Path(scratch) / EXPORT, how, recipe.excluded, None)
                return score_graph(graph, windows)

        prune(source, recipe, self._out, **options, scored=scored)

    def export(self, checkpoint: str, name: str, texts: Texts | None = None) -> None:
        """Export a checkpoint into a folder of `out`, unless it is there.

        Args:
            texts: Those of the run, for an export that is to be quantized as the recipe says.
        """
        folder, how, exclude = self._out / name, NONE, list[str]()
        if texts is not None and (how := graph_quantization(self._recipe)) != NONE:
            exclude = self._excluded()
        if is_artifact(folder):
            if self._is_whole_export(folder, checkpoint, how, exclude):
                return
            shutil.rmtree(folder)
        # A report of what is made anew is a report no longer.
        (self._out / REPORT_FILE).unlink(missing_ok=True)
        self._notify(f"exporting {checkpoint} to {folder}")
        windows = texts.chosen_on["calibration"] if texts else None
        self.step(f"export {name}", lambda: self._tell(self._export(checkpoint, folder, how, exclude, windows)))

    def _excluded(self) -> list[str]:
        """The modules of the checkpoint that an export leaves in float, by their new names."""
        record = read_record(str(self._out)) or {}
        both = (read_config(each) for each in (self._source, ModelSource(str(self._out))))
        asked, there = (linear_modules_of(meta_model(float_config(config))) for config in both)
        kept = renumbered_names(
            sorted(select_modules(asked, self._recipe.excluded)), [each["originals"] for each in record["layers"]]
        )
        return [new for new, _ in kept if new in there]

    def _tell(self, artifact: Artifact) -> None:
        for line in artifact.findings():
            self._notify(line)

    def _is_whole_export(self, folder: Path, checkpoint: str, how: str, exclude: list[str]) -> bool:
        artifact = Artifact.read(folder)
        whole = has_graph(artifact) and changed_files(ModelSource(str(folder))) == []
        same = artifact.source_fingerprint == fingerprint(self._source.with_model(checkpoint))
        quantized = (artifact.quantize, list(artifact.quantize_exclude)) == (how, exclude)
        return whole and same and quantized and artifact.dtype == (self._recipe.dtype or "fp32")

    def _export(self, checkpoint: str, folder: Path, how: str, exclude: list[str], windows: Windows | None) -> Artifact:
        return export(
            checkpoint,
            folder,
            format=self._recipe.export.format,
            dtype=self._recipe.dtype or "fp32",
            device=self._recipe.device,
            verbose=self._verbose,
            quantize=how,
            quantize_exclude=exclude,
            windows=windows and windows.part(0, min(CALIBRATION_WINDOWS, len(windows.ids))),
            **self._source.with_model(checkpoint).options(),
        )

    def report(self, windows: Windows) -> Report:
        """The report: the one that is there if it is of these very files, this text and this recipe, else a new one.

        A verdict that is there is not believed: the rows of the report are judged again.
        """
        compared_models = self._compared_models()
        earlier = self._earlier_report(compared_models, windows)
        if earlier is None:
            report = self._measured(compared_models, windows)
        else:
            verdict = judge(earlier.rows, self._recipe.budget, self._recipe.evaluation.judge)
            report = dataclasses.replace(earlier, verdict=verdict, recipe=dataclasses.asdict(self._recipe))
            judged = "" if report.to_json() == earlier.to_json() else ": judged anew"
            self._notify(f"{self._out / REPORT_FILE} is there already, of these very files{judged}")
        write_report(report, self._out)
        return report

    def _measured(self, compared_models: list[ComparedModel], windows: Windows) -> Report:
        self._notify(windows.line("evaluation"))
        self._notify("validating against the original")
        start = time.monotonic()
        log = self._out / LOG_FILE
        with captured_logs(log, self._verbose):
            report = validate(
                compared_models,
                windows,
                self._recipe.budget,
                self._recipe.evaluation.judge,
                dtype=self._recipe.dtype or "fp32",
                device=self._recipe.device,
                seed=self._recipe.seed,
                log=None if self._verbose else log,
                notify=self._notify,
            )
        steps = {**self._seconds(), "validate": round(time.monotonic() - start, 1)}
        record = read_record(str(self._out)) or {}
        return dataclasses.replace(
            report,
            scores=tuple(record["scores"]["block_influence"]),
            layers=tuple(PlannedLayer(layer["kind"], tuple(layer["originals"])) for layer in record["layers"]),
            steps=steps,
            recipe=dataclasses.asdict(self._recipe),
        )

    def _earlier_report(self, compared_models: list[ComparedModel], windows: Windows) -> Report | None:
        """The report that is there, if it is what was written, of these files, this text and these settings."""
        file = self._out / REPORT_FILE
        if not file.is_file():
            return None
        try:
            report = Report.from_json(file.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, StreamlineError) as error:
            self._notify(f"{file}: {error}; measuring anew")
            return None
        measured = {row.label: row.files for row in report.rows}
        same_files = measured == {compared.label: model_hashes(compared.source) for compared in compared_models}
        same_recipe = _measures(report.recipe or {}) == _measures(dataclasses.asdict(self._recipe))
        same_machine = report.machine == describe_machine(self._recipe.device)
        if same_files and same_recipe and same_machine and report.data == windows.describe():
            return report
        self._notify(f"{file} is of other files, text, settings, machine or versions; measuring anew")
        return None

    def _compared_models(self) -> list[ComparedModel]:
        source = self._source
        original = ComparedModel(
            "original", source.model, "original", source.cache_dir, source.trust_remote_code, source.revision
        )
        compared_models = [
            original,
            ComparedModel("candidate", str(self._out), trust_remote_code=source.trust_remote_code),
        ]
        if self._recipe.export.format != "none":
            compared_models += [
                ComparedModel(f"original, {self._recipe.export.format}", str(self._out / ORIGINAL_EXPORT), "original"),
                ComparedModel(f"candidate, {self._recipe.export.format}", str(self._out / EXPORT)),
            ]
        return compared_models

    def _seconds(self) -> dict[str, Any]:
        file = self._out / STEPS_FILE
        # How long steps took decides nothing: a file that cannot be read is one that is not there.
        with suppress(OSError, ValueError):
            seconds = json.loads(file.read_text(encoding="utf-8"))
            return seconds if isinstance(seconds, dict) else {}
        return {}


def _measures(recipe: dict[str, Any]) -> dict[str, Any]:
    """A recipe's fields, but for those that decide nothing but how the figures are judged."""
    evaluation = {key: value for key, value in recipe.get("evaluation", {}).items() if key != "judge"}
    return {**recipe, "budget": None, "evaluation": evaluation}

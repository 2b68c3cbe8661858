"""All steps of a run: prune, export the original and the candidate, validate, report.

The output of a step gets its final name only when it is complete. So a step is finished if its output exists, and a
second run continues after the last finished step.
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
from optimum.streamline.editing.apply import renamed_modules
from optimum.streamline.editing.plan import PlannedLayer
from optimum.streamline.errors import StreamlineError
from optimum.streamline.evaluation.contamination import refuse_seen_text
from optimum.streamline.evaluation.results import Report
from optimum.streamline.evaluation.validate import ComparedModel, validate
from optimum.streamline.evaluation.verdict import judge
from optimum.streamline.model_files.artifact import Artifact, is_artifact
from optimum.streamline.model_files.source import ModelSource, fingerprint
from optimum.streamline.models.linear_modules import linear_modules_of, meta_model
from optimum.streamline.models.module_patterns import select_modules
from optimum.streamline.models.quantization_config import float_config, quantization_name
from optimum.streamline.quantization.quantizers import NONE, QUANTIZERS
from optimum.streamline.recipe.quantities import memory_limit
from optimum.streamline.recipe.recipe import Recipe
from optimum.streamline.reporting.files import write_report
from optimum.streamline.scoring.similarity import Scores
from optimum.streamline.system.atomic_output import REPORT_FILE, check_output, refuse_own_input, write_file
from optimum.streamline.system.distributed import process_count
from optimum.streamline.system.environment import describe_machine
from optimum.streamline.system.library_logs import LOG_FILE, captured_logs
from optimum.streamline.system.notify import Notify
from optimum.streamline.text.windows import Windows

from .exporting import (
    CALIBRATION_WINDOWS,
    check_exportable,
    export,
    graph_quantization,
    has_graph,
    is_calibrated,
    score_graph,
)
from .preflight import check_recipe
from .prune import prune
from .quantize import QUANTIZATION_FILE
from .texts import Texts, inputs_of, read_texts

STEPS_FILE = "steps.json"
EXPORT, ORIGINAL_EXPORT = "onnx", "onnx-original"


def run(source: ModelSource, recipe: Recipe, out: Path, *, overwrite: bool, verbose: bool, notify: Notify) -> Report:
    """Run all steps of the recipe; skip those already finished.

    Args:
        source: The original.
        recipe: The recipe.
        out: The folder of the checkpoint. It also gets the exports (`onnx`, `onnx-original`) and the report.
        overwrite: Whether an earlier output in `out` is replaced, instead of continued.
        verbose: Whether messages of other libraries go to the terminal, instead of to log files in `out`.
        notify: Gets one line for each finding and each slow step.

    Raises:
        StreamlineError: bad input, or `out` holds something other than an earlier part of this run.
    """
    if process_count() > 1:
        raise StreamlineError("run: must run in one process; only prune can use several")
    check_recipe(source, recipe)
    refuse_own_input(out, inputs_of(source, recipe))
    check_exportable(recipe)
    earlier = None if overwrite else read_record(str(out))
    if earlier is None:
        check_output(out, overwrite)  # before the texts are read, which can take minutes
    texts = read_texts(source, recipe, is_calibrated(recipe.export.format, graph_quantization(recipe)))
    if texts.calibration is not None and "calibration" not in texts.chosen_on:
        notify(texts.calibration.line("calibration"))
    steps = _Steps(source, recipe, out, verbose, notify)
    if earlier is None:
        steps.timed("prune", lambda: steps.prune(overwrite, texts.judged_on))
    else:
        steps.resume(earlier, texts)
    if recipe.export.format != "none":
        steps.export(source.model, ORIGINAL_EXPORT)
        steps.export(str(out), EXPORT, texts)
    return steps.report(texts.judged_on)


class _Steps:
    """The steps of one run, and its output folder."""

    def __init__(self, source: ModelSource, recipe: Recipe, out: Path, verbose: bool, notify: Notify) -> None:
        self._source, self._recipe, self._out, self._verbose, self._notify = source, recipe, out, verbose, notify

    def resume(self, record: dict[str, Any], texts: Texts) -> None:
        """Continue from the checkpoint in `out`, which has this record.

        Raises:
            StreamlineError: it is not the checkpoint of this run.
        """
        other = self._difference(record, texts)
        if other is not None:
            raise StreamlineError(f"output {self._out}: {other}; choose another folder, or pass --overwrite")
        refuse_seen_text(str(self._out), texts.judged_on)  # also text that was sampled, which `texts` does not hold
        self._notify(f"{self._out} exists already: continuing from it")

    def _difference(self, record: dict[str, Any], texts: Texts) -> str | None:
        """Why the checkpoint in `out`, with this record, is not the one of this run; `None` if it is."""
        if record["recipe_fingerprint"] != self._recipe.fingerprint:
            return "made from another recipe"
        if record["source"]["fingerprint"] != fingerprint(self._source):
            return "made from another model"
        for purpose, windows in texts.chosen_on.items():
            if record["data"].get(purpose, {}).get("fingerprint") != windows.fingerprint:
                return f"made from another {purpose} text of the same name"
        if texts.prompts and record["data"].get("heal", {}).get("sampled") != texts.prompts.describe():
            return "healed on text that was sampled from other prompts"
        if (self._out / QUANTIZATION_FILE).is_file() and self._recipe.quantization.quantizer not in QUANTIZERS:
            return "quantized since it was made"
        changed = changed_files(ModelSource(str(self._out)))
        if changed is None:
            return f"{RECORD_FILE} has no hashes of the files, so changed files would not be noticed"
        return changed[0] if changed else None

    def timed(self, name: str, work: Callable[[], object]) -> None:
        """Do the work of one step, and write its duration to `steps.json`."""
        start = time.monotonic()
        work()
        seconds = {**self._seconds(), name: round(time.monotonic() - start, 1)}
        write_file(self._out / STEPS_FILE, json.dumps(seconds, indent=1) + "\n")

    def prune(self, overwrite: bool, judged_on: Windows) -> None:
        """Make the pruned checkpoint.

        If the recipe quantizes a graph first, the layers are scored in the quantized graph of the original.
        """
        source, recipe, quantizer = self._source, self._recipe, graph_quantization(self._recipe)
        options: dict[str, Any] = {"overwrite": overwrite, "verbose": self._verbose, "notify": self._notify}
        options |= {"judged_on": judged_on, "exports": True}
        if not recipe.quantize_first or quantizer == NONE:
            prune(source, recipe, self._out, **options)
            return

        def scored(windows: Windows) -> Scores:
            self._notify(f"quantizing the ONNX graph of {source.model} ({quantizer}) to score its layers")
            with TemporaryDirectory(dir=self._out.absolute().parent, prefix=f".{self._out.name}.") as scratch:
                graph = self._export(source.model, Path(scratch) / EXPORT, quantizer, recipe.excluded, None)
                return score_graph(graph, windows)

        prune(source, recipe, self._out, **options, scored=scored)

    def export(self, checkpoint: str, name: str, texts: Texts | None = None) -> None:
        """Export a checkpoint into a folder of `out`, unless a complete export is there.

        Args:
            checkpoint: The checkpoint.
            name: The name of the folder.
            texts: The texts of the run, for the candidate, which is quantized as the recipe says. `None` for the
                original, which is not quantized.
        """
        folder, quantizer, exclude, windows = self._out / name, NONE, list[str](), None
        if texts is not None and (quantizer := graph_quantization(self._recipe)) != NONE:
            exclude = self._excluded()
            if is_calibrated(self._recipe.export.format, quantizer):
                windows = texts.calibration and texts.calibration.part(0, CALIBRATION_WINDOWS)
        if is_artifact(folder):
            if self._is_whole_export(folder, checkpoint, quantizer, exclude, windows):
                return
            shutil.rmtree(folder)
        # Delete the old report: it describes the export being replaced.
        (self._out / REPORT_FILE).unlink(missing_ok=True)
        self._notify(f"exporting {checkpoint} to {folder}")
        self.timed(
            f"export {name}",
            lambda: self._notify_findings(self._export(checkpoint, folder, quantizer, exclude, windows)),
        )

    def _excluded(self) -> list[str]:
        """The modules that the export leaves in float, by their names in the pruned checkpoint."""
        record = read_record(str(self._out)) or {}
        configs = (read_config(each) for each in (self._source, ModelSource(str(self._out))))
        old_modules, new_modules = (linear_modules_of(meta_model(float_config(config))) for config in configs)
        excluded = sorted(select_modules(old_modules, self._recipe.excluded))
        renamed = renamed_modules(excluded, _new_layers(record), read_config(self._source))
        return [new for new, _ in renamed if new in new_modules]

    def _notify_findings(self, artifact: Artifact) -> None:
        for line in artifact.findings():
            self._notify(line)

    def _is_whole_export(
        self, folder: Path, checkpoint: str, quantizer: str, exclude: list[str], windows: Windows | None
    ) -> bool:
        """Whether the export in `folder` is complete, unchanged, and made from this checkpoint with these options."""
        artifact = Artifact.read(folder)
        whole = has_graph(artifact) and changed_files(ModelSource(str(folder))) == []
        same = artifact.source_fingerprint == fingerprint(self._source.with_model(checkpoint))
        quantized = (artifact.quantize, list(artifact.quantize_exclude)) == (quantizer, exclude)
        calibrated_on = artifact.data.get("quantization", {}).get("fingerprint")
        quantized = quantized and calibrated_on == (windows and windows.fingerprint)
        return whole and same and quantized and artifact.dtype == (self._recipe.dtype or "fp32")

    def _export(
        self, checkpoint: str, folder: Path, quantizer: str, exclude: list[str], windows: Windows | None
    ) -> Artifact:
        limit, bounded = memory_limit(self._recipe.max_memory), dict[str, Any]()
        config = read_config(self._source.with_model(checkpoint))
        if limit is not None and self._recipe.export.format == "onnx" and quantization_name(config) is None:
            bounded["max_memory"] = limit
        return export(
            checkpoint,
            folder,
            **bounded,
            format=self._recipe.export.format,
            dtype=self._recipe.dtype or "fp32",
            device=self._recipe.device,
            verbose=self._verbose,
            quantize=quantizer,
            quantize_exclude=exclude,
            windows=windows,
            **self._source.with_model(checkpoint).options(),
        )

    def report(self, windows: Windows) -> Report:
        """Write the report.

        An existing report is reused if files, text, settings and machine are the same; else the models are measured.
        The measurements of a reused report are judged again, so a changed budget gives a new verdict.
        """
        compared_models = self._compared_models()
        earlier = self._earlier_report(compared_models, windows)
        if earlier is None:
            report = self._measured(compared_models, windows)
        else:
            verdict = judge(earlier.rows, self._recipe.budget, self._recipe.evaluation.judge)
            report = dataclasses.replace(earlier, verdict=verdict, recipe=dataclasses.asdict(self._recipe))
            judged = "" if report.to_json() == earlier.to_json() else "; judged again"
            self._notify(f"{self._out / REPORT_FILE} exists already, for the same files{judged}")
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
                max_memory=memory_limit(self._recipe.max_memory),
                log=None if self._verbose else log,
                notify=self._notify,
            )
        steps = {**self._seconds(), "validate": round(time.monotonic() - start, 1)}
        record = read_record(str(self._out)) or {}
        return dataclasses.replace(
            report,
            scores=tuple(record["scores"]["block_influence"]) if record["scores"] else None,
            layers=_new_layers(record),
            steps=steps,
            recipe=dataclasses.asdict(self._recipe),
        )

    def _earlier_report(self, compared_models: list[ComparedModel], windows: Windows) -> Report | None:
        """The existing report, if it is unchanged and describes the same files, text, settings and machine."""
        file = self._out / REPORT_FILE
        if not file.is_file():
            return None
        try:
            report = Report.from_json(file.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, StreamlineError) as error:
            self._notify(f"{file}: {error}; measuring again")
            return None
        measured = {row.label: row.files for row in report.rows}
        same_files = measured == {compared.label: model_hashes(compared.source) for compared in compared_models}
        same_recipe = _without_judging(report.recipe or {}) == _without_judging(dataclasses.asdict(self._recipe))
        same_machine = report.machine == describe_machine(self._recipe.device)
        # Models that were measured one at a time for a limit of memory may have room without it.
        limit = (report.recipe or {}).get("max_memory")
        same_room = "in_memory" not in report.settings or limit == self._recipe.max_memory
        if same_files and same_recipe and same_machine and same_room and report.data == windows.describe():
            return report
        self._notify(f"{file} describes other files, text, settings, machine or versions; measuring again")
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
        # The durations are for information only, so an unreadable file counts as a missing one.
        with suppress(OSError, ValueError):
            seconds = json.loads(file.read_text(encoding="utf-8"))
            return seconds if isinstance(seconds, dict) else {}
        return {}


def _new_layers(record: dict[str, Any]) -> tuple[PlannedLayer, ...]:
    """The layers of the pruned model, from its `streamline.json`."""
    return tuple(
        PlannedLayer(layer["kind"], tuple(layer["originals"]), layer.get("corrected", False))
        for layer in record["layers"]
    )


def _without_judging(recipe: dict[str, Any]) -> dict[str, Any]:
    """The fields of a recipe that affect the measurements, and not only the verdict."""
    evaluation = {key: value for key, value in recipe.get("evaluation", {}).items() if key != "judge"}
    return {**recipe, "budget": None, "evaluation": evaluation, "max_memory": None}

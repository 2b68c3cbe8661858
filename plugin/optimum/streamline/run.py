"""The whole chain in order: prune, export original and candidate, validate, report. Resumes where it stopped.

A step's output takes its name only when it is whole, so a step whose output is there is a step that is done.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .checkpoint import Source, fingerprint, read_record
from .errors import StreamlineError
from .logs import LOG_FILE, captured_logs
from .outputs import check_output, write_file
from .plan import Place
from .prune import Say, check_recipe, evaluation_windows, prune
from .recipe import Recipe
from .report import Report
from .report_files import REPORT_FILE, write_report
from .runner import Artifact, is_artifact
from .validation import Subject, validate
from .windows import Windows

STEPS_FILE = "steps.json"
EXPORT, ORIGINAL_EXPORT = "onnx", "onnx-original"


def run(source: Source, recipe: Recipe, out: Path, *, overwrite: bool, verbose: bool, say: Say) -> Report:
    """Everything the recipe asks for, into `out`; called again, what is done is not done again.

    `out` is the checkpoint itself; beside its files stand `onnx`, `onnx-original` and the report.

    Raises:
        StreamlineError: bad input, or `out` holds something else than an earlier stage of this very run.
    """
    check_recipe(source, recipe)
    if recipe.format != "none":
        from optimum.exporters.streamline import check_export

        check_export(recipe.format, recipe.dtype or "fp32", recipe.device)
    windows = evaluation_windows(source, recipe)
    chain = _Chain(source, recipe, out, verbose, say)
    if overwrite or not chain.resumes():
        chain.step("prune", lambda: prune(source, recipe, out, overwrite=overwrite, verbose=verbose, say=say))
    if recipe.format != "none":
        chain.export(source.model, ORIGINAL_EXPORT)
        chain.export(str(out), EXPORT)
    return chain.report(windows)


class _Chain:
    """One run's place on disk, and how far it has come."""

    def __init__(self, source: Source, recipe: Recipe, out: Path, verbose: bool, say: Say) -> None:
        self._source, self._recipe, self._out, self._verbose, self._say = source, recipe, out, verbose, say

    def resumes(self) -> bool:
        """Whether `out` is the checkpoint this very run makes; refuses an `out` that is something else."""
        record = read_record(str(self._out))
        if record is None:
            check_output(self._out)
            return False
        same_recipe = record["recipe_fingerprint"] == self._recipe.fingerprint
        if not same_recipe or record["source"]["fingerprint"] != fingerprint(
            self._source.model, self._source.cache_dir
        ):
            raise StreamlineError(
                f"output {self._out}: made from another {'model' if same_recipe else 'recipe'}; "
                "choose another folder, or pass --overwrite"
            )
        self._say(f"{self._out} is there already: going on from it")
        return True

    def step(self, name: str, work: Callable[[], object]) -> None:
        """Do one step, and keep how long it took."""
        start = time.monotonic()
        work()
        seconds = {**self._seconds(), name: round(time.monotonic() - start, 1)}
        write_file(self._out / STEPS_FILE, json.dumps(seconds, indent=1) + "\n")

    def export(self, checkpoint: str, name: str) -> None:
        """Export a checkpoint into a folder of `out`, unless it is there."""
        folder = self._out / name
        if is_artifact(folder):
            same = Artifact.read(folder).source_fingerprint == fingerprint(checkpoint, self._source.cache_dir)
            if same and Artifact.read(folder).dtype == (self._recipe.dtype or "fp32"):
                return
            shutil.rmtree(folder)
        self._say(f"exporting {checkpoint} to {folder}")
        self.step(f"export {name}", lambda: self._export(checkpoint, folder))

    def _export(self, checkpoint: str, folder: Path) -> None:
        from optimum.exporters.streamline import export_checkpoint

        export_checkpoint(
            checkpoint,
            folder,
            format=self._recipe.format,
            dtype=self._recipe.dtype or "fp32",
            device=self._recipe.device,
            verbose=self._verbose,
            **self._source.options(),
        )

    def report(self, windows: Windows) -> Report:
        """The report: the one that is there if it judges by this recipe, else a new one."""
        judged_by = dataclasses.asdict(self._recipe)
        file = self._out / REPORT_FILE
        if file.is_file():
            earlier = Report.from_json(file.read_text(encoding="utf-8"))
            if earlier.recipe == judged_by:
                self._say(f"{file} is there already")
                return earlier
        self._say("validating against the original")
        start = time.monotonic()
        log = self._out / LOG_FILE
        with captured_logs(log, self._verbose):
            report = validate(
                self._subjects(),
                windows,
                self._recipe.budget,
                dtype=self._recipe.dtype or "fp32",
                device=self._recipe.device,
                seed=self._recipe.seed,
                log=None if self._verbose else log,
            )
        steps = {**self._seconds(), "validate": round(time.monotonic() - start, 1)}
        record = read_record(str(self._out)) or {}
        report = dataclasses.replace(
            report,
            scores=tuple(record["scores"]["block_influence"]),
            layers=tuple(Place(layer["kind"], tuple(layer["originals"])) for layer in record["layers"]),
            steps=steps,
            recipe=judged_by,
        )
        write_report(report, self._out)
        return report

    def _subjects(self) -> list[Subject]:
        subjects = [Subject("original", self._source.model, "original"), Subject("candidate", str(self._out))]
        if self._recipe.format != "none":
            subjects += [
                Subject(f"original, {self._recipe.format}", str(self._out / ORIGINAL_EXPORT), "original"),
                Subject(f"candidate, {self._recipe.format}", str(self._out / EXPORT)),
            ]
        return subjects

    def _seconds(self) -> dict[str, Any]:
        file = self._out / STEPS_FILE
        seconds: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}
        return seconds

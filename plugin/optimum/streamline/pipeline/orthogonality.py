"""Measure whether pruning changes what quantization costs, in one run.

Compares the original, the pruned, the quantized, and the pruned and quantized model, in both orders.

It makes the models with the steps of `run`, measures them together, and reports the interactions. Only the report is
kept, not the models.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from tempfile import TemporaryDirectory

from optimum.streamline.checkpoints.loading import read_config
from optimum.streamline.errors import StreamlineError
from optimum.streamline.evaluation.accuracy import Accuracy
from optimum.streamline.evaluation.interaction import interaction
from optimum.streamline.evaluation.results import Interaction, Report
from optimum.streamline.evaluation.validate import ComparedModel, measure
from optimum.streamline.evaluation.verdict import judge
from optimum.streamline.model_files.artifact import Artifact
from optimum.streamline.model_files.source import ModelSource
from optimum.streamline.models.quantization_config import quantization_name
from optimum.streamline.quantization.quantizers import NONE, QUANTIZERS
from optimum.streamline.recipe.recipe import Recipe
from optimum.streamline.reporting.files import write_report
from optimum.streamline.system.atomic_output import check_output, refuse_own_input
from optimum.streamline.system.environment import describe_machine
from optimum.streamline.system.library_logs import captured_logs
from optimum.streamline.system.notify import Notify, silent

from .exporting import CALIBRATION_WINDOWS, check_exportable, export, graph_quantizers, score_graph
from .preflight import check_quantization, check_recipe
from .prune import prune
from .quantize import quantize
from .texts import Texts, inputs_of, read_texts

DENSE, PRUNED = "dense", "pruned"
FIRST, LAST = "quantize,prune", "prune,quantize"


def orthogonality(
    source: ModelSource,
    recipe: Recipe,
    quantizers: Sequence[str],
    out: Path,
    *,
    overwrite: bool = False,
    verbose: bool = False,
    notify: Notify = print,
) -> Report:
    """Measure how the removal of layers that a recipe describes meets each quantizer; writes the report into `out`.

    Args:
        recipe: What is removed and how it is healed; it says nothing of quantizing.
        quantizers: Keys of `quantizers.QUANTIZERS`, or of the exporters' `GRAPH_QUANTIZERS`; those run in ONNX Runtime.

    Raises:
        StreamlineError: bad input, or a model that cannot be made.
    """
    check_output(out, overwrite)
    refuse_own_input(out, inputs_of(source, recipe))
    _check(source, recipe, quantizers)
    texts = read_texts(source, recipe)
    out.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=out.absolute().parent, prefix=f".{out.name}.") as scratch:
        for purpose, windows in texts.chosen_on.items():
            notify(windows.line("healing" if purpose == "heal" else purpose))
        models = _Models(source, recipe, Path(scratch), texts, verbose, notify)
        interactions = [each for how in quantizers for each in models.make(how)]
        notify(texts.judged_on.line("evaluation"))
        notify(f"measuring {len(models.compared_models)} models")
        with captured_logs(None, verbose):
            measured = measure(
                list(models.compared_models.values()),
                texts.judged_on,
                dtype=recipe.dtype or "fp32",
                device=recipe.device,
                seed=recipe.seed,
                notify=notify,
            )
        found = dict(zip(models.compared_models, measured.accuracies, strict=True))
    # What the others were is gone with the scratch folder.
    rows = tuple(row if row.label == DENSE else replace(row, path="") for row in measured.rows)
    report = Report(
        rows,
        judge(rows, recipe.budget, recipe.evaluation.judge),
        measured.settings,
        describe_machine(recipe.device),
        texts.judged_on.describe(),
        recipe.seed,
        recipe=asdict(recipe),
        interactions=tuple(_measured(each, found, recipe.seed) for each in interactions),
    )
    write_report(report, out)
    return report


def _check(source: ModelSource, recipe: Recipe, quantizers: Sequence[str]) -> None:
    """Refuse what cannot be made, before anything is."""
    for field in ("quantize", "quantize_exclude", "steps", "format"):
        value = recipe.option(field)
        if value not in (None, NONE):
            raise StreamlineError(
                f"{field.replace('_', '-')} {value!r}: orthogonality makes every model itself; leave it out"
            )
    check_recipe(source, recipe)
    config = read_config(source)
    if name := quantization_name(config):
        raise StreamlineError(f"model {source.model!r}: is quantized ({name}) already; give the float model")
    for how in quantizers:
        asked = recipe.with_options(quantize=how, format="none" if how in QUANTIZERS else "onnx")
        check_quantization(asked, config)
        check_exportable(asked)


def _measured(asked: Interaction, found: Mapping[str, Accuracy], seed: int) -> Interaction:
    if asked.missing:
        return asked
    labels = (asked.dense, asked.pruned, asked.quantized, asked.both)
    return interaction(asked.quantizer, asked.steps, labels, found, seed)


class _Models:
    """The models of one run on disk, made when they are first asked for, by the labels that the report gives them."""

    def __init__(
        self, source: ModelSource, recipe: Recipe, scratch: Path, texts: Texts, verbose: bool, notify: Notify
    ) -> None:
        self._source, self._recipe, self._scratch = source, recipe, scratch
        self._texts, self._verbose, self._notify = texts, verbose, notify
        self._graphs: dict[str, Artifact] = {}
        self.compared_models: dict[str, ComparedModel] = {}
        self._add(DENSE, source.model)
        self._add(PRUNED, self._prune(PRUNED, recipe))

    def make(self, how: str) -> list[Interaction]:
        """All models of one quantizer; returns what is to be computed of them, in either order."""
        return self._of_checkpoints(how) if how in QUANTIZERS else self._of_graphs(how)

    def _of_checkpoints(self, how: str) -> list[Interaction]:
        for label, source in ((how, self._source), (f"{PRUNED}, {how}", self._subject_source(PRUNED))):
            folder = self._scratch / label
            self._notify(f"making {label}")
            quantize(source, folder, how, device=self._recipe.device, verbose=self._verbose, notify=silent)
            self._add(label, str(folder))
        interactions = [Interaction(how, LAST, DENSE, PRUNED, how, f"{PRUNED}, {how}")]
        recipe = self._recipe.with_options(quantize=how, steps=FIRST)
        missing = self._refused(recipe)
        if not missing:
            label = f"{how}, {PRUNED}"
            self._add(label, self._prune(label, recipe))
        return [*interactions, self._first(how, DENSE, PRUNED, missing)]

    def _of_graphs(self, how: str) -> list[Interaction]:
        dense, pruned = f"{DENSE}, onnx", f"{PRUNED}, onnx"
        for label, plain in ((dense, DENSE), (pruned, PRUNED)):
            if label not in self.compared_models:
                self._export(label, self.compared_models[plain].path, NONE)
        self._export(how, self.compared_models[DENSE].path, how)
        self._export(f"{PRUNED}, {how}", self.compared_models[PRUNED].path, how)
        interactions = [Interaction(how, LAST, dense, pruned, how, f"{PRUNED}, {how}")]
        recipe = self._recipe.with_options(quantize=how, steps=FIRST, format="onnx")
        missing = self._refused(recipe)
        if not missing:
            checkpoint = self._prune(f"{how}, {PRUNED}, before its export", recipe, self._graphs[how])
            self._export(f"{how}, {PRUNED}", checkpoint, how)
        return [*interactions, self._first(how, dense, pruned, missing)]

    def _first(self, how: str, dense: str, pruned: str, missing: str) -> Interaction:
        if missing:
            return Interaction(how, FIRST, missing=missing)
        return Interaction(how, FIRST, dense, pruned, how, f"{how}, {PRUNED}")

    def _refused(self, recipe: Recipe) -> str:
        """Why this order cannot be had; empty where it can."""
        try:
            check_quantization(recipe, read_config(self._source))
        except StreamlineError as error:
            return str(error)
        return ""

    def _prune(self, label: str, recipe: Recipe, graph: Artifact | None = None) -> str:
        folder = self._scratch / label
        scored = None if graph is None else lambda windows: score_graph(graph, windows)
        self._notify(f"making {label}")
        record = prune(
            self._source, recipe, folder, overwrite=False, verbose=self._verbose, notify=silent, scored=scored
        )
        self._notify(f"{label}: {record.plan.describe()}")
        return str(folder)

    def _export(self, label: str, checkpoint: str, how: str) -> None:
        windows = self._texts.chosen_on["calibration"]
        needed = graph_quantizers().get(how, False)
        self._notify(f"making {label}")
        self._graphs[label] = export(
            checkpoint,
            self._scratch / label,
            device=self._recipe.device,
            verbose=self._verbose,
            quantize=how,
            windows=windows.part(0, min(CALIBRATION_WINDOWS, len(windows.ids))) if needed else None,
            **self._source.with_model(checkpoint).options(),
        )
        self._add(label, self._graphs[label].path)

    def _subject_source(self, label: str) -> ModelSource:
        return self.compared_models[label].source

    def _add(self, label: str, path: str) -> None:
        role = "original" if label.startswith(DENSE) else "candidate"
        source = self._source.with_model(path)
        self.compared_models[label] = ComparedModel(label, path, role, **source.options())  # type: ignore[arg-type]

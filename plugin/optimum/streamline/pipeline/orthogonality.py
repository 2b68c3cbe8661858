"""Measure whether pruning makes quantization cost more accuracy, in both orders.

Each quantizer and order compares four models: the original, the pruned, the quantized, and the pruned and quantized
model. They are made by the steps of `run` and measured together. The report is kept; the models are deleted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

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

# Parts of the models' labels.
DENSE, PRUNED = "dense", "pruned"
# The two orders, as values of the recipe's option `steps`.
QUANTIZE_FIRST, QUANTIZE_LAST = "quantize,prune", "prune,quantize"


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
    """Measure how the recipe's pruning and each quantizer affect each other, and write the report into `out`.

    Args:
        source: The original, with float weights.
        recipe: The pruning and healing. It must not set a quantizer, the steps or an export.
        quantizers: Keys of `QUANTIZERS`, which run in torch, and of the exporters' `GRAPH_QUANTIZERS`, which run in
            ONNX Runtime.
        out: The folder of the report.
        overwrite: Whether an earlier output in `out` is replaced.
        verbose: Whether messages of other libraries go to the terminal.
        notify: Gets one line for each text, and for each model that is made.

    Returns:
        The report, with its interactions.

    Raises:
        StreamlineError: bad input, or a model cannot be made.
    """
    check_output(out, overwrite)
    refuse_own_input(out, inputs_of(source, recipe))
    _check(source, recipe, quantizers)
    calibrated = graph_quantizers()
    texts = read_texts(source, recipe, any(calibrated.get(quantizer) for quantizer in quantizers))
    out.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=out.absolute().parent, prefix=f".{out.name}.") as scratch:
        if texts.calibration is not None and "calibration" not in texts.chosen_on:
            notify(texts.calibration.line("calibration"))
        for purpose, windows in texts.chosen_on.items():
            notify(windows.line("healing" if purpose == "heal" else purpose))
        if texts.prompts:
            notify(texts.prompts.line("healing"))
        models = _Models(source, recipe, Path(scratch), texts, verbose, notify)
        interactions = [each for quantizer in quantizers for each in models.make(quantizer)]
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
    # The other models were deleted with the scratch folder, so their paths lead nowhere.
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
    """Refuse a recipe, a model or a quantizer that cannot be used, before any model is made."""
    for field in ("quantize", "quantize_exclude", "steps", "format"):
        value = recipe.option(field)
        if value not in (None, NONE):
            raise StreamlineError(
                f"{field.replace('_', '-')} {value!r}: orthogonality sets this itself for each model; leave it out"
            )
    check_recipe(source, recipe)
    config = read_config(source)
    if name := quantization_name(config):
        raise StreamlineError(f"model {source.model!r}: is quantized ({name}) already; give the float model")
    for quantizer in quantizers:
        variant = recipe.with_options(quantize=quantizer, format="none" if quantizer in QUANTIZERS else "onnx")
        check_quantization(variant, config)
        check_exportable(variant)


def _measured(planned: Interaction, found: Mapping[str, Accuracy], seed: int) -> Interaction:
    """Compute a planned interaction from the measured accuracies; one whose models are missing stays as it is."""
    if planned.missing:
        return planned
    labels = (planned.dense, planned.pruned, planned.quantized, planned.both)
    return interaction(planned.quantizer, planned.steps, labels, found, seed)


class _Models:
    """The models of one run, in the scratch folder. `compared_models` has them by the labels of the report."""

    def __init__(
        self, source: ModelSource, recipe: Recipe, scratch: Path, texts: Texts, verbose: bool, notify: Notify
    ) -> None:
        self._source, self._recipe, self._scratch = source, recipe, scratch
        self._texts, self._verbose, self._notify = texts, verbose, notify
        self._graphs: dict[str, Artifact] = {}
        self.compared_models: dict[str, ComparedModel] = {}
        self._add(DENSE, source.model)
        self._add(PRUNED, self._prune(PRUNED, recipe))

    def make(self, quantizer: str) -> list[Interaction]:
        """Make all models of one quantizer.

        Returns:
            The interactions to compute, one for each order.
        """
        return self._of_checkpoints(quantizer) if quantizer in QUANTIZERS else self._of_graphs(quantizer)

    def _of_checkpoints(self, quantizer: str) -> list[Interaction]:
        """Make the models of a quantizer of checkpoints."""
        for label, source in (
            (quantizer, self._source),
            (f"{PRUNED}, {quantizer}", self.compared_models[PRUNED].source),
        ):
            folder = self._scratch / label
            self._notify(f"making {label}")
            quantize(source, folder, quantizer, device=self._recipe.device, verbose=self._verbose, notify=silent)
            self._add(label, str(folder))
        interactions = [Interaction(quantizer, QUANTIZE_LAST, DENSE, PRUNED, quantizer, f"{PRUNED}, {quantizer}")]
        recipe = self._recipe.with_options(quantize=quantizer, steps=QUANTIZE_FIRST)
        missing = self._refused(recipe)
        if not missing:
            label = f"{quantizer}, {PRUNED}"
            self._add(label, self._prune(label, recipe))
        return [*interactions, self._quantize_first(quantizer, DENSE, PRUNED, missing)]

    def _of_graphs(self, quantizer: str) -> list[Interaction]:
        """Make the models of a quantizer of graphs. The float models are exported too, to compare in one runtime."""
        dense, pruned = f"{DENSE}, onnx", f"{PRUNED}, onnx"
        for label, plain in ((dense, DENSE), (pruned, PRUNED)):
            if label not in self.compared_models:
                self._export(label, self.compared_models[plain].path, NONE)
        self._export(quantizer, self.compared_models[DENSE].path, quantizer)
        self._export(f"{PRUNED}, {quantizer}", self.compared_models[PRUNED].path, quantizer)
        interactions = [Interaction(quantizer, QUANTIZE_LAST, dense, pruned, quantizer, f"{PRUNED}, {quantizer}")]
        recipe = self._recipe.with_options(quantize=quantizer, steps=QUANTIZE_FIRST, format="onnx")
        missing = self._refused(recipe)
        if not missing:
            checkpoint = self._prune(f"{quantizer}, {PRUNED}, before its export", recipe, self._graphs[quantizer])
            self._export(f"{quantizer}, {PRUNED}", checkpoint, quantizer)
        return [*interactions, self._quantize_first(quantizer, dense, pruned, missing)]

    def _quantize_first(self, quantizer: str, dense: str, pruned: str, missing: str) -> Interaction:
        """The interaction of the order that quantizes first, or the reason why it is missing."""
        if missing:
            return Interaction(quantizer, QUANTIZE_FIRST, missing=missing)
        return Interaction(quantizer, QUANTIZE_FIRST, dense, pruned, quantizer, f"{quantizer}, {PRUNED}")

    def _refused(self, recipe: Recipe) -> str:
        """Why a recipe with this order is refused; empty if it is not."""
        try:
            check_quantization(recipe, read_config(self._source))
        except StreamlineError as error:
            return str(error)
        return ""

    def _prune(self, label: str, recipe: Recipe, graph: Artifact | None = None) -> str:
        folder = self._scratch / label
        scored = None if graph is None else lambda windows: score_graph(graph, windows)
        self._notify(f"making {label}")
        how: dict[str, Any] = {"overwrite": False, "verbose": self._verbose, "judged_on": self._texts.judged_on}
        record = prune(self._source, recipe, folder, notify=silent, scored=scored, **how)
        self._notify(f"{label}: {record.plan.describe()}")
        return str(folder)

    def _export(self, label: str, checkpoint: str, quantizer: str) -> None:
        windows = self._texts.calibration if graph_quantizers().get(quantizer) else None
        self._notify(f"making {label}")
        self._graphs[label] = export(
            checkpoint,
            self._scratch / label,
            device=self._recipe.device,
            verbose=self._verbose,
            quantize=quantizer,
            windows=windows and windows.part(0, min(CALIBRATION_WINDOWS, len(windows.ids))),
            **self._source.with_model(checkpoint).options(),
        )
        self._add(label, self._graphs[label].path)

    def _add(self, label: str, path: str) -> None:
        role = "original" if label.startswith(DENSE) else "candidate"
        source = self._source.with_model(path)
        self.compared_models[label] = ComparedModel(label, path, role, **source.options())  # type: ignore[arg-type]

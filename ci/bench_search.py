"""Measure the searches, trial trainings, and what distillation needs of the original.

    ci/bench search                  # measure all parts, then write the page
    ci/bench search --only races     # a race of removals against every removal on every window
    ci/bench search --only literal   # the searches against the algorithm as the papers write it
    ci/bench search --only packed    # methods that keep whole layers, with and without healing
    ci/bench search --only trials    # every candidate of auto, after some shares of a training
    ci/bench search --only cost      # the default with its trial trainings against the same training without
    ci/bench search --only caches    # distillation from all logits of the original, and from fewer tokens
    ci/bench search --page           # write the page; measure nothing

All use the reference model. The figures go to docs/search.json, and the tables of docs/search.md are written from
them.
"""

from __future__ import annotations

import copy
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from export_cases import REFERENCE, ROOT
from measured_parts import measure_parts
from optimum.streamline.checkpoints.loading import load_stock, load_tokenizer
from optimum.streamline.editing.packing import sublayers_left
from optimum.streamline.evaluation.intervals import Interval, Samples, mean_interval
from optimum.streamline.healing.trials import Trials
from optimum.streamline.methods.shifted import pairs_of
from optimum.streamline.model_files.source import ModelSource
from optimum.streamline.models.removed_sublayers import SublayerSet, fully_removed_layers, whole_layer, without
from optimum.streamline.models.skipped_sublayers import skipped_sublayers
from optimum.streamline.pipeline.planning import Prepared
from optimum.streamline.pipeline.prune import change, prepare
from optimum.streamline.recipe.parsing import make_recipe
from optimum.streamline.scoring.ablation import removal_window_losses
from optimum.streamline.scoring.loss import window_losses
from optimum.streamline.scoring.race import DEVIATIONS, race
from optimum.streamline.text.windows import BATCH, Windows, read_windows
from search_page import write_page

RESULTS = ROOT / "docs" / "search.json"
LOSSES = ROOT / ".cache" / "search_losses.pt"
LAYERS, LENGTH, SAMPLES = 16, 128, 64
DRAWS, STEPS = 2, 7  # texts, and greedy steps on each
COMMON: dict[str, Any] = {"calibration": "stdlib:calibration", "samples": 24, "length": 256}
HEALING: dict[str, Any] = {"heal": "distill", "heal_data": "stdlib:calibration", "heal_tokens": 200_000}
# Four windows an update and this rate, the defaults when these figures were first measured.
HEAL: dict[str, Any] = {**HEALING, "heal_epochs": 1, "heal_batch": 4, "heal_lr": 1.7e-3}
METHODS: dict[str, dict[str, Any]] = {
    "sleb": {"method": "sleb"},
    "shifted": {"method": "shifted"},
    "blockpruner": {"method": "blockpruner"},
    "blockpruner, not packed": {"method": "blockpruner", "packed": False},
}
REMOVED = (4, 8)
LITERAL: dict[str, tuple[str, dict[str, Any]]] = {
    "sleb": ("layers", {"protect": "0,0"}),
    "blockpruner": ("sublayers", {"packed": False}),
}
SHARES = (1 / 40, 1 / 20, 1 / 10, 1 / 5, 1.0)
FORMS = ("full", "top-64", "sample-50")
LAYERS_OF_SLEB = "1,3,5,12"


def races(_: Path) -> dict[str, Any]:
    """For each search: how often a race chooses what the full comparison chooses, and its share of the windows.

    The losses of every removal on every window are kept in .cache, so that a race with other constants needs no model.
    """
    if not LOSSES.is_file():
        LOSSES.parent.mkdir(exist_ok=True)
        torch.save({search: _losses(search) for search in ("layers", "pairs", "sublayers")}, LOSSES)
    steps = {search: [_raced(losses) for losses in found] for search, found in torch.load(LOSSES).items()}
    return {"samples": SAMPLES, "length": LENGTH, "deviations": DEVIATIONS, "steps": steps}


def _losses(search: str) -> list[torch.Tensor]:
    """The losses `[removals, windows]` at each step of a greedy search, on several texts."""
    source = ModelSource(str(REFERENCE))
    model, tokenizer = load_stock(source, torch.float32), load_tokenizer(source)
    text = read_windows(
        "stdlib:calibration", tokenizer, DRAWS * SAMPLES, LENGTH, 0, model.config.vocab_size, "calibration"
    )
    found: list[torch.Tensor] = []
    for draw in range(DRAWS):
        windows, removed = text.part(draw * SAMPLES, (draw + 1) * SAMPLES), frozenset[Any]()
        for _ in range(STEPS):
            candidates = _candidates(model, search, removed)
            batches = torch.split(windows.ids, BATCH)
            losses = [removal_window_losses(model, batch, candidates, removed) for batch in batches]
            found.append(torch.cat(losses, dim=1))
            removed |= candidates[int(found[-1].sum(1).argmin())]
    return found


def _candidates(model: PreTrainedModel, search: str, removed: SublayerSet) -> list[SublayerSet]:
    if search == "pairs":
        return pairs_of(model.config, removed, range(LAYERS))
    if search == "layers":
        return [whole_layer(layer) for layer in range(LAYERS) if layer not in fully_removed_layers(removed)]
    return [frozenset({sublayer}) for sublayer in sublayers_left(LAYERS, removed)]


def _raced(losses: torch.Tensor) -> dict[str, float]:
    windows = Windows(torch.zeros(losses.shape[1], LENGTH, dtype=torch.long), "stdlib:calibration")
    result = race(lambda racing, start, end: losses[list(racing), start:end], len(losses), windows)
    means = losses.sum(1) / windows.ids[:, 1:].numel()
    return {
        "same": float(result.best == int(means.argmin())),
        "excess": float(means[result.best] - means.min()),
        "share_of_windows": result.tried / losses.numel(),
    }


def literal(_: Path) -> list[dict[str, Any]]:
    """SLEB and BlockPruner against the papers' algorithm: at each step a forward pass for each removal on all windows.

    Seconds are those of the processor.
    """
    source, rows = ModelSource(str(REFERENCE)), list[dict[str, Any]]()
    for method, (search, fields) in LITERAL.items():
        recipe = make_recipe({**COMMON, **fields, "heal": "none", "method": method, "remove": REMOVED[0]})
        start = time.process_time()
        prepared = prepare(source, recipe, lambda line: None)
        ours = time.process_time() - start
        assert prepared.calibration is not None
        start, removed = time.process_time(), frozenset[Any]()
        while len(removed) < len(prepared.plan.sublayers_removed):
            candidates = _candidates(prepared.model, search, removed)
            losses = [_full_loss(prepared.model, removed | each, prepared.calibration) for each in candidates]
            removed |= candidates[losses.index(min(losses))]
        rows.append(
            {
                "method": method,
                "removed": REMOVED[0],
                "seconds": ours,
                "literal_seconds": time.process_time() - start,
                "same": sorted(removed) == sorted(prepared.plan.sublayers_removed),
            }
        )
        print(rows[-1], flush=True)
    return rows


@torch.inference_mode()
def _full_loss(model: PreTrainedModel, removed: SublayerSet, windows: Windows) -> float:
    with without(model, removed):
        return sum(float(window_losses(model, batch).sum()) for batch in torch.split(windows.ids, BATCH))


def packed(_: Path) -> list[dict[str, Any]]:
    """Each method at a quarter and at a half of the layers: perplexity ratio before and after healing."""
    source, judge = ModelSource(str(REFERENCE)), _Judge()
    rows: list[dict[str, Any]] = []
    for removed in REMOVED:
        for name, fields in METHODS.items():
            recipe = make_recipe({**COMMON, **fields, **HEAL, "heal_tokens": 50_000, "remove": removed})
            start = time.process_time()
            prepared = prepare(source, recipe, lambda line: None)
            chosen = time.process_time() - start
            bare = copy.copy(prepared)
            bare.model, bare.recipe = copy.deepcopy(prepared.model), recipe.with_options(heal="none")
            change(bare, lambda line: None)
            unhealed = judge.ratio(bare.model).value
            change(prepared, lambda line: None)
            rows.append(
                {
                    "removed": removed,
                    "method": name,
                    "plan": prepared.plan.describe(),
                    "layers": prepared.model.config.num_hidden_layers,
                    "zeros": sum(map(len, skipped_sublayers(prepared.model.config).values())),
                    "parameters": sum(parameter.numel() for parameter in prepared.model.parameters()),
                    "seconds": round(chosen, 1),
                    "unhealed": unhealed,
                    "healed": judge.ratio(prepared.model).value,
                }
            )
            print(rows[-1], flush=True)
    return rows


def trials(folder: Path) -> list[dict[str, Any]]:
    """Every candidate of `auto`: its divergence from the original after some shares of a whole training.

    Trials stop at some of these shares. The last one is the end, with the best weights on the held-out windows.
    """
    rows: list[dict[str, Any]] = []
    recipe = make_recipe({**COMMON, **HEALING, "heal_epochs": 1, "method": "auto", "remove": REMOVED[1]})
    prepared = prepare(ModelSource(str(REFERENCE)), recipe, print)
    assert isinstance(prepared.heal_text, Windows)
    assert prepared.calibration is not None
    training = Trials(recipe, prepared.model, prepared.calibration, prepared.heal_text, print, folder)
    for plan in prepared.candidates:
        after = {str(share): training.divergence(plan, share) for share in SHARES}
        rows.append({"removed": REMOVED[1], "candidate": plan.chosen_by, "divergence": after})
        print(rows[-1], flush=True)
    return rows


def cost(_: Path) -> dict[str, Any]:
    """How long the default takes after its plans are made: with trial trainings, and with the best plan alone.

    A quarter of the layers is removed. The healing is four passes over 200,000 tokens. Seconds are those of the
    processor.
    """
    recipe = make_recipe({**COMMON, **HEALING, "method": "auto", "remove": REMOVED[0]})
    prepared = prepare(ModelSource(str(REFERENCE)), recipe, print)
    alone = copy.copy(prepared)
    alone.model, plans = copy.deepcopy(prepared.model), len(prepared.candidates)
    with_trials = _seconds_to_change(prepared)
    alone.plan, alone.candidates = prepared.plan, ()
    return {"plans": plans, "seconds_with_trials": with_trials, "seconds": _seconds_to_change(alone)}


def _seconds_to_change(prepared: Prepared) -> float:
    with TemporaryDirectory() as workspace:
        start = time.process_time()
        change(prepared, print, Path(workspace) / "healing")
        return time.process_time() - start


def caches(_: Path) -> list[dict[str, Any]]:
    """Distillation from what `--heal-cache` keeps of the original's logits: perplexity ratios with intervals."""
    source, judge = ModelSource(str(REFERENCE)), _Judge()
    rows: list[dict[str, Any]] = []
    for form in FORMS:
        recipe = make_recipe({**COMMON, **HEAL, "layers": LAYERS_OF_SLEB, "heal_cache": form})
        prepared = prepare(source, recipe, lambda line: None)
        start = time.process_time()
        change(prepared, lambda line: None)
        seconds = time.process_time() - start
        ratio = judge.ratio(prepared.model)
        rows.append({"form": form, "ratio": [ratio.value, ratio.low, ratio.high], "seconds": seconds})
        print(rows[-1], flush=True)
    return rows


class _Judge:
    """The evaluation windows, and the losses of the original on them."""

    def __init__(self) -> None:
        source = ModelSource(str(REFERENCE))
        dense = load_stock(source, torch.float32)
        self._windows = read_windows(
            "stdlib:eval", load_tokenizer(source), 128, 256, 0, dense.config.vocab_size, "eval"
        )
        self._original = self._losses(dense)

    def ratio(self, model: PreTrainedModel) -> Interval:
        """The perplexity of a model over the original's, with its 95% interval."""
        counts = np.full(len(self._windows.ids), self._windows.ids.shape[1] - 1.0)
        return mean_interval(self._losses(model) - self._original, counts, 0).map(np.exp)

    @torch.inference_mode()
    def _losses(self, model: PreTrainedModel) -> Samples:
        """The sum of the next-token losses over each window, in nats, `[windows]`."""
        return torch.cat([window_losses(model, batch) for batch in torch.split(self._windows.ids, BATCH)]).numpy()


if __name__ == "__main__":
    parts = {"races": races, "literal": literal, "packed": packed, "trials": trials, "cost": cost, "caches": caches}
    measure_parts(__doc__, parts, RESULTS, write_page)

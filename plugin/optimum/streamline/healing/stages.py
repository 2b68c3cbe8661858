"""A recipe's trainings in their order, around the edit: the replacement before it, the model after or during it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from optimum.streamline.editing.plan import TRAINED, Plan, PlannedLayer, depths_of
from optimum.streamline.methods.registry import METHODS
from optimum.streamline.models.architectures import architecture_of, decoder_layers
from optimum.streamline.recipe.recipe import Recipe
from optimum.streamline.text.windows import Windows

from .losses import Distillation, HealingLoss, NextToken
from .settings import HealLog, HealSettings, Scope, model_settings, replacement_settings, scope_of
from .trainable_parts import train_model, train_replacement
from .trainer import split_windows

# Weight of the hidden states in distillation. CoMe's could not be had: this is this program's own, for all methods
# (measured: `docs/methods.md`).
_HIDDEN = 10.0
# Share of the KL to the original's logits, of which the rest is cross-entropy: that helps the first pass over a text
# and does harm in the fourth (measured there too).
_KL = 1.0


@dataclass(frozen=True)
class HealingResult:
    """One training of a run.

    Args:
        stage: What it trained to: one of `Recipe.resolved_trainings`.
        scope: What it trained.
        windows: How many windows it trained on, those it held out not among them.
    """

    stage: str
    scope: Scope
    windows: int
    settings: HealSettings
    log: HealLog

    def to_dict(self) -> dict[str, Any]:
        """As `streamline.json` has it."""
        return {
            "stage": self.stage,
            "scope": self.scope,
            "windows": self.windows,
            "settings": asdict(self.settings),
            **asdict(self.log),
        }


class Healer:
    """The trainings of one recipe on one model; what was done is in `done`.

    Call `before_edit`, edit the model with `after_merge` among its materials, then call `after_edit`.

    Args:
        model: The original, which is then edited in place.
        text: What is trained on.
        workspace: Where each training keeps its checkpoints, in a folder of its own; called again on the same model,
            text and recipe, a training that ended is not done again, and one that did not goes on.
        say: Told of each training before it starts.
    """

    def __init__(
        self,
        recipe: Recipe,
        model: PreTrainedModel,
        plan: Plan,
        text: Windows,
        notify: Callable[[str], None],
        workspace: Path | None = None,
    ) -> None:
        self._recipe, self._model, self._plan, self._text = recipe, model, plan, text
        self._notify, self._workspace = notify, workspace
        self._teacher: PreTrainedModel | None = None
        self.done: list[HealingResult] = []

    def before_edit(self, student: nn.Module | None) -> None:
        """Train `student`, the replacement's layer, on its own, if the recipe says so; keep the original to distil.

        Args:
            student: `None` where no layer of its own stands in for a block.
        """
        if "distill" in self._recipe.resolved_trainings:
            self._teacher = copy.deepcopy(self._model).requires_grad_(False)
        if student is None or "hidden-mse" not in self._recipe.resolved_trainings:
            return
        settings = replacement_settings(self._recipe, self._model.config.hidden_size, "hidden-mse")
        self._announce("hidden-mse", "replacement", settings)
        log = train_replacement(
            self._model,
            self._plan,
            student,
            self._text,
            settings,
            normalised=self._recipe.healing.normalised,
            workspace=self._place(),
        )
        self._note("hidden-mse", "replacement", settings, log)

    @property
    def after_merge(self) -> Callable[[tuple[PlannedLayer, ...]], None] | None:
        """The `EditInputs.after_merge` of a `stepwise` method: it trains the model after each merge."""
        stepwise = METHODS[self._recipe.resolved_method].stepwise
        return self._train_places if stepwise and self._recipe.resolved_trainings else None

    def after_edit(self, new_layers: tuple[PlannedLayer, ...]) -> None:
        """Train the edited model, whose layers are `places`; with `after_merge` before it, on the last share."""
        self._train_places(new_layers)

    def _train_places(self, new_layers: tuple[PlannedLayer, ...]) -> None:
        merges = len(self._plan.merges) if self.after_merge else 1
        made = sum(len(place.originals) - 1 for place in new_layers) if self.after_merge else 1
        for number, stage in enumerate(self._recipe.resolved_trainings):
            if stage != "hidden-mse":
                self._train(number, stage, new_layers, (made - 1, merges))

    def _train(self, number: int, stage: str, new_layers: tuple[PlannedLayer, ...], share: tuple[int, int]) -> None:
        recipe, width = self._recipe, self._model.config.hidden_size
        scope = scope_of(recipe, number, self._plan.replacement in TRAINED)
        alone = scope == "replacement"
        settings = replacement_settings(recipe, width, stage) if alone else model_settings(recipe, width, stage)
        if settings.minutes is not None:  # shared out as the windows are: all merges take no longer than one training
            settings = replace(settings, minutes=settings.minutes / share[1])
        self._announce(stage, scope, settings, share)
        log = train_model(
            self._model,
            self._goal(stage, new_layers),
            self._text,
            settings,
            part=self._replacement(new_layers) if alone else None,
            share=share,
            workspace=self._place(),
        )
        self._note(stage, scope, settings, log, share)

    def _note(
        self, stage: str, scope: Scope, settings: HealSettings, log: HealLog, share: tuple[int, int] = (0, 1)
    ) -> None:
        self.done.append(HealingResult(stage, scope, self._windows(share), settings, log))

    def _goal(self, stage: str, new_layers: tuple[PlannedLayer, ...]) -> HealingLoss:
        if stage == "lm":
            return NextToken()
        assert self._teacher is not None, "before_edit keeps the original"
        kl, hidden = self._recipe.healing.kl, self._recipe.healing.hidden
        return Distillation(
            self._teacher,
            depths_of(new_layers, self._plan.total),
            kl=_KL if kl is None else kl,
            hidden=_HIDDEN if hidden is None else hidden,
        )

    def _replacement(self, new_layers: tuple[PlannedLayer, ...]) -> nn.Module:
        [index] = [index for index, place in enumerate(new_layers) if place.kind in TRAINED]
        return decoder_layers(self._model, architecture_of(self._model.config))[index]

    def _place(self) -> Path | None:
        # Trainings come in the same order each time: the number of those before it is a training's name.
        return None if self._workspace is None else self._workspace / str(len(self.done))

    def _announce(self, stage: str, scope: Scope, settings: HealSettings, share: tuple[int, int] = (0, 1)) -> None:
        what = "the replacement" if scope == "replacement" else "the model"
        by = "" if settings.lora_rank is None else f" by adapters of rank {settings.lora_rank}"
        self._notify(f"training {what}{by} ({stage}) on {self._windows(share)} windows, {settings.epochs} times")

    def _windows(self, share: tuple[int, int]) -> int:
        return len(split_windows(self._text, share)[0])

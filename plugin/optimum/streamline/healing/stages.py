"""The healing stages of a recipe, in order: the replacement trains before the edit, the model after or during it."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from optimum.streamline.editing.plan import TRAINED, Plan, PlannedLayer, depths_of, layer_ranges
from optimum.streamline.errors import StreamlineError
from optimum.streamline.methods.registry import METHODS
from optimum.streamline.models.architectures import architecture_of, decoder_layers
from optimum.streamline.models.offloaded_weights import changing_whole, copy_sharing_disk
from optimum.streamline.recipe.recipe import Recipe
from optimum.streamline.system.distributed import process_rank
from optimum.streamline.system.notify import Notify
from optimum.streamline.text.windows import Windows

from .local import LayerError, cut_layers, layer_errors
from .losses import Distillation, HealingLoss, NextToken, Outputs, outputs_of
from .output_cache import OutputCache
from .settings import (
    HealLog,
    HealSettings,
    Scope,
    distillation_weights,
    local_settings,
    model_settings,
    needs_original,
    replacement_settings,
    scope_of,
)
from .trainable_parts import train_model, train_replacement
from .trainer import split_windows


@dataclass(frozen=True)
class HealingResult:
    """The result of one training.

    Args:
        stage: The kind of training: one of `Recipe.resolved_trainings`.
        scope: Whether it trained the replacement, one layer or the whole model.
        windows: The number of windows that it trained on, without the held-out ones.
        settings: Its settings.
        log: Its log.
        layer: The number of the layer that it trained, in the new model; `None` if it trained something else.
    """

    stage: str
    scope: Scope
    windows: int
    settings: HealSettings
    log: HealLog
    layer: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """The entry in the list `healing` of `streamline.json`."""
        return {
            "stage": self.stage,
            "scope": self.scope,
            **({} if self.layer is None else {"layer": self.layer}),
            "windows": self.windows,
            "settings": asdict(self.settings),
            **asdict(self.log),
        }


class Healer:
    """Runs the healing stages of a recipe on one model, and collects their results in `results`.

    Call `before_edit`, then edit the model with `after_merge` in its `EditInputs`, then call `after_edit`.

    Args:
        recipe: The recipe.
        model: The original. The caller edits it in place between the calls.
        plan: The plan of the edit.
        text: The windows to train on.
        notify: A function that is told of each training before it starts, in one line.
        workspace: The folder for checkpoints, one subfolder a training. If it holds checkpoints of the same model, text
            and recipe, finished trainings are not repeated, and an unfinished one is resumed.
        teacher: The original, if it is not `model` that is edited. By default `before_edit` copies `model` if the
            original is needed after the edit.
        cache: The cache of the original's outputs for distillation, if there is one.
        versions: What `distill` reads in passes after the first, in place of `text` (`trainer.train`).
    """

    def __init__(
        self,
        recipe: Recipe,
        model: PreTrainedModel,
        plan: Plan,
        text: Windows,
        notify: Notify,
        workspace: Path | None = None,
        teacher: PreTrainedModel | None = None,
        cache: OutputCache | None = None,
        versions: torch.Tensor | None = None,
    ) -> None:
        self._recipe, self._model, self._plan, self._text = recipe, model, plan, text
        self._notify, self._workspace = notify, workspace
        self._teacher, self._cache, self._versions = teacher and teacher.eval(), cache, versions
        self._settings = dict[str, HealSettings]()
        self.results: list[HealingResult] = []

    def before_edit(self, student: nn.Module | None) -> None:
        """Run stage `hidden-mse`, if the recipe has it, and keep what later stages need of the original.

        That is a copy, or its outputs, if they are cached and nothing but distillation by one process needs it.

        Args:
            student: The layer of the replacement, which is trained in place; `None` if the plan has no such layer.
        """
        for stage in self._recipe.resolved_trainings:
            if stage in ("lm", "distill"):  # now, because `model` is still the original, and its copy may be no floats
                self._settings[stage] = model_settings(self._recipe, self._model, stage)
        if self._teacher is None:
            self._keep_original()
        if student is None or "hidden-mse" not in self._recipe.resolved_trainings:
            return
        settings = replacement_settings(self._recipe, self._model.config.hidden_size, "hidden-mse")
        self._announce("hidden-mse", "the replacement", settings)
        log = train_replacement(
            self._model,
            self._plan,
            student,
            self._text,
            settings,
            normalised=self._recipe.healing.normalised,
            workspace=self._checkpoint_folder(),
        )
        self._note("hidden-mse", "replacement", settings, log)

    def _keep_original(self) -> None:
        if needs_original(self._recipe, self._cache is not None):
            self._teacher = copy_sharing_disk(self._model).requires_grad_(False).eval()
        elif "distill" in self._recipe.resolved_trainings and self._cache is not None:
            self._cache.complete(self._model.eval())

    def _settings_of(self, stage: str) -> HealSettings:
        """The settings for training the whole model, by the weights of the original."""
        return self._settings.get(stage) or model_settings(self._recipe, self._teacher or self._model, stage)

    @property
    def after_merge(self) -> Callable[[tuple[PlannedLayer, ...]], None] | None:
        """The function for `EditInputs.after_merge`, which trains the model; `None` if the method is not stepwise."""
        stepwise = METHODS[self._recipe.resolved_method].stepwise
        return self._train_stages if stepwise and self._recipe.resolved_trainings else None

    def after_edit(self, new_layers: tuple[PlannedLayer, ...], stop_at: float = 1.0) -> None:
        """Train the edited model, after a stepwise method on the last part of the text.

        Args:
            new_layers: The layers of the edited model.
            stop_at: Stop when this share of the first distillation is done (`trainer.train`).
        """
        self._train_stages(new_layers, stop_at)

    def _train_stages(self, new_layers: tuple[PlannedLayer, ...], stop_at: float = 1.0) -> None:
        # A stepwise method trains after every merge, each time on the next of as many equal parts of the text.
        parts = len(self._plan.merges) if self.after_merge else 1
        merged = sum(len(planned.originals) - 1 for planned in new_layers) if self.after_merge else 1
        for number, stage in enumerate(self._recipe.resolved_trainings):
            if stage == "local":
                self._train_layers(new_layers)
            elif stage != "hidden-mse":
                self._train(number, stage, new_layers, (merged - 1, parts), stop_at if stage == "distill" else 1.0)
            if stage == "distill" and stop_at < 1:
                return

    def _train_layers(self, new_layers: tuple[PlannedLayer, ...]) -> None:
        assert self._teacher is not None, "before_edit keeps the original"
        cut = cut_layers(new_layers, self._teacher.config, self._model.config)
        if not cut:
            raise StreamlineError(
                f"heal {self._recipe.healing.trainings!r}: the plan leaves every layer as it was, and local trains "
                "layers that lost something; use heal distill"
            )
        settings = local_settings(self._recipe, self._teacher, len(cut))
        self._announce("local", f"layers {layer_ranges(tuple(each.layer for each in cut))}", settings)
        with self._folder_of_states() as folder:
            for error in layer_errors(self._teacher, cut, self._text.ids, folder):
                self._train_layer(error, settings)

    @contextmanager
    def _folder_of_states(self) -> Iterator[Path]:
        """An empty folder for this process, which is gone after the `with` block; after a kill it is used again."""
        with nullcontext(self._workspace) if self._workspace else TemporaryDirectory() as parent:
            folder = Path(parent) / f"states-{process_rank()}"
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            try:
                yield folder
            finally:
                shutil.rmtree(folder, ignore_errors=True)

    def _train_layer(self, error: LayerError, settings: HealSettings) -> None:
        layer = decoder_layers(self._model, architecture_of(self._model.config))[error.layer]
        with changing_whole(layer):
            log = train_model(
                self._model,
                error,
                self._text,
                settings,
                part=layer,
                title=f"training layer {error.layer}",
                workspace=self._checkpoint_folder(),
            )
        self.results.append(HealingResult("local", "layer", self._windows((0, 1)), settings, log, error.layer))

    def _train(
        self, number: int, stage: str, new_layers: tuple[PlannedLayer, ...], share: tuple[int, int], stop_at: float
    ) -> None:
        recipe = self._recipe
        scope = scope_of(recipe, number, self._plan.replacement in TRAINED)
        replacement_only = scope == "replacement"
        if replacement_only:
            settings = replacement_settings(recipe, self._model.config.hidden_size, stage)
        else:
            settings = self._settings_of(stage)
        if settings.minutes is not None:  # divided like the windows, so that the limit holds for all merges together
            settings = replace(settings, minutes=settings.minutes / share[1])
        self._announce(stage, f"the {scope}", settings, share)
        log = train_model(
            self._model,
            self._healing_loss(stage, new_layers),
            self._text,
            settings,
            part=self._replacement(new_layers) if replacement_only else None,
            title=f"training the {scope}",
            share=share,
            workspace=self._checkpoint_folder(),
            stop_at=stop_at,
            versions=self._versions if stage == "distill" else None,
            device=recipe.device,
        )
        self._note(stage, scope, settings, log, share)

    def _note(
        self, stage: str, scope: Scope, settings: HealSettings, log: HealLog, share: tuple[int, int] = (0, 1)
    ) -> None:
        self.results.append(HealingResult(stage, scope, self._windows(share), settings, log))

    def _healing_loss(self, stage: str, new_layers: tuple[PlannedLayer, ...]) -> HealingLoss:
        if stage == "lm":
            return NextToken()
        kl, hidden = distillation_weights(self._recipe)
        return Distillation(self._original_outputs(), depths_of(new_layers, self._plan.total), kl, hidden)

    def _original_outputs(self) -> Outputs:
        if self._cache is not None:
            return partial(self._cache.outputs, self._teacher)
        assert self._teacher is not None, "before_edit keeps the original"
        return partial(outputs_of, self._teacher)

    def _replacement(self, new_layers: tuple[PlannedLayer, ...]) -> nn.Module:
        [index] = [index for index, planned in enumerate(new_layers) if planned.kind in TRAINED]
        return decoder_layers(self._model, architecture_of(self._model.config))[index]

    def _checkpoint_folder(self) -> Path | None:
        # A training's folder is named after its number, because a resumed run has the same trainings in the same order.
        return None if self._workspace is None else self._workspace / str(len(self.results))

    def _announce(self, stage: str, trained: str, settings: HealSettings, share: tuple[int, int] = (0, 1)) -> None:
        by = "" if settings.lora_rank is None else f" by adapters of rank {settings.lora_rank}"
        passes = "1 pass" if settings.epochs == 1 else f"{settings.epochs} passes"
        self._notify(f"training {trained}{by} ({stage}) on {self._windows(share)} windows, {passes}")

    def _windows(self, share: tuple[int, int]) -> int:
        return len(split_windows(self._text, share)[0])

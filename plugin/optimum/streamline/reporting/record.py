"""The record `streamline.json`: how a checkpoint was made, in enough detail to explain and repeat it."""

from __future__ import annotations

import platform
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers

from optimum.streamline.editing.apply import Change
from optimum.streamline.editing.plan import TRAINED, Plan
from optimum.streamline.healing.stages import HealingResult
from optimum.streamline.methods.third_party import third_party_methods
from optimum.streamline.model_files.source import ModelSource
from optimum.streamline.recipe.recipe import Recipe
from optimum.streamline.scoring.similarity import Scores
from optimum.streamline.system.environment import OWN_DISTRIBUTION, package_version

FORMAT = 1


@dataclass(frozen=True)
class PruningRecord:
    """How a checkpoint was made.

    Args:
        source: The source of the original.
        source_fingerprint: The fingerprint of the original (`model_files.source.fingerprint`).
        recipe: The recipe.
        scores: The scores of the original's layers; `None` if the layers were named and nothing was measured.
        plan: The plan.
        change: The result of the edit.
        healing: The results of the trainings, in order.
        data: The texts that were used, by purpose: `calibration` and `heal`.
        seconds: The seconds that each step took.
        quantized: The quantizer of the original's weights; empty if they are float.
        read_back: The comparison of the saved checkpoint with the model in memory (`checkpoints.read_back`).
    """

    source: ModelSource
    source_fingerprint: str
    recipe: Recipe
    scores: Scores | None
    plan: Plan
    change: Change
    healing: tuple[HealingResult, ...]
    data: dict[str, dict[str, Any]]
    seconds: dict[str, float]
    quantized: str = ""
    read_back: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """The fields of `streamline.json`, without the file hashes that `checkpoints.provenance` adds."""
        base = self.source.base
        return {
            "format": FORMAT,
            "source": {
                "model": self.source.model,
                "revision": self.source.revision,
                "commit": self.source.commit,
                "adapter_of": base.model if base else "",
                "adapter_of_commit": base.commit if base else "",
                "fingerprint": self.source_fingerprint,
                "layers": self.plan.total,
            },
            "method": self.recipe.resolved_method,
            "method_from": method_origin(self.recipe.resolved_method),
            "plan": self.plan.describe(),
            "tried": dict(self.plan.tried),
            "trials": [{"share": share, "kl": dict(after)} for share, after in self.plan.trials],
            "layers": layer_origins(self.change),
            "removed": [] if self.plan.replacement in TRAINED or self.plan.merges else list(self.plan.removed),
            "merged": [list(layer.originals) for layer in self.change.new_layers if layer.kind == "merged"],
            "replaced": list(self.plan.removed) if self.plan.replacement in TRAINED else [],
            # The skipped sublayers. The key has the word of version 0.1.0, so that its files and newer ones read alike.
            "dead": {str(index): skip for index, skip in self.change.skipped.items()},
            "scores": None if self.scores is None else scores_to_dict(self.scores),
            "recipe": self.recipe.to_dict(),
            "recipe_fingerprint": self.recipe.fingerprint,
            "seed": self.recipe.seed,
            "data": self.data,
            "healing": [healed.to_dict() for healed in self.healing],
            "read_back": self.read_back,
            "seconds": {step: round(value, 2) for step, value in self.seconds.items()},
            "versions": {
                "python": platform.python_version(),
                OWN_DISTRIBUTION: package_version(),
                "torch": torch.__version__,
                "transformers": transformers.__version__,
            },
        }


def method_origin(name: str) -> dict[str, str]:
    """The distribution that a method came from, and its version."""
    for each in third_party_methods():
        if each.name == name:
            return {"distribution": each.distribution, "version": each.version}
    return {"distribution": OWN_DISTRIBUTION, "version": package_version()}


def layer_origins(change: Change) -> list[dict[str, Any]]:
    """For each layer of the new model: its number, the original layers that it stands for (from 0), and its kind.

    A packed layer also says from which original its attention and its MLP come, a layer whose attention or MLP was
    corrected says so, and `mapped` names the attention or MLP that a linear map was folded into.
    """
    found: list[dict[str, Any]] = []
    for index, layer in enumerate(change.new_layers):
        entry = {"layer": index, "originals": list(layer.originals), "kind": layer.kind}
        if layer.kind == "packed":
            entry |= {"attention": layer.attention_originals[0], "mlp": layer.mlp_originals[0]}
        if layer.corrected:
            entry["corrected"] = True
        if layer.mapped:
            entry["mapped"] = list(layer.mapped)
        found.append(entry)
    return found


def scores_to_dict(scores: Scores) -> dict[str, Any]:
    """The scores as JSON values."""
    return {
        "block_influence": list(scores.block_influence),
        "similarity": [list(row) for row in scores.similarity],
        "last_angle": [list(row) for row in scores.last_angle],
    }

"""`streamline.json`: what was done to a model, why, with what, so that it can be explained and done again."""

from __future__ import annotations

import platform
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers

from optimum.streamline.checkpoints.source import ModelSource
from optimum.streamline.editing.apply import Change
from optimum.streamline.editing.plan import TRAINED, Plan
from optimum.streamline.healing.stages import HealingResult
from optimum.streamline.methods.third_party import third_party_methods
from optimum.streamline.recipe.recipe import Recipe
from optimum.streamline.scoring.similarity import Scores
from optimum.streamline.system.environment import OWN_DISTRIBUTION, package_version

FORMAT = 1


@dataclass(frozen=True)
class PruningRecord:
    """Everything a checkpoint of ours says of its making.

    Args:
        source: The original.
        source_fingerprint: `source.fingerprint` of it.
        scores: What the layers were chosen by; `None` where they were named and nothing was measured.
        healing: The trainings, in order.
        data: What text was used, by purpose (`seen_text`).
        seconds: How long each step took.
        quantized: What the original's weights are quantized by; empty where they are float.
        read_back: How the written folder compared with the model in memory (`read_back.read_back`).
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
        """The fields of `streamline.json`, but for the hashes of the files beside it (`provenance.write_record`)."""
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
            "layers": layer_origins(self.change),
            "removed": [] if self.plan.replacement in TRAINED or self.plan.merges else list(self.plan.removed),
            "merged": [list(place.originals) for place in self.change.new_layers if place.kind == "merged"],
            "replaced": list(self.plan.removed) if self.plan.replacement in TRAINED else [],
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
    """For each layer of the new model, the original layers (0-based) it stands for, and how."""
    return [
        {"layer": index, "originals": list(place.originals), "kind": place.kind}
        for index, place in enumerate(change.new_layers)
    ]


def scores_to_dict(scores: Scores) -> dict[str, Any]:
    """Scores as JSON has them."""
    return {
        "block_influence": list(scores.block_influence),
        "similarity": [list(row) for row in scores.similarity],
        "last_angle": [list(row) for row in scores.last_angle],
    }

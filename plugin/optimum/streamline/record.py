"""`streamline.json`: what was done to a model, why, with what, so that it can be explained and done again."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from .checkpoint import read_record
from .edit import Change
from .healing import Healed
from .plan import TRAINED, Plan
from .recipe import Recipe
from .runner import Artifact, is_artifact
from .scores import Scores
from .windows import Windows, check_disjoint

FORMAT = 1


@dataclass(frozen=True)
class Record:
    """Everything a checkpoint of ours says of its making.

    Args:
        source: The original, as it was named.
        source_fingerprint: `checkpoint.fingerprint` of it.
        healing: The trainings, in order.
        data: What text was used, by purpose (`seen_text`).
        seconds: How long each step took.
        quantized: What the original's weights are quantized by; empty where they are float.
    """

    source: str
    source_fingerprint: str
    recipe: Recipe
    scores: Scores
    plan: Plan
    change: Change
    healing: tuple[Healed, ...]
    data: dict[str, dict[str, Any]]
    seconds: dict[str, float]
    quantized: str = ""

    def to_dict(self) -> dict[str, Any]:
        """The fields of `streamline.json`, but for the hashes of the files beside it (`provenance.write_record`)."""
        from . import __version__

        return {
            "format": FORMAT,
            "source": {"model": self.source, "fingerprint": self.source_fingerprint, "layers": self.plan.total},
            "method": self.recipe.method_name,
            "plan": self.plan.describe(),
            "tried": dict(self.plan.tried),
            "layers": layer_origins(self.change),
            "removed": [] if self.plan.replacement in TRAINED or self.plan.merges else list(self.plan.gone),
            "merged": [list(place.originals) for place in self.change.places if place.kind == "merged"],
            "replaced": list(self.plan.gone) if self.plan.replacement in TRAINED else [],
            "dead": {str(index): skip for index, skip in self.change.dead.items()},
            "scores": scores_to_dict(self.scores),
            "recipe": self.recipe.to_dict(),
            "recipe_fingerprint": self.recipe.fingerprint,
            "seed": self.recipe.seed,
            "data": self.data,
            "healing": [healed.to_dict() for healed in self.healing],
            "seconds": {step: round(value, 2) for step, value in self.seconds.items()},
            "versions": {
                "python": platform.python_version(),
                "optimum-streamline": __version__,
                "torch": torch.__version__,
                "transformers": transformers.__version__,
            },
        }


def layer_origins(change: Change) -> list[dict[str, Any]]:
    """For each layer of the new model, the original layers (0-based) it stands for, and how."""
    return [
        {"layer": index, "originals": list(place.originals), "kind": place.kind}
        for index, place in enumerate(change.places)
    ]


def scores_to_dict(scores: Scores) -> dict[str, Any]:
    """Scores as JSON has them."""
    return {
        "block_influence": list(scores.block_influence),
        "similarity": [list(row) for row in scores.similarity],
        "last_angle": [list(row) for row in scores.last_angle],
    }


def seen_text(windows: Windows) -> dict[str, Any]:
    """What a record says of text that choices were made on: enough to know it again by what it says."""
    return {**windows.describe(), "runs": " ".join(f"{run:012x}" for run in sorted(windows.runs()))}


def text_of(checkpoint: str) -> dict[str, dict[str, Any]]:
    """What text went into a checkpoint, by purpose; nothing is known of one that is not ours."""
    data: dict[str, dict[str, Any]] = (read_record(checkpoint) or {}).get("data", {})
    return data


def refuse_seen_text(checkpoint: str, windows: Windows) -> None:
    """Refuse to judge what we made on the text it was calibrated or healed on, whatever that was called.

    Args:
        checkpoint: A checkpoint, or an exported model's folder.

    Raises:
        StreamlineError: its record holds too much of the text of `windows`.
    """
    made = Artifact.read(Path(checkpoint)).data if is_artifact(checkpoint) else text_of(checkpoint)
    for data in made.values():
        check_disjoint([int(run, 16) for run in data["runs"].split()], data["spec"], windows)

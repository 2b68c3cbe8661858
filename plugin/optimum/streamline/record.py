"""`streamline.json`: what was done to a model, why, with what, so that it can be explained and done again."""

from __future__ import annotations

import platform
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers

from .checkpoint import read_record
from .edit import Change
from .errors import StreamlineError
from .healing import Healed
from .overlap import Sketch, check_disjoint
from .plan import TRAINED, Plan
from .recipe import Recipe
from .runner import Artifact, is_artifact
from .scores import Scores
from .source import Source
from .windows import Windows

FORMAT = 1


@dataclass(frozen=True)
class Record:
    """Everything a checkpoint of ours says of its making.

    Args:
        source: The original.
        source_fingerprint: `source.fingerprint` of it.
        healing: The trainings, in order.
        data: What text was used, by purpose (`seen_text`).
        seconds: How long each step took.
        quantized: What the original's weights are quantized by; empty where they are float.
        read_back: How the written folder compared with the model in memory (`read_back.read_back`).
    """

    source: Source
    source_fingerprint: str
    recipe: Recipe
    scores: Scores
    plan: Plan
    change: Change
    healing: tuple[Healed, ...]
    data: dict[str, dict[str, Any]]
    seconds: dict[str, float]
    quantized: str = ""
    read_back: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """The fields of `streamline.json`, but for the hashes of the files beside it (`provenance.write_record`)."""
        from . import __version__

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
            "read_back": self.read_back,
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
    """What a record says of text that choices were made on: enough to know all of it again by what it says."""
    return {**windows.describe(), "sketch": windows.sketch.to_dict()}


def text_of(checkpoint: str) -> dict[str, dict[str, Any]]:
    """What text went into a checkpoint, by purpose; nothing is known of one that is not ours."""
    data: dict[str, dict[str, Any]] = (read_record(checkpoint) or {}).get("data", {})
    return data


def refuse_seen_text(checkpoint: str, windows: Windows) -> None:
    """Refuse to judge what we made on the text it was calibrated or healed on, whatever that was called.

    Args:
        checkpoint: A checkpoint, or an exported model's folder.

    Raises:
        StreamlineError: its record holds too much of the text of `windows`, or was written before there were sketches.
    """
    made = Artifact.read(Path(checkpoint)).data if is_artifact(checkpoint) else text_of(checkpoint)
    for data in made.values():
        if "sketch" not in data:
            raise StreamlineError(
                f"{checkpoint}: an earlier version of this program made it, and did not keep what its text "
                f"{data['spec']!r} is known again by; make it anew to judge it"
            )
        check_disjoint(Sketch.from_dict(data["sketch"]), data["spec"], windows.sketch, windows.spec)

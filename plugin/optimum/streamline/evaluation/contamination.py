"""Refusing to judge a model on the text it was calibrated or healed on."""

from __future__ import annotations

from pathlib import Path

from optimum.streamline.checkpoints.artifact import Artifact, is_artifact
from optimum.streamline.checkpoints.record_file import recorded_text
from optimum.streamline.errors import StreamlineError
from optimum.streamline.text.overlap import Sketch, check_disjoint
from optimum.streamline.text.windows import Windows


def refuse_seen_text(checkpoint: str, windows: Windows) -> None:
    """Refuse to judge what we made on the text it was calibrated or healed on, whatever that was called.

    Args:
        checkpoint: A checkpoint, or an exported model's folder.

    Raises:
        StreamlineError: its record holds too much of the text of `windows`, or was written before there were sketches.
    """
    made = Artifact.read(Path(checkpoint)).data if is_artifact(checkpoint) else recorded_text(checkpoint)
    for data in made.values():
        if "sketch" not in data:
            raise StreamlineError(
                f"{checkpoint}: an earlier version of this program made it, and did not keep what its text "
                f"{data['spec']!r} is known again by; make it anew to judge it"
            )
        check_disjoint(Sketch.from_dict(data["sketch"]), data["spec"], windows.sketch, windows.spec)

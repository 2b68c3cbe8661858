"""Refusing to evaluate a model on text that it was calibrated or healed on."""

from __future__ import annotations

from pathlib import Path

from optimum.streamline.checkpoints.record_file import recorded_text
from optimum.streamline.errors import StreamlineError
from optimum.streamline.model_files.artifact import Artifact, is_artifact
from optimum.streamline.text.overlap import Sketch, check_disjoint
from optimum.streamline.text.windows import Windows


def refuse_seen_text(checkpoint: str, windows: Windows) -> None:
    """Refuse evaluation text that a checkpoint or artifact of this program was calibrated or healed on.

    Texts are compared by content (`text.overlap`), so a copy under another name is refused too.

    Args:
        checkpoint: The path of a checkpoint or an artifact. One without a record of this program passes.
        windows: The evaluation text.

    Raises:
        StreamlineError: too much of the evaluation text was used, or the record is too old to tell.
    """
    used = Artifact.read(Path(checkpoint)).data if is_artifact(checkpoint) else recorded_text(checkpoint)
    for data in used.values():
        if "sketch" not in data:
            raise StreamlineError(
                f"{checkpoint}: an earlier version made it, and its record cannot tell whether its text "
                f"{data['spec']!r} is the evaluation text; prune again with this version"
            )
        check_disjoint(Sketch.from_dict(data["sketch"]), data["spec"], windows.sketch, windows.spec)

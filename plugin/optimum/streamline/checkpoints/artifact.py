"""An exported model on disk: `artifact.json`, which says what was exported and how equal it is to its checkpoint.

Not read by pydantic, which adds about 6 MiB and 0.2 s to each timing worker, whose memory is measured.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from optimum.streamline.errors import StreamlineError
from optimum.streamline.system.content_hashes import folder_hashes

ARTIFACT_FILE = "artifact.json"


@dataclass(frozen=True)
class Artifact:
    """A model exported to a runtime: its folder holds `artifact.json` with these fields.

    Args:
        path: The folder.
        format: `onnx` or `tensorrt`.
        dtype: `fp32`, `fp16` or `bf16`.
        source: The checkpoint it was exported from.
        source_fingerprint: `source.fingerprint` of that checkpoint, so that an export of the original
            is recognised as the original.
        parity: Largest absolute logit difference from torch, by check.
        traced_layers: The layers whose graph was traced; that of the others was made from theirs.
        whole_because: Why every layer was traced although some are of one kind; empty where that was not so.
        quantize: How the graph was quantized after it was compared with torch; `none`, or such as `int4`.
        divergence: Of a quantized graph, the largest logit difference from torch as a share of the largest logit, by
            check.
        weight_bytes: Of a quantized graph, bytes of the weights that a token is multiplied by.
        quantize_exclude: What was left in float, as it was asked for.
        last_logits: Whether the graph, left to itself, gives the logits of each row's last token only.
        dequantized: What the checkpoint's weights were quantized by, which had to be made float; empty if nothing.
        dequantized_error: Of such, the largest logit difference of the finished graph from the quantized checkpoint in
            torch, as a share of the largest logit, by check.
        hidden: The values in the graph that are the hidden states before and after the layers, first to last; empty
            where the layers are no parts of it.
        engine: What built the engine, for which GPUs; empty where there is none.
        data: What text went into the weights, by purpose, as `windows.seen_text` tells it: what chose and healed the
            layers of the checkpoint, and what the quantization was calibrated on.
        files: SHA-256 of each file that was written with `artifact.json`, by name: graph, weights and what clients read
            beside them.
    """

    path: str
    format: str
    dtype: str
    source: str
    source_fingerprint: str
    parity: dict[str, float]
    traced_layers: tuple[int, ...]
    whole_because: str = ""
    quantize: str = "none"
    divergence: dict[str, float] = field(default_factory=dict)
    weight_bytes: int | None = None
    quantize_exclude: tuple[str, ...] = ()
    last_logits: bool = False
    dequantized: str = ""
    dequantized_error: dict[str, float] = field(default_factory=dict)
    hidden: tuple[str, ...] = ()
    engine: str = ""
    data: dict[str, dict[str, Any]] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)

    @property
    def precision(self) -> str:
        """What it is computed in, in a word: how it was quantized, or else its dtype."""
        return self.dtype if self.quantize == "none" else self.quantize

    def findings(self) -> list[str]:
        """What the export found out, in lines for a user."""
        whole = [f"every layer was traced, which takes longer: {self.whole_because}"] if self.whole_because else []
        parity = [f"largest difference from torch, {check}: {number:.2g}" for check, number in self.parity.items()]
        divergence = [
            f"quantized ({self.quantize}), {check}: {share:.1%} of the largest logit"
            for check, share in self.divergence.items()
        ]
        made_float = [
            f"against the weights as {self.dequantized} has them, {check}: {share * 100:.2g}% of the largest logit"
            for check, share in self.dequantized_error.items()
        ]
        if made_float:
            made_float.insert(0, f"a graph cannot hold {self.dequantized} weights: they were made float numbers again")
        engine = [f"engine: {self.engine}"] if self.engine else []
        return whole + parity + divergence + made_float + engine

    def write(self, folder: Path) -> None:
        """Write `artifact.json` into `folder`."""
        fields = {key: value for key, value in asdict(self).items() if key != "path"}
        (folder / ARTIFACT_FILE).write_text(json.dumps(fields, indent=2) + "\n")

    def with_files(self, folder: Path) -> Artifact:
        """The same, of the files that are in `folder`, logs left out."""
        names = [file.name for file in folder.iterdir() if file.suffix != ".log"]
        return replace(self, files=folder_hashes(folder, names))

    @classmethod
    def read(cls, folder: Path) -> Artifact:
        """Read a folder's `artifact.json`.

        Raises:
            StreamlineError: the file is not one of ours.
        """
        try:
            fields = json.loads((folder / ARTIFACT_FILE).read_text())
            lists = {name: tuple(fields[name]) for name in ("traced_layers", "quantize_exclude", "hidden")}
            return cls(path=str(folder), **{**fields, **lists})
        except (OSError, TypeError, ValueError, KeyError) as error:
            raise StreamlineError(f"{folder / ARTIFACT_FILE}: not an exported model's description ({error})") from None


def is_artifact(path: str | Path) -> bool:
    """Whether `path` is the folder of an exported model rather than a checkpoint."""
    return (Path(path) / ARTIFACT_FILE).is_file()

"""Artifacts, which are exported models on disk, and their description in `artifact.json`.

Pydantic does not read it: that would add about 6 MiB and 0.2 s to each timing worker, whose memory is measured.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from optimum.streamline.errors import StreamlineError
from optimum.streamline.system.atomic_output import write_file
from optimum.streamline.system.content_hashes import folder_hashes

ARTIFACT_FILE = "artifact.json"


@dataclass(frozen=True)
class Artifact:
    """An exported model. Its folder holds these fields, except `path`, in `artifact.json`.

    Args:
        path: The artifact's folder.
        format: `onnx` or `tensorrt`.
        dtype: `fp32`, `fp16` or `bf16`.
        source: The checkpoint that was exported. For a model that was in memory, its name: such an artifact leads back
            to no folder.
        source_fingerprint: That checkpoint's `source.fingerprint`. It shows whether an artifact is an export of the
            original.
        parity: Largest absolute logit difference from torch, by check.
        traced_layers: Indices of the layers whose graph was traced. The graphs of the others were copied from these.
        whole_because: Why every layer was traced although some are alike; empty if the export did not have to.
        quantize: How the graph was quantized after the comparison with torch, such as `int4`; `none` if it was not.
        divergence: For a quantized graph, the largest logit difference from torch as a share of the largest logit, by
            check.
        weight_bytes: For a quantized graph, the bytes of the weights that take part in computing one token.
        quantize_exclude: The patterns of modules that were left in float, as the user gave them.
        last_logits: Whether the graph computes only the logits of each row's last token by default.
        dequantized: The quantizer of the checkpoint, whose weights had to be dequantized for the export; empty if they
            were float.
        dequantized_error: If they were dequantized, the largest logit difference of the finished graph from the
            quantized checkpoint in torch, as a share of the largest logit, by check.
        hidden: Names of the graph's values that are the hidden states before the first layer and after each layer;
            empty if the graph does not have them.
        engine: The builder of the TensorRT engine and the GPUs that it runs on; empty if there is no engine.
        data: The text that influenced the weights, by purpose, as `windows.seen_text` describes it: the text on which
            layers were chosen and healed, and on which the quantization was calibrated.
        files: SHA-256 of each file in the folder, except logs and `artifact.json`, by name.
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
        """The quantization of the graph, or its dtype if it is not quantized."""
        return self.dtype if self.quantize == "none" else self.quantize

    def findings(self) -> list[str]:
        """What the export measured and decided, as lines for the user."""
        whole = (
            [f"every layer was traced, so the export took longer: {self.whole_because}"] if self.whole_because else []
        )
        parity = [f"largest difference from torch, {check}: {number:.2g}" for check, number in self.parity.items()]
        divergence = [
            f"quantized ({self.quantize}), {check}: {share:.1%} of the largest logit"
            for check, share in self.divergence.items()
        ]
        made_float = [
            f"compared with the {self.dequantized} checkpoint, {check}: {share * 100:.2g}% of the largest logit"
            for check, share in self.dequantized_error.items()
        ]
        if made_float:
            made_float.insert(0, f"a graph cannot hold {self.dequantized} weights: they were dequantized")
        engine = [f"engine: {self.engine}"] if self.engine else []
        return whole + parity + divergence + made_float + engine

    def write(self, folder: Path) -> None:
        """Write `artifact.json` into `folder`."""
        fields = {key: value for key, value in asdict(self).items() if key != "path"}
        write_file(folder / ARTIFACT_FILE, json.dumps(fields, indent=2) + "\n")

    def with_files(self, folder: Path) -> Artifact:
        """A copy of this description with the hashes of the files in `folder`, except logs."""
        names = [file.name for file in folder.iterdir() if file.suffix != ".log"]
        return replace(self, files=folder_hashes(folder, names))

    @classmethod
    def read(cls, folder: Path) -> Artifact:
        """Read the `artifact.json` of a folder.

        Raises:
            StreamlineError: the file is missing, is not JSON, or lacks a field.
        """
        try:
            fields = json.loads((folder / ARTIFACT_FILE).read_text())
            lists = {name: tuple(fields[name]) for name in ("traced_layers", "quantize_exclude", "hidden")}
            return cls(path=str(folder), **{**fields, **lists})
        except (OSError, TypeError, ValueError, KeyError) as error:
            raise StreamlineError(f"{folder / ARTIFACT_FILE}: not an exported model's description ({error})") from None


def is_artifact(path: str | Path) -> bool:
    """Whether `path` is the folder of an exported model."""
    return (Path(path) / ARTIFACT_FILE).is_file()

"""TensorRT as a backend of `transformers.exporters`, so that `ExportedModel.from_pretrained` opens our exports.

    import optimum.exporters.streamline
    from transformers.exporters import ExportedModel

    model = ExportedModel.from_pretrained("engine")
    output = model(input_ids=prompt)
    output = model(input_ids=token, past_key_values=output.past_key_values)

Importing this file registers the backend. `registration.py` imports it as soon as transformers' table of backends is
imported.
"""

from __future__ import annotations

import shutil
from collections.abc import MutableMapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.exporters.auto import register_backend
from transformers.exporters.base import HfExporter
from transformers.exporters.configs import ExportConfigMixin
from transformers.exporters.metadata import ExportMetadata
from transformers.exporters.runners.base import ModelRunner
from transformers.modeling_outputs import CausalLMOutputWithPast

from optimum.streamline.checkpoints.loading import check_device
from optimum.streamline.errors import StreamlineError

from .engine_options import EngineOptions
from .engine_record import ENGINE_FILE, RECORD_FILE
from .runner import TensorrtRunner
from .transformers_manifest import FORMAT, describe


@dataclass
class TensorrtConfig(ExportConfigMixin):
    """The settings of an export to TensorRT: `dtype`, and the fields of `EngineOptions`.

    Args:
        export_format: `tensorrt`.
        dtype: The type of weights, caches and logits: `fp32`, `fp16` or `bf16`.
        builder: `tensorrt` or `tensorrt-rtx`.
        capabilities: The compute capabilities to build for, 89 for 8.9; empty for the GPU of this machine.
        max_batch: The most rows of a call.
        max_length: The most tokens of a text; `None` as in `EngineOptions`.
        max_input: The most new tokens of a call; `None` as in `EngineOptions`.
    """

    export_format: str = FORMAT
    dtype: str = "fp16"
    builder: str = "tensorrt"
    capabilities: tuple[int, ...] = ()
    max_batch: int = 1
    max_length: int | None = None
    max_input: int | None = None

    @property
    def engine(self) -> EngineOptions:
        """The same settings as `EngineOptions`."""
        return EngineOptions(self.builder, tuple(self.capabilities), self.max_batch, self.max_length, self.max_input)


@dataclass(frozen=True)
class TensorrtProgram:
    """An engine and its record, in a folder.

    Args:
        folder: The folder.
        scratch: The temporary directory of a program that is not saved yet; it is deleted with the program.
    """

    folder: Path
    scratch: TemporaryDirectory[str] | None = None


class TensorrtExporter(HfExporter):
    """Exports a model to TensorRT as `export_checkpoint` does: the graph is compared with torch before the build."""

    export_format = FORMAT
    config_class = TensorrtConfig
    program_suffix = Path(ENGINE_FILE).suffix

    def export_program(
        self, model: PreTrainedModel, sample_inputs: MutableMapping[str, Any], config: ExportConfigMixin
    ) -> tuple[TensorrtProgram, ExportMetadata]:
        """Build an engine for a model.

        Args:
            model: The model; it is saved as a checkpoint first.
            sample_inputs: Ignored; the graph always has the inputs of a causal language model.
            config: A `TensorrtConfig`.

        Returns:
            The program, and its metadata for transformers.

        Raises:
            ParityError: the graph does not compute what the model does.
            StreamlineError: as `export_checkpoint`.
        """
        from optimum.exporters.streamline.export_steps import check_packages

        check_packages(FORMAT)
        from .export import TensorrtExport, export_tensorrt

        assert isinstance(config, TensorrtConfig)
        scratch = TemporaryDirectory()
        checkpoint, folder = Path(scratch.name) / "checkpoint", Path(scratch.name) / "engine"
        model.save_pretrained(checkpoint)
        export_tensorrt(TensorrtExport(str(checkpoint), folder, config.engine, config.dtype))
        shutil.rmtree(checkpoint)
        return TensorrtProgram(folder, scratch), describe(type(model).__name__, config.dtype)

    @classmethod
    def save_program(cls, program: TensorrtProgram, path: str | Path) -> None:
        """Write the engine to `path`, and its record beside it."""
        shutil.copy(program.folder / ENGINE_FILE, path)
        shutil.copy(program.folder / RECORD_FILE, Path(path).parent)

    @classmethod
    def load_program(cls, path: str | Path) -> TensorrtProgram:
        """Load the engine at `path`; its record must be in the same folder."""
        return TensorrtProgram(Path(path).parent)

    @classmethod
    def program_files(cls, filename: str) -> list[str]:
        """The names of a program's files: the engine and its record."""
        return [filename, RECORD_FILE]


class TensorrtModelRunner(ModelRunner):
    """Runs an engine for transformers: from `input_ids`, `attention_mask` and `past_key_values` to logits and cache."""

    def __init__(self, runner: TensorrtRunner, metadata: ExportMetadata, device: torch.device) -> None:
        super().__init__(metadata)
        self._runner, self._device = runner, device

    @property
    def device(self) -> torch.device:
        """The device that the engine runs on."""
        return self._device

    @classmethod
    def from_program(
        cls, program: TensorrtProgram, metadata: ExportMetadata, device: Any = None
    ) -> TensorrtModelRunner:
        """Open a program for running.

        Args:
            program: The engine and its record.
            metadata: The metadata of the export.
            device: The device to run on; by default `cuda`.

        Raises:
            StreamlineError: the engine cannot run on this machine.
        """
        target = torch.device("cuda" if device is None else device)
        check_device(target.type)
        return cls(TensorrtRunner(program.folder, device=str(target)), metadata, target)

    def __call__(self, share_inputs: bool = True, share_outputs: bool = False, **kwargs: Any) -> CausalLMOutputWithPast:
        """Compute the logits of tokens.

        Args:
            share_inputs: Ignored: inputs are always copied, and caches are never.
            share_outputs: Ignored: logits are always copied.
            kwargs: `input_ids`, `[batch, length]`. For a prompt also `attention_mask`, `[batch, length]`, with padding
                on the left. After a prompt `past_key_values` from the call before, which is changed in place.

        Returns:
            The logits `[batch, length, vocabulary]`, and the cache with the new tokens.

        Raises:
            StreamlineError: `input_ids` is missing, there is padding after a prompt, or as `TensorrtRunner.prefill`.
        """
        ids, mask, past = (kwargs.get(name) for name in ("input_ids", "attention_mask", "past_key_values"))
        if ids is None:
            raise StreamlineError("input_ids None: must be the tokens to compute, [batch, length]")
        tokens = ids.cpu().numpy()
        new_mask = None if mask is None else mask[:, -tokens.shape[1] :].cpu().numpy().astype(tokens.dtype)
        if past is None:
            logits, cache = self._runner.prefill(tokens, new_mask)
        else:
            if new_mask is not None and not new_mask.all():
                raise StreamlineError("attention_mask: there is padding after a prompt; padding must be before it")
            logits, cache = self._runner.decode(tokens, past)
        untyped_cache: Any = cache  # transformers expects its own cache class here
        return CausalLMOutputWithPast(logits=torch.from_numpy(logits).to(ids.device), past_key_values=untyped_cache)


# Importing this file registers the backend.
register_backend(TensorrtExporter, TensorrtModelRunner)

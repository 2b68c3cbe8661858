"""TensorRT as a backend of transformers' exporters: `ExportedModel.from_pretrained` opens what was exported here.

    import optimum.exporters.streamline
    from transformers.exporters import ExportedModel

    model = ExportedModel.from_pretrained("engine")
    output = model(input_ids=prompt)
    output = model(input_ids=token, past_key_values=output.past_key_values)

`registration.py` imports this when transformers' table of backends is imported, and importing it registers.
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
    """What engine to build; the fields are those of `EngineOptions`, beside `dtype`.

    Args:
        export_format: `tensorrt`.
        dtype: `fp32`, `fp16` or `bf16`.
        builder: As in `EngineOptions`; so are the others.
        capabilities: Compute capabilities to build for.
        max_batch: Rows.
        max_length: Tokens of a text.
        max_input: New tokens a call.
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
        """The same, as an export takes it."""
        return EngineOptions(self.builder, tuple(self.capabilities), self.max_batch, self.max_length, self.max_input)


@dataclass(frozen=True)
class TensorrtProgram:
    """An engine and its record.

    Args:
        folder: Where they lie.
        scratch: What clears the folder away, of a program that was not saved yet.
    """

    folder: Path
    scratch: TemporaryDirectory[str] | None = None


class TensorrtExporter(HfExporter):
    """Exports to TensorRT as `export_checkpoint` does, compared with torch before the engine is built."""

    export_format = FORMAT
    config_class = TensorrtConfig
    program_suffix = Path(ENGINE_FILE).suffix

    def export_program(
        self, model: PreTrainedModel, sample_inputs: MutableMapping[str, Any], config: ExportConfigMixin
    ) -> tuple[TensorrtProgram, ExportMetadata]:
        """The engine of a model.

        Args:
            model: One that can be saved.
            sample_inputs: Are not read: the graph has the inputs of a language model, whatever is given.
            config: A `TensorrtConfig`.

        Raises:
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
        """The engine at `path`, whose record lies beside it."""
        return TensorrtProgram(Path(path).parent)

    @classmethod
    def program_files(cls, filename: str) -> list[str]:
        """The engine's file and its record's."""
        return [filename, RECORD_FILE]


class TensorrtModelRunner(ModelRunner):
    """Runs an engine: `input_ids`, `attention_mask` and `past_key_values` in, logits and the cache out."""

    def __init__(self, runner: TensorrtRunner, metadata: ExportMetadata, device: torch.device) -> None:
        super().__init__(metadata)
        self._runner, self._device = runner, device

    @property
    def device(self) -> torch.device:
        """Where the engine runs."""
        return self._device

    @classmethod
    def from_program(
        cls, program: TensorrtProgram, metadata: ExportMetadata, device: Any = None
    ) -> TensorrtModelRunner:
        """A runner of a program.

        Raises:
            StreamlineError: the engine cannot be run here.
        """
        there = torch.device("cuda" if device is None else device)
        check_device(there.type)
        return cls(TensorrtRunner(program.folder, device=str(there)), metadata, there)

    def __call__(self, share_inputs: bool = True, share_outputs: bool = False, **kwargs: Any) -> CausalLMOutputWithPast:
        """Logits `[batch, length, vocabulary]` of these tokens, and the cache that holds them too.

        Args:
            share_inputs: Makes no difference: inputs are copied, caches stay where they are.
            share_outputs: Makes no difference: logits are copied.
            kwargs: `input_ids` `[batch, length]`; of a prompt, `attention_mask` `[batch, length]`, padding on the left;
                after it, the `past_key_values` of the call before, which it is written into.

        Raises:
            StreamlineError: as `TensorrtRunner.prefill`; or there is padding behind a prompt.
        """
        ids, mask, past = (kwargs.get(name) for name in ("input_ids", "attention_mask", "past_key_values"))
        if ids is None:
            raise StreamlineError("input_ids None: an engine needs tokens")
        tokens = ids.cpu().numpy()
        given = None if mask is None else mask[:, -tokens.shape[1] :].cpu().numpy().astype(tokens.dtype)
        if past is None:
            logits, cache = self._runner.prefill(tokens, given)
        else:
            if given is not None and not given.all():
                raise StreamlineError("attention_mask: there is padding behind a prompt; it must be before it")
            logits, cache = self._runner.decode(tokens, past)
        found: Any = cache
        return CausalLMOutputWithPast(logits=torch.from_numpy(logits).to(ids.device), past_key_values=found)


# On import: `registration.py` says when. This may be the first to import the table that it registers in.
register_backend(TensorrtExporter, TensorrtModelRunner)

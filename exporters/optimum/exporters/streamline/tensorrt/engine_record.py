"""The record of an engine, `engine.json` beside it: its builder, the GPUs and shapes it was built for, its inputs."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from optimum.exporters.streamline.rewriting.public_names import MaskInput
from optimum.streamline.errors import StreamlineError

from .engine_options import Limits
from .profiles import Profile

ENGINE_FILE, RECORD_FILE, TIMING_FILE = "model.engine", "engine.json", "timing.cache"


@dataclasses.dataclass(frozen=True)
class Machine:
    """The machine that an engine is to run on.

    Args:
        version: The version of the installed library.
        gpu: The name of the GPU.
        capability: The GPU's compute capability, 89 for 8.9.
    """

    version: str
    gpu: str
    capability: int


@dataclass(frozen=True, config=ConfigDict(extra="forbid", strict=True))
class EngineRecord:
    """The record of an engine.

    Args:
        builder: A key of `build_engine.BUILDERS`.
        version: The version of the builder's library.
        gpu: The name of the GPU that it was built on and for; empty if it was built for `capabilities`.
        capabilities: The compute capabilities that it was built for, 89 for 8.9.
        limits: The largest requests that it takes.
        profiles: The shapes that it was built for.
        aliases: For each cache output, the cache input whose memory it shares, by name.
        masks: The mask inputs.
        layers: The number of layers of the network before the library fused them.
    """

    builder: str
    version: str
    gpu: str
    capabilities: tuple[int, ...]
    limits: Limits
    profiles: tuple[Profile, ...]
    aliases: dict[str, str]
    masks: tuple[MaskInput, ...]
    layers: int

    @property
    def target(self) -> str:
        """The GPUs that the engine was built for, in words."""
        return self.gpu or f"compute capability {', '.join(map(str, self.capabilities))}"

    def check_machine(self, here: Machine) -> None:
        """Refuse to run the engine on a machine that it was not built for.

        Args:
            here: The machine.

        Raises:
            StreamlineError: the library's version or the GPU differs; names both.
        """
        if here.version != self.version:
            raise StreamlineError(
                f"engine of {self.builder} {self.version}: cannot be run by version {here.version}; export it again"
            )
        built_here = here.gpu == self.gpu if self.gpu else here.capability in self.capabilities
        if not built_here:
            raise StreamlineError(
                f"engine for {self.target}: cannot be run on {here.gpu} (compute capability {here.capability}); export "
                "it again"
            )

    def write(self, folder: Path) -> None:
        """Write `engine.json` into `folder`."""
        (folder / RECORD_FILE).write_text(json.dumps(dataclasses.asdict(self), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> EngineRecord:
        """Read the `engine.json` of a folder.

        Args:
            folder: The artifact's folder.

        Raises:
            StreamlineError: the file is missing, or is not the record of an engine.
        """
        file = folder / RECORD_FILE
        try:
            return TypeAdapter(cls).validate_json(file.read_bytes())
        except ValidationError as error:
            first = error.errors()[0]
            location = ".".join(str(part) for part in first["loc"])
            raise StreamlineError(
                f"{file}: not the record of an engine ({location or 'the text'}: {first['msg']})"
            ) from None
        except OSError as error:
            raise StreamlineError(f"{file}: not the record of an engine ({error})") from None

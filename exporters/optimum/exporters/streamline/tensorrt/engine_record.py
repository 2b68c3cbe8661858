"""What is known of an engine: what built it, for which GPUs and shapes, and how it is fed. `engine.json` beside it."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from optimum.exporters.streamline.rewriting.public_names import MaskInput
from optimum.streamline.errors import StreamlineError

from .engine_options import Limits
from .profiles import Profile, ShapeRange

ENGINE_FILE, RECORD_FILE, TIMING_FILE = "model.engine", "engine.json", "timing.cache"


@dataclass(frozen=True)
class Machine:
    """Where an engine is to run.

    Args:
        version: Of the library that would run it.
        gpu: The name of the GPU.
        capability: Its compute capability, 89 for 8.9.
    """

    version: str
    gpu: str
    capability: int


@dataclass(frozen=True)
class EngineRecord:
    """What is known of an engine.

    Args:
        builder: A key of `build_engine.BUILDERS`.
        version: Of that library.
        gpu: The GPU it was built on and for; empty where it was built for `capabilities`.
        capabilities: The compute capabilities that it was built for.
        limits: The largest requests.
        profiles: The shapes that it was built for.
        aliases: Of each cache output the input that it lies in the place of.
        masks: The inputs that are masks.
        layers: Of the network, before they were fused.
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
        """The GPUs that it was built for, in words."""
        return self.gpu or f"compute capability {', '.join(map(str, self.capabilities))}"

    def check_machine(self, here: Machine) -> None:
        """Refuse to run it where it was not built for.

        Raises:
            StreamlineError: naming what differs.
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
        (folder / RECORD_FILE).write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> EngineRecord:
        """Read a folder's `engine.json`.

        Raises:
            StreamlineError: the file is not there, or not one of ours.
        """
        file = folder / RECORD_FILE
        try:
            fields: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
            profiles = [
                {
                    name: ShapeRange(**{each: tuple(sizes) for each, sizes in shapes.items()})
                    for name, shapes in profile.items()
                }
                for profile in fields.pop("profiles")
            ]
            return cls(
                capabilities=tuple(fields.pop("capabilities")),
                limits=Limits(**fields.pop("limits")),
                profiles=tuple(profiles),
                masks=tuple(MaskInput(**mask) for mask in fields.pop("masks")),
                **fields,
            )
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise StreamlineError(f"{file}: not the record of an engine ({error})") from None

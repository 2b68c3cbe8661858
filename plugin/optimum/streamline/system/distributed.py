"""The processes of one distributed run, as a launcher such as `accelerate launch` starts them.

Every process makes the same choices. Only the main process, rank 0, prints and writes files. accelerate connects the
processes. Their ranks are read from the environment, because asking `PartialState` imports torch and connects them.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from importlib.metadata import version as version_of
from typing import Any, TypeVar

from optimum.streamline.errors import StreamlineError

T = TypeVar("T")

# The environment variables in which launchers give the number of processes and the rank of each. `torchrun` sets the
# first; the MPI launchers, which `accelerate launch` uses for CPU training, set the others.
_COUNTS = ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")
_RANKS = ("RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "MV2_COMM_WORLD_RANK")
# Settings of `accelerate launch` that healing does not support, and the only value it accepts for each. Without this
# check the transformers `Trainer` would apply them without a message.
_ONLY = {
    "ACCELERATE_MIXED_PRECISION": ("no", "heal-dtype sets the precision"),
    "ACCELERATE_USE_DEEPSPEED": (
        "false",
        "healing shares weights among processes by FSDP only; launch with ACCELERATE_USE_FSDP 'true' and FSDP_VERSION "
        "'2', or give accelerate a configuration of FSDP",
    ),
}
_SHARDS = "ACCELERATE_USE_FSDP"
# The first version of transformers whose Trainer leaves shared weights to torch.
_TRANSFORMERS = (5, 19)


@dataclass(frozen=True)
class Sharding:
    """How the weights of a model in training are shared among the processes, by accelerate's settings for FSDP2.

    Args:
        frees_layers: Whether each layer is freed after its forward pass, and gathered again for the backward pass.
        checkpoints: Whether layers are computed again for the gradient.
    """

    frees_layers: bool
    checkpoints: bool


_found: list[Sharding] = []


def process_count() -> int:
    """The number of processes that the launcher started; 1 without a launcher."""
    return max(int(os.environ.get(name, "1")) for name in _COUNTS)


def process_rank() -> int:
    """The rank of this process, from 0; 0 without a launcher."""
    # Ignore a rank without a process count: a scheduler may have set it for another purpose.
    return 0 if process_count() == 1 else max(int(os.environ.get(name, "0")) for name in _RANKS)


def is_main() -> bool:
    """Whether this process is the main one, which alone prints and writes files."""
    return process_rank() == 0


def join_processes(device: str) -> None:
    """Initialize the process group, and assign this process its own GPU if `device` is `cuda`.

    Does nothing if there is only one process.

    Args:
        device: `cpu` or `cuda`.

    Raises:
        StreamlineError: the launcher was set to mixed precision, to DeepSpeed or to the first version of FSDP.
    """
    for name, (wanted, why) in _ONLY.items():
        value = os.environ.get(name, wanted)
        if value.lower() != wanted:
            raise StreamlineError(f"{name} {value!r}: must be {wanted!r}, because {why}")
    sharding()
    if process_count() > 1:
        _partial_state()(cpu=device == "cpu")


def sharding() -> Sharding | None:
    """How training shares the weights among the processes; `None` if each holds all, or there is one process.

    The first call takes the setting that asks for FSDP out of the environment, because models are shared by
    `models/sharded_weights.py`. With the setting, the Trainer would share the wrong module, and transformers would load
    no weights in all processes but the first.

    Raises:
        StreamlineError: the settings ask for something that healing does not do.
    """
    if _flag(_SHARDS, False):
        _found.append(_sharding())
        del os.environ[_SHARDS]
    return _found[-1] if _found and process_count() > 1 else None


def _sharding() -> Sharding:
    version = os.environ.get("FSDP_VERSION", "1")
    if version != "2":
        raise StreamlineError(f"FSDP_VERSION {version!r}: must be '2'; set fsdp_version to 2 for accelerate")
    if _flag("FSDP_OFFLOAD_PARAMS", False):
        raise StreamlineError(
            "FSDP_OFFLOAD_PARAMS 'true': healing keeps its part of the weights on its device; set 'false'"
        )
    installed = version_of("transformers")
    if tuple(map(int, installed.split(".")[:2])) < _TRANSFORMERS:
        needed = ".".join(map(str, _TRANSFORMERS))
        raise StreamlineError(f"{_SHARDS} 'true': needs transformers {needed} or newer; {installed} is installed")
    return Sharding(_flag("FSDP_RESHARD_AFTER_FORWARD", True), _flag("FSDP_ACTIVATION_CHECKPOINTING", False))


def _flag(name: str, default: bool) -> bool:
    """An environment variable of a launcher that is true or false."""
    value = os.environ.get(name, str(default)).lower()
    if value in ("true", "1", "yes"):
        return True
    if value in ("false", "0", "no"):
        return False
    raise StreamlineError(f"{name} {os.environ[name]!r}: must be 'true' or 'false'")


def wait_for_all() -> None:
    """Block until every process has reached this call. Returns at once if there is only one process."""
    if process_count() > 1:
        _partial_state()().wait_for_everyone()


def from_main(value: T) -> T:
    """Broadcast a value from the main process.

    Args:
        value: The value; only the one of the main process counts.

    Returns:
        The value of the main process, in every process.
    """
    if process_count() == 1:
        return value
    from accelerate.utils import broadcast_object_list

    _partial_state()()
    values: list[T] = broadcast_object_list([value])
    return values[0]


def _partial_state() -> Any:
    """accelerate's `PartialState` class, which initializes the process group when it is called."""
    # Imported here because it imports torch. A command that only rejects its flags should not wait for that.
    from accelerate import PartialState

    return PartialState

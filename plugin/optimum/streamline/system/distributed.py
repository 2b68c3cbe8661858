"""The processes of one distributed run, as a launcher such as `accelerate launch` starts them.

Every process makes the same choices. Only the main process, rank 0, prints and writes files. accelerate connects the
processes. Their ranks are read from the environment, because asking `PartialState` imports torch and connects them.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Sharding:
    """How the weights of a model in training are shared among the processes, by accelerate's settings for FSDP2.

    Args:
        device: Where the weights are, `cpu` or `cuda`.
        frees_layers: Whether each layer is freed after its forward pass, and gathered again for the backward pass.
        offloads: Whether parts that are not in use are in the memory of the CPU.
        checkpoints: Whether layers are computed again for the gradient.
    """

    device: str
    frees_layers: bool
    offloads: bool
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
    _take_sharding(device)
    if process_count() > 1:
        _partial_state()(cpu=device == "cpu")


def sharding() -> Sharding | None:
    """How training shares the weights among the processes; `None` if each process holds all. After `join_processes`."""
    return _found[-1] if _found and process_count() > 1 else None


def _take_sharding(device: str) -> None:
    """Take the setting that asks for FSDP out of the environment.

    The models are sharded by `models/sharded_weights.py`. With the setting, the Trainer would share the wrong module,
    and transformers would load no weights in all processes but the first.
    """
    if os.environ.get(_SHARDS, "false").lower() != "true":
        return
    version = os.environ.get("FSDP_VERSION", "1")
    if version != "2":
        raise StreamlineError(
            f"FSDP_VERSION {version!r}: must be '2'; set fsdp_version 2 in accelerate's configuration"
        )
    from accelerate import FullyShardedDataParallelPlugin
    from torch.distributed.fsdp import CPUOffloadPolicy

    found = FullyShardedDataParallelPlugin()
    del os.environ[_SHARDS]
    offloads = isinstance(found.cpu_offload, CPUOffloadPolicy)
    _found.append(Sharding(device, bool(found.reshard_after_forward), offloads, found.activation_checkpointing))


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

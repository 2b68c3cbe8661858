"""The processes of one distributed run, as a launcher such as `accelerate launch` starts them.

Every process makes the same choices. Only the main process, rank 0, prints and writes files. accelerate connects the
processes. Their ranks are read from the environment, because asking `PartialState` imports torch and connects them.
"""

from __future__ import annotations

import os
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
    "ACCELERATE_MIXED_PRECISION": "no",
    "ACCELERATE_USE_FSDP": "false",
    "ACCELERATE_USE_DEEPSPEED": "false",
}


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
        StreamlineError: the launcher was set to mixed precision, FSDP or DeepSpeed. The recipe decides the precision
            of healing, and every process holds the whole model.
    """
    for name, wanted in _ONLY.items():
        value = os.environ.get(name, wanted)
        if value.lower() != wanted:
            raise StreamlineError(
                f"{name} {value!r}: each process holds the whole model, and heal-dtype sets the precision; launch with "
                f"{wanted!r}"
            )
    if process_count() > 1:
        _partial_state()(cpu=device == "cpu")


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

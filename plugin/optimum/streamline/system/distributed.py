"""Which of several processes this one is, where a launcher such as `accelerate launch` started more than one.

Every process makes the same choices; the main one alone prints and writes. Knows nothing of training. Processes meet
through accelerate; the environment says who they are, because to ask `PartialState` imports torch and makes them meet.
"""

from __future__ import annotations

import os
from typing import Any, TypeVar

from optimum.streamline.errors import StreamlineError

T = TypeVar("T")

# What launchers call the number of processes and a process's own number: torch's, then MPI's, which `accelerate
# launch` starts processes on a CPU with.
_COUNTS = ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")
_RANKS = ("RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "MV2_COMM_WORLD_RANK")
# What a launcher may ask of a training that it is not made for, and what it has to say instead. Trainer would do it in
# silence.
_ONLY = {
    "ACCELERATE_MIXED_PRECISION": "no",
    "ACCELERATE_USE_FSDP": "false",
    "ACCELERATE_USE_DEEPSPEED": "false",
}


def process_count() -> int:
    """How many processes the launcher started: 1 without one."""
    return max(int(os.environ.get(name, "1")) for name in _COUNTS)


def is_main() -> bool:
    """Whether this process is the one that prints and writes."""
    # A number without a count, as a scheduler may leave it behind, is that of no process of ours.
    return process_count() == 1 or max(int(os.environ.get(name, "0")) for name in _RANKS) == 0


def join_processes(device: str) -> None:
    """Meet the other processes, and take this one's own GPU where `device` is `cuda`; alone, do nothing.

    Raises:
        StreamlineError: the launcher was told to train otherwise than in fp32 with whole copies of the model.
    """
    for name, wanted in _ONLY.items():
        value = os.environ.get(name, wanted)
        if value.lower() != wanted:
            raise StreamlineError(
                f"{name} {value!r}: training is in fp32, each process with the whole model; launch with {wanted!r}"
            )
    if process_count() > 1:
        _partial_state()(cpu=device == "cpu")


def wait_for_all() -> None:
    """Go on when every process has come here; alone, at once."""
    if process_count() > 1:
        _partial_state()().wait_for_everyone()


def from_main(value: T) -> T:
    """What the main process has for `value`, in all of them; alone, `value` itself."""
    if process_count() == 1:
        return value
    from accelerate.utils import broadcast_object_list

    _partial_state()()
    values: list[T] = broadcast_object_list([value])
    return values[0]


def _partial_state() -> Any:
    # Brings torch with it, which a command that only refuses its flags does without.
    from accelerate import PartialState

    return PartialState

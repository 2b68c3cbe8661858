"""Models that do not fit into memory together: each is opened, read and closed before the next one is opened.

The original's logits are in a file meanwhile. The results are those of models that are in memory together.
"""

from __future__ import annotations

import errno
import gc
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch

from optimum.streamline.errors import StreamlineError
from optimum.streamline.runtime.runner import Runner
from optimum.streamline.system.disk import free_bytes
from optimum.streamline.system.memory import free_memory, taken_memory
from optimum.streamline.system.progress import progress_bar
from optimum.streamline.text.window_file import WindowFile
from optimum.streamline.text.windows import Windows

from .accuracy import Accuracy, accuracy_of, check_finite, check_vocabularies, compare, vocabulary_size
from .intervals import Samples
from .multiple_choice import Answers, Questions, answers_of, option_losses

LOADING = 1.2
"""The memory of models that run on a prompt, as a multiple of their weights."""
PROGRAM = 500_000_000
"""The memory of a process that times a model, without the model, in bytes."""
NOTE = "the models do not fit into memory together: each is measured and timed alone"
"""What the user is told."""


def fit_together(weights: Sequence[int], device: str, max_memory: int | None) -> bool:
    """Whether all models fit into memory together.

    Args:
        weights: The bytes of each model's weights in memory.
        device: `cpu` or `cuda`.
        max_memory: The limit on a CPU, in bytes, with what the program takes; by default what is free.
    """
    needed = LOADING * sum(weights)
    if device == "cpu":
        needed += PROGRAM * len(weights)  # each is timed in a process of its own
        free = free_memory() if max_memory is None else max_memory - taken_memory()
    else:
        _empty_cuda_cache()
        free = torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else 0
    return len(weights) == 1 or needed <= free


def _empty_cuda_cache() -> None:
    """Give back the memory of the GPU that torch keeps for later."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@dataclass
class Measured:
    """What is known of the models that have been measured, in order.

    Args:
        runtimes: The name of each model's runtime.
        sums: What `accuracy.compare` gives on each window, `[3, windows]`.
        losses: The `option_losses` of every question; empty without questions.
    """

    runtimes: list[str] = field(default_factory=list)
    sums: list[Samples] = field(default_factory=list)
    losses: list[list[Samples]] = field(default_factory=list)


def measure_one_at_a_time(
    models: Sequence[Callable[[], Runner]], labels: Sequence[str], windows: Windows, questions: Questions | None
) -> tuple[list[str], list[Accuracy], list[Answers] | list[None]]:
    """Measure models on the same text as `measure_accuracy`, and on the same questions as `answer_questions`.

    Args:
        models: A function for each model that opens it, the original first.
        labels: The names of the models.
        windows: The evaluation text.
        questions: Multiple-choice questions.

    Returns:
        For each model, its runtime, its accuracy and its answers.

    Raises:
        StreamlineError: a model cannot be opened or compared, or the disk has no room for the original's logits.
    """
    measured, sizes, reference = Measured(), list[int](), None
    with TemporaryDirectory(prefix="streamline-") as folder:
        for open_model, label in zip(models, labels, strict=True):
            runner = open_model()
            sizes.append(vocabulary_size(runner))
            check_vocabularies(sizes, labels, windows)
            if reference is None:
                reference = _logit_file(Path(folder), windows, sizes[0])
            measured.runtimes.append(runner.runtime)
            measured.sums.append(_sums(runner, label, reference, windows, is_original=len(sizes) == 1))
            measured.losses.append([option_losses(runner, item) for item in questions.items] if questions else [])
            del runner
            gc.collect()
            _empty_cuda_cache()
    accuracies = [accuracy_of(sums, windows) for sums in measured.sums]
    if questions is None:
        return measured.runtimes, accuracies, [None] * len(models)
    return measured.runtimes, accuracies, answers_of(measured.losses, labels, questions)


def _logit_file(folder: Path, windows: Windows, vocabulary: int) -> WindowFile:
    needed, free = windows.ids.numel() * vocabulary * torch.float32.itemsize, free_bytes(folder)
    try:
        if needed > free:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return WindowFile(folder / "logits.npy", windows.ids, vocabulary)
    except OSError as error:
        raise StreamlineError(
            f"eval-samples {len(windows.ids)}: the models do not fit into memory together, and the original's logits "
            f"take {needed / 1e9:.1f} GB in {folder.parent}, where {free / 1e9:.1f} GB are free ({error.strerror}); "
            "give fewer, or make room"
        ) from error


def _sums(runner: Runner, label: str, reference: WindowFile, windows: Windows, is_original: bool) -> Samples:
    """What `accuracy.compare` gives on each window, `[3, windows]`. The original writes its logits first."""
    sums = np.zeros((3, len(windows.ids)))
    with progress_bar(f"measuring {label}", len(windows.ids)) as bar:
        for index, ids in enumerate(windows.ids.split(1)):
            logits, _ = runner.prefill(ids.numpy())
            if is_original:
                reference.write(ids, torch.from_numpy(logits))
            sums[:, index] = compare(reference.read(ids)[0].numpy(), logits[0], ids[0].numpy())
            if is_original:
                check_finite(sums[:, index], label)
            bar.advance()
    return sums

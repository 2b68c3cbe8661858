"""Models that do not fit into memory together: each is opened, read and closed before the next one is opened.

The original's logits are in a file meanwhile. The results are those of models that are in memory together.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch

from optimum.streamline.errors import StreamlineError
from optimum.streamline.runtime.runner import Runner
from optimum.streamline.system.disk import check_room, free_bytes
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
    runtimes, sizes, sums, losses = list[str](), list[int](), list[Samples](), list[list[Samples]]()
    reference: WindowFile | None = None
    with TemporaryDirectory(prefix="streamline-") as folder:
        for open_model, label in zip(models, labels, strict=True):
            runner = open_model()
            sizes.append(vocabulary_size(runner))
            check_vocabularies(sizes, labels, windows)
            if reference is None:
                reference = _logit_file(Path(folder), windows, sizes[0])
            runtimes.append(runner.runtime)
            sums.append(_sums(runner, label, reference, windows, is_original=len(sizes) == 1))
            losses.append([option_losses(runner, item) for item in questions.items] if questions else [])
            del runner
            gc.collect()
            _empty_cuda_cache()
    accuracies = [accuracy_of(each, windows) for each in sums]
    return runtimes, accuracies, answers_of(losses, labels, questions) if questions else [None] * len(models)


def _logit_file(folder: Path, windows: Windows, vocabulary: int) -> WindowFile:
    needed, free = windows.ids.numel() * vocabulary * torch.float32.itemsize, free_bytes(folder)
    try:
        check_room(folder, needed)
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

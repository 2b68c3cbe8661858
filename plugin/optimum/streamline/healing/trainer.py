"""A training of any parameters with any loss over token windows: its batches, its checkpoints and its log.

Several processes can take part; each computes its share of every batch.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from optimum.streamline.errors import StreamlineError
from optimum.streamline.system.distributed import is_main, process_count, wait_for_all
from optimum.streamline.text.windows import Windows

from .losses import Loss
from .settings import COMPLETE_FILE, HealLog, HealSettings, HealStep, best_row, held_out_windows

if TYPE_CHECKING:
    from .transformers_trainer import TrainingProgress


def train(
    parameters: Sequence[nn.Parameter],
    loss: Loss,
    windows: Windows,
    settings: HealSettings,
    *,
    title: str,
    share: tuple[int, int] = (0, 1),
    workspace: Path | None = None,
    stop_at: float = 1.0,
    versions: torch.Tensor | None = None,
) -> HealLog:
    """Train `parameters`, in place, to minimise `loss`, and keep the weights with the lowest held-out loss.

    The last 5% of the windows are held out. The training passes over the other windows `settings.epochs` times, each
    time in a new random order. A last batch that would not be full is left out.

    Args:
        parameters: The parameters to train.
        loss: A function from token ids `[windows, length]` to the loss, a mean over their tokens.
        windows: The healing text, `settings.heal_windows` windows.
        settings: The settings of the training.
        title: The title of the progress bar.
        share: `(i, n)`: train on part i, from 0, of n equal parts of the windows that are not held out.
        workspace: The folder for checkpoints; none are kept if it is `None`. If it holds checkpoints, the training is
            resumed from the last one. If that is the end of the training, its weights are loaded. On a CPU, a resumed
            training ends with the same weights, bit for bit, as an uninterrupted one.
        stop_at: Stop when this share of the training is done, 0 to 1, and leave the last weights instead of the best. A
            later call with the same `workspace` goes on.
        versions: Token ids `[settings.epochs - 1, windows, length]`: what each pass after the first reads in place of
            the windows.

    Returns:
        The log of the training.

    Raises:
        NotFiniteError: the loss is not finite.
        StreamlineError: there are too few windows, or the batch cannot be divided among the processes.
    """
    from .transformers_trainer import TrainedWeights, TrainingProgress, run_training  # takes seconds to import

    training, held_out = split_windows(windows, share)
    batch = _batch(settings.batch, len(training) * settings.epochs)
    order = _order(len(training), settings, batch)
    read = training[order]
    if versions is not None:
        later = [split_windows(replace(windows, ids=each), share)[0] for each in versions]
        read = torch.stack([training, *later])[torch.arange(len(order)) // len(training), order]
    with _checkpoints(workspace) as (folder, last):
        trained = TrainedWeights(parameters, loss, settings.dtype, folder)
        progress = TrainingProgress(
            trained, held_out, settings, updates=len(order) // batch, saves=workspace is not None, stop_at=stop_at
        )
        if last is not None and _is_done(last, progress):
            trained.load(last / f"model{trained.suffix}.safetensors")
            rows = _log_rows(last)
        else:
            rows = run_training(trained, progress, read, batch, settings, folder, last, title)
        if stop_at == 1:
            best = best_row(rows)["step"]
            trained.restore(best)
            if workspace is not None:
                trained.forget_others(best)
                _keep_result_only(workspace)
    return _log(rows)


def split_windows(windows: Windows, share: tuple[int, int] = (0, 1)) -> tuple[torch.Tensor, torch.Tensor]:
    """Split windows into those to train on and those held out.

    Args:
        windows: The healing text.
        share: As in `train`.

    Returns:
        Token ids to train on and token ids held out, both `[windows, length]`.

    Raises:
        StreamlineError: a part would be empty.
    """
    number, parts = share
    training = _training_windows(len(windows.ids), parts)
    return windows.ids[:training].tensor_split(parts)[number], windows.ids[training:]


def check_sharing(windows: int, batch: int, epochs: int, parts: int) -> None:
    """Refuse windows or a batch that `train` could not divide, before any work is done.

    Args:
        windows: The number of windows of the healing text.
        batch: `HealSettings.batch`.
        epochs: `HealSettings.epochs`.
        parts: The number of trainings, each on an equal part of the windows.

    Raises:
        StreamlineError: the windows or the batch cannot be divided among trainings or processes.
    """
    _batch(batch, _training_windows(windows, parts) // parts * epochs)  # for the part with the fewest windows


def _training_windows(windows: int, parts: int) -> int:
    training = windows - held_out_windows(windows)
    if training < parts:
        raise StreamlineError(f"heal-tokens: {training} windows to train on, too few for {parts} trainings; give more")
    return training


def _batch(wanted: int, available: int) -> int:
    processes = process_count()
    if wanted % processes:
        raise StreamlineError(f"heal-batch {wanted}: must be a multiple of the {processes} processes")
    batch = min(wanted, available // processes * processes)
    if not batch:
        raise StreamlineError(f"heal-tokens: {available} windows to train on, fewer than the {processes} processes")
    return batch


def _order(count: int, settings: HealSettings, batch: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(settings.seed)
    order = torch.cat([torch.randperm(count, generator=generator) for _ in range(settings.epochs)])
    return order[: len(order) // batch * batch]


@contextmanager
def _checkpoints(workspace: Path | None) -> Iterator[tuple[Path, Path | None]]:
    if workspace is None:
        with TemporaryDirectory() as folder:
            yield Path(folder), None
        return
    wait_for_all()  # the main process may still prepare the workspace
    yield workspace, _last_complete(workspace)


def _last_complete(workspace: Path) -> Path | None:
    # `get_last_checkpoint` of transformers takes the last one even if a killed run left it unfinished.
    found = {int(file.parent.name.rpartition("-")[2]): file.parent for file in workspace.glob(f"*/{COMPLETE_FILE}")}
    return found[max(found)] if found else None


def _keep_result_only(workspace: Path) -> None:
    """Delete all checkpoint files of a finished training but the weights and the log of the last checkpoint.

    A run of many trainings, such as CoMe-mp's, would otherwise fill the disk.
    """
    wait_for_all()  # other processes may still write their part of the checkpoint
    last = _last_complete(workspace)
    if last is None or not is_main():
        return
    for checkpoint in workspace.glob("checkpoint-*"):
        if checkpoint != last:
            shutil.rmtree(checkpoint)
    for pattern in ("optimizer*.pt", "scheduler*.pt", "rng_state*.pth"):
        for state in last.glob(pattern):
            state.unlink()


def _log_rows(checkpoint: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads((checkpoint / "trainer_state.json").read_text())["log_history"]
    return rows


def _is_done(checkpoint: Path, progress: TrainingProgress) -> bool:
    row = _log_rows(checkpoint)[-1]
    return progress.is_over(row["step"], row["elapsed"])


def _log(rows: Sequence[dict[str, Any]]) -> HealLog:
    best = best_row(rows)
    steps = tuple(HealStep(row["step"], row["lr"], row["loss"], row["held_out"]) for row in rows[1:])
    return HealLog(rows[0]["held_out"], best["held_out"], best["step"], steps)

"""The training loop: `transformers.Trainer` over token windows, for any parameters and any loss.

The Trainer gets a module that holds only the trained parameters. So it moves, saves and switches to training mode
nothing else. Several processes can take part; each computes its share of every batch.
"""

from __future__ import annotations

import gc
import json
import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from time import monotonic
from typing import Any

import torch
from accelerate.utils import broadcast
from safetensors.torch import load_file
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import Dataset, Sampler, SequentialSampler
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from optimum.streamline.errors import StreamlineError
from optimum.streamline.system.distributed import is_main, process_count, wait_for_all
from optimum.streamline.system.progress import Bar, progress_bar
from optimum.streamline.text.windows import Windows

from .settings import HELD_OUT_SHARE, HealLog, HealSettings, HealStep

# How often the held-out loss is measured during a training.
EVALUATIONS = 10
# The largest number of updates between two checkpoints.
CHECKPOINT_EVERY = 200
# An empty file that is written last into the folder of a checkpoint, when the checkpoint is complete.
COMPLETE_FILE = "whole"

Loss = Callable[[torch.Tensor], torch.Tensor]


class NotFiniteError(StreamlineError):
    """The loss of a training is not finite. A resumed training would fail again, so its checkpoints are deleted."""


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

    Returns:
        The log of the training.

    Raises:
        NotFiniteError: the loss is not finite.
        StreamlineError: there are too few windows, or the batch cannot be divided among the processes.
    """
    training, held_out = split_windows(windows, share)
    batch = _batch(settings.batch, len(training) * settings.epochs)
    order = _order(len(training), settings, batch)
    trained = _TrainedWeights(parameters, loss)
    with _checkpoints(workspace) as (folder, last):
        progress = _TrainingProgress(
            trained, held_out, settings, updates=len(order) // batch, saves=workspace is not None, stop_at=stop_at
        )
        if last is not None and _is_done(last, progress):
            trained.load_state_dict(load_file(last / "model.safetensors"))
            rows = _log_rows(last)
        else:
            rows = _run(trained, progress, training[order], batch, settings, folder, last, title)
            if workspace is not None and stop_at == 1:
                _keep_result_only(workspace)
    if stop_at == 1:
        trained.restore()
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
    training = windows - max(1, round(windows * HELD_OUT_SHARE))
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


class _TrainedWeights(nn.Module):
    """The trained parameters and, as buffers, the best values of them so far. A checkpoint holds both."""

    def __init__(self, parameters: Sequence[nn.Parameter], loss: Loss) -> None:
        super().__init__()
        for parameter in parameters:
            parameter.data = parameter.data.contiguous()  # safetensors saves only contiguous tensors
        self.weights = nn.ParameterList(parameters)
        for number, parameter in enumerate(self.weights):
            self.register_buffer(f"best_{number}", parameter.detach().clone())
        self._loss = loss

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """The loss of a batch."""
        return self._loss(ids)

    @torch.no_grad()
    def keep(self) -> None:
        """Keep the current weights as the best so far."""
        for number, parameter in enumerate(self.weights):
            self.get_buffer(f"best_{number}").copy_(parameter)

    @torch.no_grad()
    def restore(self) -> None:
        """Go back to the best weights."""
        for number, parameter in enumerate(self.weights):
            parameter.copy_(self.get_buffer(f"best_{number}"))

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        device: torch.device = self.weights[0].device
        return device


class _WindowDataset(Dataset[dict[str, torch.Tensor]]):
    def __init__(self, ids: torch.Tensor) -> None:
        self._ids = ids

    def __len__(self) -> int:
        return len(self._ids)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"ids": self._ids[index]}


class _Trainer(Trainer):
    """A Trainer that takes the windows in their given order, and reports each loss to `progress`."""

    progress: _TrainingProgress

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        return SequentialSampler(train_dataset if train_dataset is not None else self.train_dataset)  # type: ignore[arg-type]

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *_: Any, **__: Any) -> Any:
        """The loss of this process's windows; `progress` gets its mean over all processes."""
        loss: torch.Tensor = model(inputs["ids"])
        self.progress.note(
            self.accelerator.reduce(loss.detach().clone(), "mean"), self.optimizer, self.state.global_step
        )
        return loss


class _TrainingProgress(TrainerCallback):
    """The state of a training: its schedule and log. It decides when to measure, keep the best weights, save and stop.

    The log is `TrainerState.log_history`, which every checkpoint holds. Row 0 is before the first update, and each
    update adds a row.
    """

    bar: Bar

    def __init__(
        self,
        trained: _TrainedWeights,
        held_out: torch.Tensor,
        settings: HealSettings,
        updates: int,
        saves: bool,
        stop_at: float,
    ) -> None:
        self.trained, self.settings, self.updates, self.stop_at = trained, settings, updates, stop_at
        self._held_out, self._saves = held_out, saves
        self._start = monotonic()
        self._elapsed = 0.0
        self._loss, self._lr = math.nan, math.nan

    def share_of_peak(self, done: int) -> float:
        """The learning rate of the update after `done` updates, as a share of the peak rate."""
        # Not a schedule of transformers: those count updates only, and this training may end by the clock.
        warmup = round(self.updates * self.settings.warmup_share) / self.updates
        progress = self._progress(done + 1, self._elapsed)
        if progress < warmup:
            return progress / warmup
        fallen = (1 + math.cos(math.pi * (progress - warmup) / (1 - warmup))) / 2
        return self.settings.min_lr_share + (1 - self.settings.min_lr_share) * fallen

    def is_over(self, step: int, elapsed: float) -> bool:
        """Whether the training ends, or stops for now, after update `step`, with `elapsed` seconds passed."""
        return self._progress(step, elapsed) >= self.stop_at

    def note(self, loss: torch.Tensor, optimizer: Any, done: int) -> None:
        """Record the loss and the learning rate of the update after `done` updates.

        Raises:
            NotFiniteError: the loss is not finite. All processes raise it together, because the loss is their mean.
        """
        if not bool(loss.isfinite()):
            raise NotFiniteError(
                f"heal-lr {self.settings.lr}: the loss is no longer finite at update {done + 1}; use a lower rate"
            )
        self._loss, self._lr = loss.item(), float(optimizer.param_groups[0]["lr"])

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Measure the held-out loss before the first update, or continue from the log of the last checkpoint."""
        if not state.log_history:
            state.log_history.append({"step": 0, "held_out": self._measure(0), "elapsed": 0.0})
        self._elapsed = state.log_history[-1]["elapsed"]
        self._start = monotonic() - self._elapsed
        self.bar.advance(state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Log an update. At every tenth of the training, measure the held-out loss, and save."""
        step, before = state.global_step, self._progress(state.global_step - 1, state.log_history[-1]["elapsed"])
        self._elapsed = self._clock()
        over = self.is_over(step, self._elapsed)
        tenths = math.floor(self._progress(step, self._elapsed) * EVALUATIONS) > math.floor(before * EVALUATIONS)
        held_out = None
        if over or tenths:
            held_out = self._measure(step)
            if held_out < _best(state.log_history)["held_out"]:
                self.trained.keep()
        row = {"step": step, "lr": self._lr, "loss": self._loss, "held_out": held_out, "elapsed": self._elapsed}
        state.log_history.append(row)
        control.should_training_stop = over
        control.should_save = self._saves and (held_out is not None or step % CHECKPOINT_EVERY == 0)
        self.bar.advance(note=f"loss {self._loss:.4g}, held out {_best(state.log_history)['held_out']:.4g}")

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Mark a checkpoint as complete."""
        if is_main():
            (Path(args.output_dir) / f"checkpoint-{state.global_step}" / COMPLETE_FILE).touch()

    def _progress(self, step: int, elapsed: float) -> float:
        minutes = self.settings.minutes
        return min(1.0, max(step / self.updates, elapsed / (60 * minutes) if minutes else 0.0))

    def _clock(self) -> float:
        # All processes must take the same updates. So with a time limit, all use the clock of the main process.
        elapsed = monotonic() - self._start
        if self.settings.minutes is None or process_count() == 1:
            return elapsed
        return float(broadcast(torch.tensor([elapsed], device=self.trained.device)).item())

    @torch.no_grad()
    def _measure(self, done: int) -> float:
        """The held-out loss after `done` updates, computed by all processes together.

        Raises:
            NotFiniteError: it is not finite. All processes raise it together.
        """
        processes = process_count()
        rank = torch.distributed.get_rank() if processes > 1 else 0
        total = torch.zeros((), dtype=torch.float64, device=self.trained.device)
        for rows in self._held_out[rank::processes].split(self.settings.batch):
            if len(rows):  # with more processes than windows, some processes have none
                total += self.trained(rows.to(self.trained.device)).double() * len(rows)
        if processes > 1:
            torch.distributed.all_reduce(total)
        held_out = float(total) / len(self._held_out)
        if math.isfinite(held_out):
            return held_out
        if done:
            raise NotFiniteError(
                f"heal-lr {self.settings.lr}: the held-out loss is {held_out} at update {done}; use a lower rate"
            )
        raise NotFiniteError(
            f"model: the held-out loss is {held_out} before the first update; remove fewer, or other layers"
        )


def _run(
    trained: _TrainedWeights,
    progress: _TrainingProgress,
    ids: torch.Tensor,
    batch: int,
    settings: HealSettings,
    folder: Path,
    last: Path | None,
    title: str,
) -> list[dict[str, Any]]:
    optimizer = _optimizer(trained, settings)
    # The schedule counts from the next update. So the first update has a rate above zero, and the last one has the rate
    # at the end of the cosine.
    schedule = LambdaLR(optimizer, progress.share_of_peak)
    trainer = _Trainer(
        model=trained,
        args=_arguments(folder, batch, settings, trained.device),
        train_dataset=_WindowDataset(ids),
        callbacks=[progress],
        optimizers=(optimizer, schedule),
    )
    trainer.progress = progress
    trainer.remove_callback(PrinterCallback)
    with progress_bar(title, math.ceil(progress.updates * progress.stop_at)) as progress.bar:
        trainer.train(resume_from_checkpoint=None if last is None else str(last))
    rows = [row for row in trainer.state.log_history if "held_out" in row]
    # The Trainer is part of reference cycles, with the optimizer state and, for several processes, the gradient hooks.
    # Without this they would stay in memory during the next training.
    del trainer
    gc.collect()
    return rows


def _optimizer(trained: _TrainedWeights, settings: HealSettings) -> torch.optim.AdamW:
    decayed = [each for each in trained.weights if settings.decay_vectors or each.ndim > 1]
    others = [each for each in trained.weights if not settings.decay_vectors and each.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": settings.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=settings.lr, betas=settings.betas)


def _arguments(folder: Path, batch: int, settings: HealSettings, device: torch.device) -> TrainingArguments:
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=batch // process_count(),
        num_train_epochs=1,  # the data set already holds all passes
        learning_rate=settings.lr,
        max_grad_norm=settings.clip,
        seed=settings.seed % 2**32,
        save_strategy="no",  # `progress` decides when to save
        save_total_limit=2,
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=device.type == "cuda",
        use_cpu=device.type == "cpu",
        ddp_find_unused_parameters=True,  # the norm before a skipped attention gets no gradient
        ddp_broadcast_buffers=False,
    )
    # With several GPUs and one process, the Trainer would copy the weights to all GPUs, but the models stay on one.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments


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
    for state in (last / "optimizer.pt", last / "scheduler.pt", *last.glob("rng_state*.pth")):
        state.unlink(missing_ok=True)


def _log_rows(checkpoint: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads((checkpoint / "trainer_state.json").read_text())["log_history"]
    return rows


def _is_done(checkpoint: Path, progress: _TrainingProgress) -> bool:
    row = _log_rows(checkpoint)[-1]
    return progress.is_over(row["step"], row["elapsed"])


def _best(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    return min((row for row in rows if row["held_out"] is not None), key=lambda row: (row["held_out"], row["step"]))


def _log(rows: Sequence[dict[str, Any]]) -> HealLog:
    best = _best(rows)
    steps = tuple(HealStep(row["step"], row["lr"], row["loss"], row["held_out"]) for row in rows[1:])
    return HealLog(rows[0]["held_out"], best["held_out"], best["step"], steps)

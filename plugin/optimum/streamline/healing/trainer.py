"""The one training loop: `transformers.Trainer` over token windows, for whatever weights and whatever loss.

The models stay outside the Trainer: it sees the trained weights alone, so that nothing else is moved, saved or put
into training mode. Any number of processes takes part, each with its share of every batch. Knows no model and no loss.
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

EVALUATIONS = 10
# Updates between two checkpoints, at most.
CHECKPOINT_EVERY = 200
# In a checkpoint's folder when all of it is written.
WHOLE_FILE = "whole"

Loss = Callable[[torch.Tensor], torch.Tensor]


class NotFiniteError(StreamlineError):
    """A training came to a loss that is not finite: it would again."""


def train(
    parameters: Sequence[nn.Parameter],
    loss: Loss,
    windows: Windows,
    settings: HealSettings,
    *,
    title: str,
    share: tuple[int, int] = (0, 1),
    workspace: Path | None = None,
) -> HealLog:
    """Train `parameters`, in place, to bring `loss` down; those that do best on the held-out windows are kept.

    The last 5% of the windows are held out. The rest are seen `settings.epochs` times, each time in another order; the
    last update is left out if its batch would not be full.

    Args:
        loss: From token ids `[windows, length]`, a mean over their tokens.
        windows: `heal_windows` of them.
        title: What the progress bar says.
        share: `(i, n)`: train on the i-th of n equal parts of the windows that are not held out.
        workspace: Where checkpoints go. If it holds some, the training goes on from the last; if it holds the last of
            all, that is the result. On a CPU this ends with the same weights, bit for bit, as without a stop.

    Raises:
        NotFiniteError: the loss is not finite.
        StreamlineError: the windows or the batch cannot be shared out.
    """
    training, held_out = split_windows(windows, share)
    batch = _batch(settings.batch, len(training) * settings.epochs)
    order = _order(len(training), settings, batch)
    trained = _Trained(parameters, loss)
    with _checkpoints(workspace) as (folder, last):
        course = _Course(trained, held_out, settings, updates=len(order) // batch, saves=workspace is not None)
        if last is not None and _is_final(last, course):
            trained.load_state_dict(load_file(last / "model.safetensors"))
            rows = _rows(last)
        else:
            rows = _run(trained, course, training[order], batch, settings, folder, last, title)
            if workspace is not None:
                _keep_result_only(workspace)
    trained.restore()
    return _log(rows)


def split_windows(windows: Windows, share: tuple[int, int] = (0, 1)) -> tuple[torch.Tensor, torch.Tensor]:
    """The windows to train on, as in `train`, and those that are held out.

    Raises:
        StreamlineError: a part would be empty.
    """
    number, parts = share
    training = _to_train_on(len(windows.ids), parts)
    return windows.ids[:training].tensor_split(parts)[number], windows.ids[training:]


def check_sharing(windows: int, batch: int, epochs: int, parts: int) -> None:
    """Refuse, before any work is done, what `train` could not share out.

    Args:
        windows: All of them.
        batch: `HealSettings.batch`.
        epochs: `HealSettings.epochs`.
        parts: How many trainings there will be, each on its own windows.

    Raises:
        StreamlineError: the windows or the batch cannot be shared out among trainings or processes.
    """
    _batch(batch, _to_train_on(windows, parts) // parts * epochs)  # that of the training with the fewest


def _to_train_on(windows: int, parts: int) -> int:
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


class _Trained(nn.Module):
    """The trained weights and, as buffers, the best of them so far: what a checkpoint holds."""

    def __init__(self, parameters: Sequence[nn.Parameter], loss: Loss) -> None:
        super().__init__()
        for parameter in parameters:
            parameter.data = parameter.data.contiguous()  # safetensors takes no other
        self.weights = nn.ParameterList(parameters)
        for number, parameter in enumerate(self.weights):
            self.register_buffer(f"best_{number}", parameter.detach().clone())
        self._loss = loss

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """The loss of a batch."""
        return self._loss(ids)

    @torch.no_grad()
    def keep(self) -> None:
        """Remember the weights as the best so far."""
        for number, parameter in enumerate(self.weights):
            self.get_buffer(f"best_{number}").copy_(parameter)

    @torch.no_grad()
    def restore(self) -> None:
        """Go back to the best weights."""
        for number, parameter in enumerate(self.weights):
            parameter.copy_(self.get_buffer(f"best_{number}"))

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        device: torch.device = self.weights[0].device
        return device


class _Rows(Dataset[dict[str, torch.Tensor]]):
    def __init__(self, ids: torch.Tensor) -> None:
        self._ids = ids

    def __len__(self) -> int:
        return len(self._ids)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"ids": self._ids[index]}


class _Trainer(Trainer):
    """The Trainer, with windows in the order they are given and a loss that has to be finite."""

    course: _Course

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        return SequentialSampler(train_dataset if train_dataset is not None else self.train_dataset)  # type: ignore[arg-type]

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *_: Any, **__: Any) -> Any:
        """The loss of this process's windows; their mean over processes is noted."""
        loss: torch.Tensor = model(inputs["ids"])
        self.course.note(self.accelerator.reduce(loss.detach().clone(), "mean"), self.optimizer, self.state.global_step)
        return loss


class _Course(TrainerCallback):
    """Where a training stands: the rate of the next update, the log, the best weights, and when to save and stop.

    The log is `TrainerState.log_history`, which every checkpoint holds: a row each update, and row 0 before the first.
    """

    bar: Bar

    def __init__(
        self, trained: _Trained, held_out: torch.Tensor, settings: HealSettings, updates: int, saves: bool
    ) -> None:
        self.trained, self.settings, self.updates = trained, settings, updates
        self._held_out, self._saves = held_out, saves
        self._start = monotonic()
        self._elapsed = 0.0
        self._loss, self._lr = math.nan, math.nan

    def share_of_peak(self, done: int) -> float:
        """The rate of the update after `done` of them, as a share of the peak's."""
        # Not a schedule of transformers: those go by updates alone, and this training may end by the clock.
        warmup = round(self.updates * self.settings.warmup_share) / self.updates
        progress = self._progress(done + 1, self._elapsed)
        if progress < warmup:
            return progress / warmup
        fallen = (1 + math.cos(math.pi * (progress - warmup) / (1 - warmup))) / 2
        return self.settings.min_lr_share + (1 - self.settings.min_lr_share) * fallen

    def is_over(self, step: int, elapsed: float) -> bool:
        """Whether that was the last update."""
        return self._progress(step, elapsed) >= 1

    def note(self, loss: torch.Tensor, optimizer: Any, done: int) -> None:
        """Take down the loss and the rate of an update.

        Raises:
            NotFiniteError: the loss is not finite; in every process at once, since it is the mean over them.
        """
        if not bool(loss.isfinite()):
            raise NotFiniteError(
                f"heal-lr {self.settings.lr}: the loss is no longer finite at update {done + 1}; try less"
            )
        self._loss, self._lr = loss.item(), float(optimizer.param_groups[0]["lr"])

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Measure before the first update, or take up the log where the last checkpoint left it."""
        if not state.log_history:
            state.log_history.append({"step": 0, "held_out": self._measure(0), "elapsed": 0.0})
        self._elapsed = state.log_history[-1]["elapsed"]
        self._start = monotonic() - self._elapsed
        self.bar.advance(state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Log an update; every tenth of the way measure, and save."""
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
        """Mark a checkpoint as whole."""
        if is_main():
            (Path(args.output_dir) / f"checkpoint-{state.global_step}" / WHOLE_FILE).touch()

    def _progress(self, step: int, elapsed: float) -> float:
        minutes = self.settings.minutes
        return min(1.0, max(step / self.updates, elapsed / (60 * minutes) if minutes else 0.0))

    def _clock(self) -> float:
        # Where time decides, the main process's clock decides for all: they have to take the same steps.
        elapsed = monotonic() - self._start
        if self.settings.minutes is None or process_count() == 1:
            return elapsed
        return float(broadcast(torch.tensor([elapsed], device=self.trained.device)).item())

    @torch.no_grad()
    def _measure(self, done: int) -> float:
        """The held-out loss after so many updates, the windows shared out among processes.

        Raises:
            NotFiniteError: it is not finite; in every process at once.
        """
        processes = process_count()
        rank = torch.distributed.get_rank() if processes > 1 else 0
        total = torch.zeros((), dtype=torch.float64, device=self.trained.device)
        for rows in self._held_out[rank::processes].split(self.settings.batch):
            if len(rows):  # more processes than windows: the last ones have none, of which there is no mean
                total += self.trained(rows.to(self.trained.device)).double() * len(rows)
        if processes > 1:
            torch.distributed.all_reduce(total)
        held_out = float(total) / len(self._held_out)
        if math.isfinite(held_out):
            return held_out
        if done:
            raise NotFiniteError(
                f"heal-lr {self.settings.lr}: the held-out loss is {held_out} at update {done}; try less"
            )
        raise NotFiniteError(
            f"model: the held-out loss is {held_out} before the first update; remove fewer, or other layers"
        )


def _run(
    trained: _Trained,
    course: _Course,
    ids: torch.Tensor,
    batch: int,
    settings: HealSettings,
    folder: Path,
    last: Path | None,
    title: str,
) -> list[dict[str, Any]]:
    optimizer = _optimizer(trained, settings)
    # The rate is that of the update to come: the first one moves, and the last one is where the cosine ends.
    schedule = LambdaLR(optimizer, course.share_of_peak)
    trainer = _Trainer(
        model=trained,
        args=_arguments(folder, batch, settings, trained.device),
        train_dataset=_Rows(ids),
        callbacks=[course],
        optimizers=(optimizer, schedule),
    )
    trainer.course = course
    trainer.remove_callback(PrinterCallback)
    with progress_bar(title, course.updates) as course.bar:
        trainer.train(resume_from_checkpoint=None if last is None else str(last))
    rows = [row for row in trainer.state.log_history if "held_out" in row]
    # The Trainer hangs in cycles, with it the optimizer's state and, among several processes, what listens to the
    # weights' gradients: none of it may live on into the next training.
    del trainer
    gc.collect()
    return rows


def _optimizer(trained: _Trained, settings: HealSettings) -> torch.optim.AdamW:
    decayed = [each for each in trained.weights if settings.decay_vectors or each.ndim > 1]
    others = [each for each in trained.weights if not settings.decay_vectors and each.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": settings.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=settings.lr, betas=settings.betas)


def _arguments(folder: Path, batch: int, settings: HealSettings, device: torch.device) -> TrainingArguments:
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=batch // process_count(),
        num_train_epochs=1,  # all passes are laid out in one
        learning_rate=settings.lr,
        max_grad_norm=settings.clip,
        seed=settings.seed % 2**32,
        save_strategy="no",  # the course says when
        save_total_limit=2,
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=device.type == "cuda",
        use_cpu=device.type == "cpu",
        ddp_find_unused_parameters=True,  # the norm before a skipped attention is of no use
        ddp_broadcast_buffers=False,
    )
    # Several GPUs and one process: the Trainer would copy the weights to all, but the models stay on one.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments


@contextmanager
def _checkpoints(workspace: Path | None) -> Iterator[tuple[Path, Path | None]]:
    if workspace is None:
        with TemporaryDirectory() as folder:
            yield Path(folder), None
        return
    wait_for_all()  # for the main process to have the workspace in order
    yield workspace, _last_whole(workspace)


def _last_whole(workspace: Path) -> Path | None:
    # `get_last_checkpoint` of transformers takes the last one even if a killed run left it unfinished.
    found = {int(file.parent.name.rpartition("-")[2]): file.parent for file in workspace.glob(f"*/{WHOLE_FILE}")}
    return found[max(found)] if found else None


def _keep_result_only(workspace: Path) -> None:
    """Drop what a training that ended would need to go on: all but the weights and the log of its last checkpoint.

    With it a run of many trainings, as CoMe-mp's, would fill the disk.
    """
    wait_for_all()  # for every process to have saved what it saves
    last = _last_whole(workspace)
    if last is None or not is_main():
        return
    for checkpoint in workspace.glob("checkpoint-*"):
        if checkpoint != last:
            shutil.rmtree(checkpoint)
    for state in (last / "optimizer.pt", last / "scheduler.pt", *last.glob("rng_state*.pth")):
        state.unlink(missing_ok=True)


def _rows(checkpoint: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads((checkpoint / "trainer_state.json").read_text())["log_history"]
    return rows


def _is_final(checkpoint: Path, course: _Course) -> bool:
    row = _rows(checkpoint)[-1]
    return course.is_over(row["step"], row["elapsed"])


def _best(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    return min((row for row in rows if row["held_out"] is not None), key=lambda row: (row["held_out"], row["step"]))


def _log(rows: Sequence[dict[str, Any]]) -> HealLog:
    best = _best(rows)
    steps = tuple(HealStep(row["step"], row["lr"], row["loss"], row["held_out"]) for row in rows[1:])
    return HealLog(rows[0]["held_out"], best["held_out"], best["step"], steps)

"""The loop of a training: `transformers.Trainer` with a schedule, a log and held-out losses of this program's own.

The Trainer gets a module that holds only the trained parameters. So it moves, saves and switches to training mode
nothing else. Only a training imports this file, because the Trainer takes seconds to import.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean
from time import monotonic
from typing import Any

import torch
from accelerate.utils import broadcast
from safetensors.torch import load_file, save_file
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import Dataset, Sampler, SequentialSampler
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from optimum.streamline.errors import require_extra
from optimum.streamline.models.sharded_weights import is_shared, load_own_state, own_part, own_state
from optimum.streamline.recipe.healing import HealDtype
from optimum.streamline.system.distributed import is_main, process_count, process_rank, wait_for_all
from optimum.streamline.system.progress import Bar, progress_bar

from .losses import Loss, NotFiniteError
from .settings import COMPLETE_FILE, EVALUATIONS, HealSettings, best_row

# The largest number of updates between two checkpoints.
CHECKPOINT_EVERY = 200


class TrainedWeights(nn.Module):
    """The trained parameters. Their best values so far are in a file, so that memory does not hold them twice.

    Args:
        parameters: The parameters.
        loss: The loss of a batch.
        dtype: The number type of the arithmetic, as in `HealSettings`.
        folder: The folder of the files. Of several processes, the main one writes and reads them; or each those of its
            own parts, if the parameters are shared.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], loss: Loss, dtype: HealDtype, folder: Path) -> None:
        super().__init__()
        # The Trainer leaves the placement of shared parameters, and the reduction of their gradients, to torch.
        self.is_distributed_loading_by_transformers = self.shared = any(map(is_shared, parameters))
        for parameter in parameters:
            if not self.shared:
                parameter.data = parameter.data.contiguous()  # safetensors saves only contiguous tensors
        self.weights = nn.ParameterList(parameters)
        self._loss, self._dtype, self._folder = loss, dtype, folder

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """The loss of a batch."""
        # Shared weights are gathered in bf16 then. Autocast would keep a copy of each until the end of the pass.
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self._dtype == "bf16" and not self.shared):
            return self._loss(ids)

    def keep(self, step: int) -> None:
        """Write the weights after update `step`, the best so far. Earlier files stay until `forget_others`."""
        self.save(self._file(step))

    def forget_others(self, step: int) -> None:
        """Delete the files of all updates but `step`."""
        if is_main() or self.shared:
            for file in self._folder.glob(f"best-*{self.suffix}.safetensors"):
                if file != self._file(step):
                    file.unlink()

    def restore(self, step: int) -> None:
        """Go back to the weights that were kept after update `step`."""
        if is_main() or self.shared:
            self.load(self._file(step))
        if process_count() > 1 and not self.shared:
            with torch.no_grad():
                for parameter in self.weights:
                    broadcast(parameter)

    def save(self, file: Path) -> None:
        """Write the weights, or this process's parts of them. If they are not shared, only the main process writes."""
        if is_main() or self.shared:
            file.parent.mkdir(parents=True, exist_ok=True)
            save_file({name: own_part(value) for name, value in self.state_dict().items()}, file.with_suffix(".part"))
            file.with_suffix(".part").rename(file)

    @torch.no_grad()
    def load(self, file: Path) -> None:
        """Read what `save` wrote."""
        found = load_file(file)
        for name, value in self.state_dict().items():
            own_part(value).copy_(found[name])

    @property
    def suffix(self) -> str:
        """What the names of this process's files end in."""
        return f"-{process_rank()}" if self.shared else ""

    def _file(self, step: int) -> Path:
        return self._folder / f"best-{step}{self.suffix}.safetensors"

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

    progress: TrainingProgress

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        return SequentialSampler(train_dataset if train_dataset is not None else self.train_dataset)  # type: ignore[arg-type]

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *_: Any, **__: Any) -> Any:
        """The loss of some windows of this process; `progress` gets its mean over all processes."""
        loss: torch.Tensor = model(inputs["ids"])
        self.progress.note(
            self.accelerator.reduce(loss.detach().clone(), "mean"), self.optimizer, self.state.global_step
        )
        return loss

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        assert output_dir is not None
        self.progress.trained.save(self._file(output_dir, "model", "safetensors"))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        self.progress.trained.load(self._file(resume_from_checkpoint, "model", "safetensors"))

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.progress.trained.shared:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        assert self.optimizer is not None
        assert self.lr_scheduler is not None
        torch.save(own_state(self.optimizer), self._file(output_dir, "optimizer", "pt"))
        torch.save(self.lr_scheduler.state_dict(), self._file(output_dir, "scheduler", "pt"))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or not self.progress.trained.shared:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        assert self.optimizer is not None
        assert self.lr_scheduler is not None
        load_own_state(self.optimizer, torch.load(self._file(checkpoint, "optimizer", "pt"), weights_only=True))
        self.lr_scheduler.load_state_dict(torch.load(self._file(checkpoint, "scheduler", "pt"), weights_only=True))

    def _file(self, folder: str, name: str, ending: str) -> Path:
        """A file of a checkpoint. If the weights are shared, each process has its own."""
        return Path(folder) / f"{name}{self.progress.trained.suffix}.{ending}"


class TrainingProgress(TrainerCallback):
    """The state of a training: its schedule and log. It decides when to measure, keep the best weights, save and stop.

    The log is `TrainerState.log_history`, which every checkpoint holds. Row 0 is before the first update, and each
    update adds a row.
    """

    bar: Bar

    def __init__(
        self,
        trained: TrainedWeights,
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
        self._losses, self._lr, self._update = list[float](), math.nan, -1

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
        """Record a loss and the learning rate of the update after `done` updates.

        The loss of an update is the mean of those of its parts.

        Raises:
            NotFiniteError: the loss is not finite. All processes raise it together, because the loss is their mean.
        """
        if not bool(loss.isfinite()):
            raise NotFiniteError(
                f"heal-lr {self.settings.lr}: the loss is no longer finite at update {done + 1}; use a lower rate"
            )
        if done != self._update:
            self._update, self._losses = done, []
        self._losses.append(loss.item())
        self._lr = float(optimizer.param_groups[0]["lr"])

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Measure the held-out loss before the first update, or continue from the log of the last checkpoint."""
        if not state.log_history:
            state.log_history.append({"step": 0, "held_out": self._measure(0), "elapsed": 0.0})
            self.trained.keep(0)
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
        if tenths:  # not where a trial training stops, so that it leaves no trace
            held_out = self._measure(step)
            if held_out < best_row(state.log_history)["held_out"]:
                self.trained.keep(step)
                if not self._saves:  # else when the checkpoint is complete: a resumed run may need the earlier ones
                    self.trained.forget_others(step)
        loss = fmean(self._losses)
        row = {"step": step, "lr": self._lr, "loss": loss, "held_out": held_out, "elapsed": self._elapsed}
        state.log_history.append(row)
        control.should_training_stop = over
        control.should_save = self._saves and (over or held_out is not None or step % CHECKPOINT_EVERY == 0)
        self.bar.advance(note=f"loss {loss:.4g}, held out {best_row(state.log_history)['held_out']:.4g}")

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Mark a checkpoint as complete. From now on the best weights before it are not needed."""
        wait_for_all()  # each process may write files of it
        if is_main():
            (Path(args.output_dir) / f"checkpoint-{state.global_step}" / COMPLETE_FILE).touch()
        self.trained.forget_others(best_row(state.log_history)["step"])

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
        at_once = self.settings.micro_batch or max(1, self.settings.batch // processes)
        total = torch.zeros((), dtype=torch.float64, device=self.trained.device)
        for rows in self._held_out.split(at_once * processes):
            own = rows[process_rank() :: processes]
            # With too few windows, some processes have none. Shared weights need all processes to run the model.
            total += self.trained((own if len(own) else rows[:1]).to(self.trained.device)).double() * len(own)
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


def run_training(
    trained: TrainedWeights,
    progress: TrainingProgress,
    ids: torch.Tensor,
    batch: int,
    settings: HealSettings,
    folder: Path,
    last: Path | None,
    title: str,
) -> list[dict[str, Any]]:
    """Train, from the start or from a checkpoint.

    Args:
        trained: The weights and their loss.
        progress: The state of the training.
        ids: Token ids of all batches, in order, `[windows, length]`.
        batch: The number of windows in an update, over all processes.
        settings: The settings of the training.
        folder: The folder for checkpoints.
        last: The checkpoint to go on from, or `None`.
        title: The title of the progress bar.

    Returns:
        The rows of the log: one before the first update and one for each update.

    Raises:
        NotFiniteError: the loss is not finite.
    """
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


def _optimizer(trained: TrainedWeights, settings: HealSettings) -> torch.optim.Optimizer:
    decayed = [each for each in trained.weights if settings.decay_vectors or each.ndim > 1]
    others = [each for each in trained.weights if not settings.decay_vectors and each.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": settings.weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.AdamW
    if settings.optimizer == "adamw-8bit":
        optimizer = require_extra("torchao.optim", "torchao").AdamW8bit
    return optimizer([group for group in groups if group["params"]], lr=settings.lr, betas=settings.betas)


def _arguments(folder: Path, batch: int, settings: HealSettings, device: torch.device) -> TrainingArguments:
    own = batch // process_count()
    at_once = max(each for each in range(1, own + 1) if own % each == 0 and each <= (settings.micro_batch or own))
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=at_once,
        gradient_accumulation_steps=own // at_once,
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

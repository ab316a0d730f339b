"""The training loop.

Design choices
--------------
- One loop trains whatever has a `loss(batch)`: a model family, or a family with a head.
- Everything random in a step is seeded from (seed, step), and a checkpoint holds all the rest, so a
  training that was killed ends in the same bits as one that was not.
- The weights that are kept are those with the lowest loss on the validation batches.
"""

from __future__ import annotations

import json
import math
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from neuromamba.batches import Batch
from neuromamba.checkpoint import (
    Checkpoint,
    OnChange,
    Tensors,
    load_checkpoint,
    put_weights,
    save_checkpoint,
)
from neuromamba.config import Optimiser
from neuromamba.files import InputError, write_text
from neuromamba.optimiser import (
    learning_rate,
    make_optimizer,
    optimizer_tensors,
    restore_optimizer,
)
from neuromamba.runtime import (
    STOPPED,
    deterministic,
    prefetch,
    seed_torch,
    stop_on_sigterm,
    telling_full_disk,
)
from neuromamba.scalars import mean_scalars, scalars_of, with_skills

# Separate streams of random numbers under one seed.
_TRAIN, _VALIDATE = 0, 1


@dataclass
class Progress:
    """How far a training is: all that a resumed one needs beside tensors and metrics."""

    step: int = 0
    validated: int = 0
    best_step: int = 0
    best: dict[str, float] = field(default_factory=dict)
    sums: dict[str, float] = field(default_factory=dict)
    samples: int = 0
    seconds: float = 0.0
    window_seconds: float = 0.0


@dataclass(frozen=True)
class Fitted:
    """The weights with the lowest validation loss, on the CPU, their step, and its scalars."""

    weights: Tensors
    step: int
    validation: dict[str, float]


def fit(
    model: nn.Module,
    settings: Optimiser,
    training: Callable[[int], Batch],
    validation: Callable[[], Iterable[Batch]],
    folder: Path,
    record: Mapping[str, Any],
    *,
    seed: int,
    device: torch.device,
    on_change: OnChange = "refuse",
) -> Fitted:
    """Train `model` in place, or continue the training that `folder` holds a checkpoint of.

    Parameters
    ----------
    model
        `loss(batch)` returns scalars by name, `loss` among them, each a mean over the batch.
        Parameters that do not require a gradient stay as they are.
    settings
        Optimiser, its schedule, and how often to log, validate and save.
    training
        From a number to a batch: a pure function. Step `s` takes the batches `s * accumulate` and
        the `accumulate - 1` after it.
    validation
        Gives the validation batches, the same each time.
    folder
        Gets `metrics.jsonl`, and `checkpoints/` until the caller removes it.
    record
        `settings` and `inputs` that the training depends on; see `checkpoint.differences`.
    seed
        Seeds dropout and whatever else the model draws.
    on_change
        What to do with a checkpoint of other settings or inputs.

    Raises
    ------
    InputError
        When the checkpoint is damaged or does not fit, or when a scalar is not finite.
    SystemExit
        With status `STOPPED`, after SIGTERM; a checkpoint of the last step is then there.
    """
    model.to(device)
    loop = _Loop(model, settings, training, validation, folder, record, seed, device)
    loop.resume(on_change)
    with deterministic(), telling_full_disk(folder), stop_on_sigterm() as stop:
        loop.run(stop)
    return Fitted(loop.best, loop.progress.best_step, loop.progress.best)


class _Loop:
    def __init__(
        self,
        model: nn.Module,
        settings: Optimiser,
        training: Callable[[int], Batch],
        validation: Callable[[], Iterable[Batch]],
        folder: Path,
        record: Mapping[str, Any],
        seed: int,
        device: torch.device,
    ) -> None:
        self.model, self.settings = model, settings
        self.training, self.validation = training, validation
        self.folder, self.record = folder, record
        self.seed, self.device = seed, device
        self.optimizer = make_optimizer(model, settings)
        self.progress = Progress()
        self.best: Tensors = {}
        self.lines: list[str] = []
        self.saved = 0

    def resume(self, on_change: OnChange) -> None:
        """Continue from the newest checkpoint, if any; metrics written after it are dropped."""
        found = load_checkpoint(self.folder / "checkpoints", self.record, on_change)
        if found is not None:
            put_weights(self.model, found.tensors["model"], self.folder / "checkpoints")
            restore_optimizer(self.optimizer, self.model, found.tensors["optimizer"])
            self.best = found.tensors["best"]
            self.progress = Progress(**found.state)
            self.lines = found.metrics.splitlines()
            self.saved = self.progress.step
        write_text(self.folder / "metrics.jsonl", self._metrics())

    def run(self, stop: threading.Event) -> None:
        steps, accumulate = self.settings.steps, self.settings.accumulate
        numbers = range(self.progress.step * accumulate, steps * accumulate)
        bar = tqdm(total=steps, initial=self.progress.step, desc="steps", mininterval=1.0)
        with bar, closing(prefetch(map(self.training, numbers))) as batches:
            while True:
                self._validate_if_due()
                self._save_if_due()
                if self.progress.step == steps:
                    return
                started = time.perf_counter()
                scalars = self._step([next(batches) for _ in range(accumulate)])
                self._count(scalars, time.perf_counter() - started)
                bar.update()
                bar.set_postfix(self._shown(scalars), refresh=False)
                if stop.is_set():
                    self._stop()

    def _shown(self, scalars: Mapping[str, float]) -> dict[str, float]:
        best = {"validation": self.progress.best["loss"]} if self.progress.best else {}
        return {"loss": scalars["loss"], **best}

    def _step(self, batches: Sequence[Batch]) -> dict[str, float]:
        """One update from the mean of the batches' gradients; the means of their scalars."""
        step = self.progress.step
        self.model.train()
        seed_torch(self.seed, _TRAIN, step)
        rate = learning_rate(self.settings, step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad(set_to_none=True)
        sums: dict[str, float] = {}
        for batch in batches:
            loss, scalars = scalars_of(self.model, batch, self.device, self.settings.precision)
            self._refuse_if_not_finite(scalars, batch)
            (loss / len(batches)).backward()
            for name, value in scalars.items():
                sums[name] = sums.get(name, 0.0) + value / len(batches)
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        norm = float(nn.utils.clip_grad_norm_(parameters, self.settings.clip_norm))
        self._refuse_if_not_finite({"grad_norm": norm}, batches[-1])
        self.optimizer.step()
        return {**sums, "grad_norm": norm}

    def _count(self, scalars: Mapping[str, float], seconds: float) -> None:
        done, settings = self.progress, self.settings
        done.step += 1
        done.samples += 1
        done.seconds += seconds
        done.window_seconds += seconds
        for name, value in scalars.items():
            done.sums[name] = done.sums.get(name, 0.0) + value
        if done.step % settings.log_every and done.step != settings.steps:
            return
        windows = done.samples * settings.batch_size * settings.accumulate
        self._log(
            "train",
            with_skills({name: value / done.samples for name, value in done.sums.items()}),
            lr=learning_rate(settings, done.step - 1),
            seconds=done.seconds,
            samples_per_second=windows / max(done.window_seconds, 1e-9),
        )
        done.sums, done.samples, done.window_seconds = {}, 0, 0.0

    def _validate_if_due(self) -> None:
        done, settings = self.progress, self.settings
        due = done.step % settings.validate_every == 0 or done.step == settings.steps
        if not due or done.validated == done.step:
            return
        seed_torch(self.seed, _VALIDATE, 0)
        scalars = mean_scalars(self.model, self.validation(), self.device, settings.precision)
        self._refuse_if_not_finite(scalars, {"run": ["the validation runs"]})
        self._log("validation", scalars)
        done.validated = done.step
        if not self.best or scalars["loss"] < done.best["loss"]:
            done.best_step, done.best = done.step, scalars
            self.best = _copy(self.model.state_dict())

    def _save_if_due(self) -> None:
        due = self.progress.step % self.settings.checkpoint_every == 0
        if due and self.progress.step != self.saved:
            self._save()

    def _save(self) -> None:
        tensors = {
            "model": self.model.state_dict(),
            "best": self.best,
            "optimizer": optimizer_tensors(self.optimizer, self.model),
        }
        checkpoint = Checkpoint(tensors, asdict(self.progress), self._metrics())
        step = self.progress.step
        save_checkpoint(self.folder / "checkpoints", step, checkpoint, self.record)
        self.saved = step

    def _stop(self) -> None:
        self._save()
        message = (
            f"told to stop after step {self.saved} of {self.settings.steps}; a checkpoint is in "
            f"{self.folder / 'checkpoints'}, and the same command continues from it"
        )
        tqdm.write(message, file=sys.stderr)
        raise SystemExit(STOPPED)

    def _refuse_if_not_finite(self, scalars: Mapping[str, float], batch: Batch) -> None:
        bad = [name for name, value in scalars.items() if not math.isfinite(value)]
        if bad:
            kept = f"the checkpoint of step {self.saved} is kept" if self.saved else "none is kept"
            raise InputError(
                f"{self.folder}: {bad[0]} is {scalars[bad[0]]} in step {self.progress.step + 1} "
                f"({', '.join(batch['run'])}); {kept}; lower learning_rate or raise warmup_steps "
                "and use --on-change restart, or leave those runs out by the dataset's `exclude`"
            )

    def _log(self, split: str, scalars: Mapping[str, float], **more: float) -> None:
        row = {"step": self.progress.step, "split": split, **scalars, **more}
        self.lines.append(json.dumps(row, allow_nan=False))
        with (self.folder / "metrics.jsonl").open("a", encoding="utf-8") as stream:
            stream.write(self.lines[-1] + "\n")

    def _metrics(self) -> str:
        return "".join(line + "\n" for line in self.lines)


def _copy(tensors: Mapping[str, torch.Tensor]) -> Tensors:
    return {name: value.detach().cpu().clone() for name, value in tensors.items()}

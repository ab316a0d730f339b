"""The training loop.

Design choices
--------------
- One loop trains whatever has a `loss(batch)`: a model family, or a family with a head.
- The samples of a step, and everything random in it, are functions of (seed, step), and `state`
  holds all the rest, so a training that was killed ends in the same bits as one that was not.
- Several processes (`distributed`) split each batch, and the samples of a step are the same however
  many they are. The loss is then the same up to rounding, but where a model draws numbers itself
  (dropout), which each process does for its own samples. More than two processes may add up in an
  order that changes when a training is continued, and the last bits with it.
- The weights that are kept are those with the lowest loss on the validation batches, or their
  running average, where that is asked for.
- What can go wrong in a step, and what is then done, is told in `recovery`.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from neuromamba.batches import Batch
from neuromamba.checkpoint import Tensors
from neuromamba.config import Optimiser
from neuromamba.distributed import World, telling_lost_processes, wrap
from neuromamba.gradients import Gradients, compute_gradients
from neuromamba.optimiser import learning_rate, set_learning_rate
from neuromamba.owned import OwnedFolder
from neuromamba.prefetch import prefetch
from neuromamba.record import OnChange
from neuromamba.recovery import Fault, UsualLoss, find_fault
from neuromamba.runtime import (
    TRY_AGAIN,
    deterministic,
    seed_torch,
    stop_on_signal,
    telling_full_disk,
)
from neuromamba.scalars import mean_scalars, pinned
from neuromamba.state import State
from neuromamba.throughput import peak_flops

# Separate streams of random numbers under one seed.
_TRAIN, _VALIDATE = 0, 1


@dataclass(frozen=True)
class Fitted:
    """What a training leaves, in the process of rank 0; the others have no tensors.

    Attributes
    ----------
    weights, step, validation
        Those with the lowest validation loss, on the CPU, their step, and its scalars.
    last
        Those after the last step.
    events
        How many steps made no update (`skipped_steps`), and how many `rollbacks` there were.
    """

    weights: Tensors
    step: int
    validation: dict[str, float]
    last: Tensors
    events: dict[str, int]


def fit(
    model: nn.Module,
    settings: Optimiser,
    training: Callable[[int, int], Batch],
    validation: Callable[[], Iterable[Batch]],
    folder: OwnedFolder,
    record: Mapping[str, Any],
    *,
    seed: int,
    device: torch.device,
    world: World = World(),  # noqa: B008 - it cannot change
    on_change: OnChange = "refuse",
) -> Fitted:
    """Train `model` in place, or continue the training that `folder` holds a checkpoint of.

    Parameters
    ----------
    model
        `loss(batch)` returns scalars by name, `loss` among them, each a mean over the windows of
        the batch. Parameters that do not require a gradient stay as they are.
        `learning_rate_scales()`, where there is one, is told in `make_optimizer`; `flops(batch)`,
        where there is one, gives the operations of the forward pass.
    settings
        Optimiser, its schedule, and how often to log, validate and save.
    training
        From (first, size) to the batch of the samples `first` to `first + size - 1` of an endless
        sequence: a pure function. Forward pass `n` of the training takes the `batch_size` samples
        from `n * batch_size` on, of which each process reads an equal part.
    validation
        Gives this process's part of the validation batches, the same each time.
    folder
        Gets `metrics.jsonl`, `snapshots/` where `keep_every` is set, and `checkpoints/` until the
        caller removes it. In rank 0 this process must own it.
    record
        `settings` and `inputs` that the training depends on (see `record.differences`), and what
        else is to stand in the JSON of checkpoints and snapshots.
    seed
        Seeds dropout and whatever else the model draws.
    device, world
        Of this process, and the processes that train together.
    on_change
        What to do with a checkpoint of other settings or inputs.

    Raises
    ------
    InputError
        When the batch cannot be shared, when no checkpoint is whole or it does not fit, when
        rollbacks do not help, when a validation scalar is not finite, when the disk is full, when
        another process is lost, or when a later training has taken the folder over.
    SystemExit
        With status `TRY_AGAIN`, after SIGTERM or SIGUSR1 to any process; a checkpoint of the last
        step is then there. With status 2 where rank 0 raises `InputError`.
    """
    model.to(device)
    state = State(model, settings, folder, record, world)
    with (
        deterministic(),
        telling_lost_processes(world),
        telling_full_disk(folder.path),
        closing(state.journal),
        stop_on_signal() as stop,
    ):
        if not state.restore(on_change):
            state.start()
        _Loop(state, training, validation, seed, device, wrap(model, world), stop).run()
        last = state.weights() if world.leads else {}
    done = state.progress
    events = {"skipped_steps": done.skipped, "rollbacks": done.rollbacks}
    return Fitted(state.best, done.best_step, done.best, last, events)


@dataclass
class _Loop:
    state: State
    training: Callable[[int, int], Batch]
    validation: Callable[[], Iterable[Batch]]
    seed: int
    device: torch.device
    loss: nn.Module
    stop: threading.Event

    def __post_init__(self) -> None:
        self.settings, self.world = self.state.settings, self.state.world
        self.flops = getattr(self.state.model, "flops", None)
        if self.flops and self.world.leads:
            peak_flops(self.device, self.settings.precision)  # now, while nothing else is running

    def run(self) -> None:
        """Train to the last step, however many rollbacks it takes."""
        n, quiet = self.state.progress.step, not self.world.leads
        total = self.settings.steps
        with tqdm(None, "steps", total, initial=n, mininterval=1.0, disable=quiet) as bar:
            while True:
                with closing(self._batches()) as batches:
                    if self._train(batches, bar):
                        return
                self._roll_back()

    def _train(self, batches: Iterator[Batch], bar: tqdm[Any]) -> bool:
        """Train to the last step (true), or to where a rollback is due (false)."""
        done = self.state.progress
        while done.bad < self.settings.max_bad_steps:
            bar.update(done.step - bar.n)
            self._validate_if_due()
            self._save_if_due()
            if done.step == self.settings.steps:
                return True
            gradients = self._step(batches)
            best = {"validation": done.best["loss"]} if done.best else {}
            bar.set_postfix({"loss": gradients.scalars["loss"], **best}, refresh=False)
            if gradients.stop:
                self._stop()
        return False

    def _batches(self) -> Generator[Batch]:
        """This process's parts of all batches to come, read ahead in the background."""
        settings, done = self.settings, self.state.progress
        first = (done.step + done.shift) * settings.accumulate
        n_left = (settings.steps - done.step) * settings.accumulate
        share = self.world.share(settings.batch_size)

        def read(number: int) -> Batch:
            batch = self.training(number * settings.batch_size + self.world.rank * share, share)
            return pinned(batch) if self.device.type == "cuda" else batch

        return prefetch(map(read, range(first, first + n_left)))

    def _step(self, batches: Iterator[Batch]) -> Gradients:
        """One update, unless there is a fault."""
        started, done, settings = time.perf_counter(), self.state.progress, self.settings
        seed_torch(self.seed, _TRAIN, done.step, self.world.rank)
        self.state.model.train()
        self.state.optimizer.zero_grad(set_to_none=True)
        flops = self.flops or (lambda batch: 0.0)
        gradients = compute_gradients(
            self.loss, batches, settings, self.device, self.world, flops, self.stop.is_set
        )
        fault = find_fault(gradients.scalars, done.usual, settings.spike)
        if fault is None:
            self._update(gradients.scalars)
        else:
            self._pass_over(fault, gradients.runs)
        done.step += 1
        done.meter.add(gradients.tokens, gradients.flops, gradients.waited, started)
        if done.step % settings.log_every == 0 or done.step == settings.steps:
            self.state.log_steps(self.device)
        return gradients

    def _update(self, scalars: Mapping[str, float]) -> None:
        done = self.state.progress
        set_learning_rate(self.state.optimizer, learning_rate(self.settings, done.step))
        self.state.optimizer.step()
        if self.state.average:
            self.state.average.update(done.usual.updates)
        done.usual.add(scalars["loss"])
        done.bad, done.averaged = 0, done.averaged + 1
        for name, value in scalars.items():
            done.sums[name] = done.sums.get(name, 0.0) + value

    def _pass_over(self, fault: Fault, runs: list[str]) -> None:
        """Record a step that makes no update."""
        done = self.state.progress
        done.bad, done.skipped = done.bad + 1, done.skipped + 1
        everyone = [run for of_one in self.world.gather(runs) for run in of_one]
        row = {"what": fault.what, "value": fault.value, "runs": everyone}
        self.state.journal.add("event", done.step + 1, row)
        names = ", ".join(everyone[:8]) + (", ..." if len(everyone) > 8 else "")
        done.fault = f"{fault.what} in step {done.step + 1} ({names})"
        self.state.tell(f"{done.fault}: no update")

    def _validate_if_due(self) -> None:
        done, settings = self.state.progress, self.settings
        due = done.step % settings.validate_every == 0 or done.step == settings.steps
        if not due or done.validated == done.step:
            return
        seed_torch(self.seed, _VALIDATE, 0)
        batches = takewhile(lambda batch: not self.stop.is_set(), self.validation())
        model, precision = self.state.model, settings.precision
        with self.state.evaluated():
            scalars = mean_scalars(model, batches, self.device, precision, self.world)
        if any(self.world.gather(self.stop.is_set())):
            self._stop()  # a training that is continued here begins with this validation
        if fault := find_fault(scalars, UsualLoss(), math.inf):
            self._give_up(f"{fault.what} for the validation runs after step {done.step}")
        self.state.journal.add("validation", done.step, scalars)
        done.validated = done.step
        if not done.best or scalars["loss"] < done.best["loss"]:
            done.best_step, done.best = done.step, scalars
            if self.world.leads:
                self.state.best = self.state.weights()

    def _save_if_due(self) -> None:
        """Save regularly, but never a state that a rollback would have to get away from."""
        done, settings = self.state.progress, self.settings
        due = done.step % settings.checkpoint_every == 0 and not done.bad
        if due and done.anchor != done.step:
            done.anchor = done.step
            self.state.save()
        if done.step and settings.keep_every and done.step % settings.keep_every == 0:
            self.state.save_snapshot()

    def _roll_back(self) -> None:
        done, most = self.state.progress, self.settings.max_rollbacks
        if done.rollbacks == most:
            self._give_up(f"{done.fault}, {done.bad} faulty steps in a row after {most} rollbacks")
        self.state.roll_back()

    def _give_up(self, problem: str) -> None:
        self.world.fail(
            f"{self.state.folder}: {problem}; the checkpoint of step {self.state.saved} is kept; "
            "lower learning_rate or raise warmup_steps and use --on-change restart, or leave those "
            "runs out by the dataset's `exclude`"
        )

    def _stop(self) -> None:
        self.state.save()
        self.state.tell(
            f"told to stop after step {self.state.saved} of {self.settings.steps}; a checkpoint is "
            f"in {self.state.checkpoints}, and the same command continues from it"
        )
        # The first process to end takes the others with it.
        self.world.wait()
        raise SystemExit(TRY_AGAIN)

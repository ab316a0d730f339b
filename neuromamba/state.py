"""All of a training that outlives its process: how far it is, its journal, its checkpoints."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

import torch
from torch import nn
from tqdm import tqdm

from neuromamba.checkpoint import (
    CHECKPOINTS,
    Checkpoint,
    Tensors,
    load_checkpoint,
    put_weights,
    save_checkpoint,
    save_model,
)
from neuromamba.config import Optimiser
from neuromamba.distributed import World
from neuromamba.optimiser import (
    WeightAverage,
    learning_rate,
    make_optimizer,
    optimizer_tensors,
    restore_optimizer,
)
from neuromamba.owned import OwnedFolder
from neuromamba.record import OnChange
from neuromamba.recovery import UsualLoss
from neuromamba.scalars import with_skills
from neuromamba.throughput import Meter, peak_flops, peak_memory


@dataclass
class Progress:
    """How far a training is: numbers that are the same in all its processes.

    Attributes
    ----------
    step
        Steps done, faulty ones among them.
    validated, best_step, best
        Steps of the last and of the best validation, and the scalars of the latter. There is none
        of step 0, unless `validated` starts at -1.
    sums, averaged
        Sums of scalars, and over how many steps without fault, since the last row.
    seconds, meter
        Time in steps, in all and since the last row.
    usual, bad, fault
        What the loss usually is, how many faulty steps came last in a row, and what the last was.
    skipped, rollbacks
        How many faulty steps and rollbacks there were.
    shift
        By how many steps the samples are ahead of the steps, because of rollbacks.
    anchor
        The step of the checkpoint that a rollback goes to.
    """

    step: int = 0
    validated: int = 0
    best_step: int = 0
    best: dict[str, float] = field(default_factory=dict)
    sums: dict[str, float] = field(default_factory=dict)
    averaged: int = 0
    seconds: float = 0.0
    meter: Meter = field(default_factory=Meter)
    usual: UsualLoss = field(default_factory=UsualLoss)
    bad: int = 0
    fault: str = ""
    skipped: int = 0
    rollbacks: int = 0
    shift: int = 0
    anchor: int = -1

    @classmethod
    def from_dict(cls, state: Mapping[str, Any]) -> Progress:
        """What `dataclasses.asdict` gave."""
        parts = {"meter": Meter(**state["meter"]), "usual": UsualLoss(**state["usual"])}
        return cls(**{**state, **parts})


class Journal:
    """Rows of `metrics.jsonl`, each with `step` and `split`: train, validation or event.

    Parameters
    ----------
    folder
        Of the training.
    writes
        False in all processes but one: these keep nothing.
    """

    def __init__(self, folder: OwnedFolder, writes: bool) -> None:
        self.folder, self.writes = folder, writes
        self.lines: list[str] = []
        # It stays open, so that rows go to the file that this process has put there, or nowhere.
        self.stream: IO[str] | None = None

    @property
    def text(self) -> str:
        return "".join(line + "\n" for line in self.lines)

    def add(self, split: str, step: int, values: Mapping[str, Any]) -> None:
        """Write one more row. JSON has no word for numbers that are not finite: they are quoted."""
        if self.stream:
            self.folder.check()
            row = {name: _quoted(value) for name, value in values.items()}
            self.lines.append(json.dumps({"step": step, "split": split, **row}, allow_nan=False))
            self.stream.write(self.lines[-1] + "\n")
            self.stream.flush()

    def put_back(self, lines: list[str]) -> None:
        """Have these rows and no others."""
        if self.writes:
            self.close()
            self.lines = lines
            with self.folder.writing(self.folder.path / "metrics.jsonl") as temporary:
                self.stream = temporary.open("w", encoding="utf-8")
                self.stream.write(self.text)
                self.stream.flush()

    def close(self) -> None:
        """End the writing."""
        if self.stream:
            self.stream.close()

    def events(self) -> list[str]:
        """The rows that tell of events."""
        return [line for line in self.lines if json.loads(line)["split"] == "event"]


class State:
    """Model, optimiser, progress and journal of a training, and their way to disk and back.

    Rank 0 of `world` reads and writes, and tells the others.

    Attributes
    ----------
    best
        The weights of the best validation, on the CPU; empty in the other processes.
    saved
        The step of the newest checkpoint.
    """

    def __init__(
        self,
        model: nn.Module,
        settings: Optimiser,
        folder: OwnedFolder,
        record: Mapping[str, Any],
        world: World,
    ) -> None:
        self.model, self.settings, self.world = model, settings, world
        self.owned, self.folder, self.record = folder, folder.path, record
        self.optimizer = make_optimizer(model, settings)
        self.average = WeightAverage(model, settings.ema) if settings.ema else None
        self.progress = Progress()
        self.journal = Journal(folder, world.leads)
        self.best: Tensors = {}
        self.saved = 0

    @property
    def checkpoints(self) -> Path:
        return self.folder / CHECKPOINTS

    def start(self) -> None:
        """Have nothing of an earlier training about."""
        if self.world.leads:
            self.owned.remove(self.folder / "snapshots")
        self.journal.put_back([])
        if self.settings.may_keep_start:
            self.progress.validated = -1

    def restore(self, on_change: OnChange, upto: int | None = None) -> bool:
        """Go back to the newest whole checkpoint (`upto` a step); false where there is none."""
        found: Checkpoint | None = None

        def read() -> dict[str, Any] | None:
            nonlocal found
            try:
                found = load_checkpoint(self.owned, self.record, on_change, upto)
            finally:
                self.owned.check()  # before anything else is taken to be wrong
            return found.state if found else None

        state = self.world.from_lead(read)
        if state is None:
            return False
        files = found.tensors if found else {}
        put_weights(self.model, self._shared(files, "model"), self.checkpoints)
        restore_optimizer(self.optimizer, self.model, self._shared(files, "optimizer"))
        if self.average:
            self.average.restore(self._shared(files, "average"))
        if found:
            self.best = found.tensors["best"]
            self.journal.put_back(found.metrics.splitlines())
        self.progress = Progress.from_dict(state)
        self.saved = self.progress.step
        return True

    def log_steps(self, device: torch.device) -> None:
        """Write a row of the steps since the last one, if any of them made an update."""
        done, settings, meter = self.progress, self.settings, self.progress.meter
        done.seconds += meter.seconds
        if done.averaged and self.world.leads:
            row = {
                **with_skills({name: value / done.averaged for name, value in done.sums.items()}),
                "lr": learning_rate(settings, done.step - 1),
                "seconds": done.seconds,
                **meter.speeds(
                    settings.batch_size * settings.accumulate,
                    settings.steps - done.step,
                    lambda: peak_flops(device, settings.precision) * self.world.size,
                ),
                "peak_memory_mib": peak_memory(device),
            }
            self.journal.add("train", done.step, row)
        done.sums, done.averaged, done.meter = {}, 0, Meter()

    def save(self) -> None:
        """Write a checkpoint of this step."""
        self.saved = self.progress.step
        if not self.world.leads:
            return
        tensors = {
            "model": self.model.state_dict(),
            "best": self.best,
            "optimizer": optimizer_tensors(self.optimizer, self.model),
        }
        if self.average:
            tensors["average"] = self.average.tensors
        save_checkpoint(
            self.owned,
            self.saved,
            Checkpoint(tensors, asdict(self.progress), self.journal.text),
            self.record,
            keep=self.settings.keep_checkpoints,
            spare=self.progress.anchor,
        )

    def save_snapshot(self) -> None:
        """Write the weights of this step as a model of its own, which nothing removes."""
        if self.world.leads:
            step = self.progress.step
            folder = self.folder / "snapshots" / f"step-{step:08d}"
            with self.owned.writing(folder) as temporary:
                temporary.mkdir()
                facts = {**self.record, "step": step}
                save_model(temporary, self.weights(), facts, writing=nullcontext)

    def roll_back(self) -> None:
        """Go back to the last regular checkpoint, and on from there with samples not yet read.

        A checkpoint of the new course is written at once, over the old one.
        """
        before, events = self.progress, self.journal.events()
        if not self.restore("refuse", upto=before.anchor):
            raise RuntimeError(f"{self.checkpoints} was emptied while the training ran")
        done = self.progress
        done.shift = before.step + before.shift - done.step
        done.rollbacks, done.skipped = before.rollbacks + 1, before.skipped
        done.seconds = before.seconds
        self.journal.put_back([*self.journal.lines, *events[len(self.journal.events()) :]])
        self.journal.add("event", before.step, {"what": "rollback", "to": done.step})
        self.save()
        back = f"back to step {done.step}, and on with other samples"
        self.tell(f"{before.bad} faulty steps in a row: {back}")

    def evaluated(self) -> AbstractContextManager[None]:
        """Give the model the weights to validate and to keep: the average, where there is one."""
        return self.average.in_use() if self.average else nullcontext()

    def weights(self) -> Tensors:
        """Those weights, on the CPU."""
        with self.evaluated():
            return {name: value.cpu().clone() for name, value in self.model.state_dict().items()}

    def tell(self, message: str) -> None:
        """Tell the user, once for all processes."""
        if self.world.leads:
            tqdm.write(message, file=sys.stderr)

    def _shared(self, files: Mapping[str, Tensors], name: str) -> Tensors:
        return self.world.tensors_from_lead(files.get(name, {}))


def _quoted(value: Any) -> Any:
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value

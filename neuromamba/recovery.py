"""What a training does when a step goes wrong.

The rule
--------
- A step is faulty when its loss, another scalar or the norm of its gradient is not finite, or when
  its loss is a spike: above the usual loss by more than `spike` times its usual spread. Mean and
  spread are exponential averages over the steps before, and no step is a spike in the first
  `WARM_UP` updates.
- A faulty step makes no update. It is recorded as a row `event` of `metrics.jsonl`, with the runs
  that it had read, and the training goes on with the samples after it.
- After `max_bad_steps` faulty steps in a row the weights themselves are in doubt. The training goes
  back to the last regular checkpoint, which is from before the first of these steps, and on from
  there with the samples *after* the faulty ones. (As was done for PaLM, arXiv 2204.02311, section
  5.1: the same samples did no harm to the weights of another step.)
- After `max_rollbacks` of them it gives up.

All of this depends on the samples and the weights alone, and its state is in the checkpoints: a
training that was killed takes the same turns as one that was not. A validation loss that is not
finite ends the training: it is computed without any update, so no later samples would mend it.

The numbers here are our choices.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

WARM_UP = 20
"""Updates before the spread of the loss is taken to be known."""

SHARE = 0.02
"""Weight of one update in the averages: they reach back some fifty updates."""

LEAST_SPREAD = 0.01
"""Of the mean loss: where a loss hardly varies, not every rise is a spike."""


@dataclass
class UsualLoss:
    """Exponential mean and variance of the loss over the updates so far."""

    updates: int = 0
    mean: float = 0.0
    variance: float = 0.0

    def add(self, loss: float) -> None:
        """Take in the loss of one more update."""
        self.updates += 1
        # A plain average at first, in which the first losses do not count for more.
        share = max(SHARE, 1 / self.updates)
        distance = loss - self.mean
        self.mean += share * distance
        self.variance = (1 - share) * (self.variance + share * distance**2)

    def limit(self, spike: float) -> float:
        """The loss above which a step is a spike."""
        if self.updates < WARM_UP:
            return math.inf
        spread = max(math.sqrt(self.variance), LEAST_SPREAD * abs(self.mean))
        return self.mean + spike * spread


@dataclass(frozen=True)
class Fault:
    """What is wrong with a step: `loss is nan`, or `loss spike`; and the number that shows it."""

    what: str
    value: float


def find_fault(scalars: Mapping[str, float], usual: UsualLoss, spike: float) -> Fault | None:
    """What is wrong with a step that has these scalars, `loss` among them, if anything is."""
    for name, value in scalars.items():
        if not math.isfinite(value):
            return Fault(f"{name} is {value}", value)
    if scalars["loss"] > usual.limit(spike):
        return Fault("loss spike", scalars["loss"])
    return None

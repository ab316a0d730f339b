"""Two kinds of data of the same people, brought together by contrast and by matching.

Nothing here knows what the two kinds are: both come as normalised embeddings, called first and
second, with a flag for each where a person has only one of them.

Sources: symmetric InfoNCE with a learnable scale, clamped (Radford et al. 2021, CLIP, arXiv
2103.00020); matching of pairs with hard negatives that are drawn by likeness within the batch (Li
et al. 2021, ALBEF, arXiv 2107.07651). Ours:

- Two samples of one person are no negatives of each other.
- Who has one kind alone is a negative for the others, and no row of the loss.
- The matcher reads both embeddings and their product. There is no attention between the two kinds,
  because an embedding is all that is left of either.
- Several processes contrast the samples of all of them. Each computes the same loss of everything,
  and hands the gradient of an embedding back to the process that has made it, so that the mean over
  processes, which `DistributedDataParallel` takes, is the gradient of the whole batch.

Dimensions in names: N samples of all processes, B of this one, C channels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional

LARGEST_SCALE = 100.0
"""Of the similarities (CLIP)."""
SMALLEST = 1e-12
"""Variance that is added, so that what is the same for everybody becomes 0."""


@dataclass(frozen=True)
class Pairs:
    """Embeddings of two kinds of data, one row a sample.

    Attributes
    ----------
    first, second
        (N, C) float32, of length 1; a row that there is not may hold anything finite.
    has_first, has_second
        (N,) bool.
    person
        (N,) int64: samples of one person have the same number.
    """

    first: Tensor
    second: Tensor
    has_first: Tensor
    has_second: Tensor
    person: Tensor

    @property
    def paired(self) -> Tensor:
        """(N,) bool: who has both."""
        return self.has_first & self.has_second

    def of_all_processes(self) -> Pairs:
        """The samples of all processes in the order of their ranks, gradients included.

        Every process must call this with as many samples.
        """
        both_N2C = gather(torch.stack([self.first, self.second], 1))
        told = torch.stack([self.has_first.long(), self.has_second.long(), self.person], 1)
        has_first, has_second, person = gather(told).unbind(1)
        first, second = both_N2C.unbind(1)
        return Pairs(first, second, has_first.bool(), has_second.bool(), person)


class _Gather(torch.autograd.Function):
    """Rows of all processes; backward, the sum of what all processes make of this one's rows."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        parts = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, rows.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        total = gradients[0].contiguous().clone()
        dist.all_reduce(total)
        return total.chunk(dist.get_world_size())[dist.get_rank()]


def gather(rows: Tensor) -> Tensor:
    """The rows (B, ...) of all processes, (N, ...), with gradients where there are any."""
    if rows.is_floating_point():
        return _Gather.apply(rows)
    parts = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, rows.contiguous())
    return torch.cat(parts)


def processes() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def at_least_float32(values: Tensor) -> Tensor:
    """The values in float32, or in float64 where they are so: not in what autocast computes in."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def normalise(embeddings: Tensor) -> Tensor:
    """Embeddings (N, C) in float32, of length 1."""
    return functional.normalize(at_least_float32(embeddings), dim=-1)


class Standardise(nn.Module):
    """Each channel minus its mean over people, over its SD.

    In a loss these are of all samples of the batch, of all processes and chunks, as in batch
    normalisation. An embedding goes by those of `settle`, so that it does not depend on what is
    embedded with it. Running means would not do: they lag behind an encoder that learns, and are of
    samples that were changed at random.

    Parameters
    ----------
    width : int
        Channels, C.
    """

    mean: Tensor
    variance: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("variance", torch.ones(width))

    def forward(self, values: Tensor, there: Tensor | None = None) -> Tensor:
        """Values (N, C) in float32 at least; rows that are not `there` (N,) have no influence.

        Without `there`, each row is taken for itself.
        """
        values = at_least_float32(values)
        mean, variance = self.mean, self.variance
        if there is not None and int(there.sum()) > 1:
            mean, variance = moments(values[there])
        return (values - mean) / (variance + SMALLEST).sqrt()

    @torch.no_grad()
    def settle(self, values: Tensor) -> None:
        """Take the mean and variance of (N, C), for embeddings; of fewer than two, nothing."""
        if len(values) > 1:
            mean, variance = moments(values.double())
            self.mean.copy_(mean)
            self.variance.copy_(variance)


def moments(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance over (N, C), each (C,)."""
    mean = rows.mean(0)
    return mean, (rows - mean).square().mean(0)


class LogitScale(nn.Module):
    """1 / temperature, learnt as its logarithm and clamped to `LARGEST_SCALE`."""

    def __init__(self, temperature: float) -> None:
        super().__init__()
        self.logarithm = nn.Parameter(torch.tensor(-math.log(temperature)))

    def forward(self) -> Tensor:
        # As CLIP does, the parameter itself is clamped: a gradient can bring it back at once.
        with torch.no_grad():
            self.logarithm.clamp_(max=math.log(LARGEST_SCALE))
        return self.logarithm.exp()


def contrast(pairs: Pairs, scale: Tensor) -> dict[str, Tensor]:
    """Symmetric InfoNCE over the rows that have both kinds.

    Returns
    -------
    dict of scalar Tensors
        - ``loss``: mean of both directions; 0, with a gradient of 0, where there is no pair.
        - ``top1_first``, ``top1_second``: share of pairs of which the first finds its second as the
          most similar of all in the batch, and the other way round.
    """
    n = len(pairs.person)
    own = torch.eye(n, dtype=torch.bool, device=pairs.person.device)
    same = pairs.person[:, None] == pairs.person
    logits_NN = scale * pairs.first @ pairs.second.T
    numbers, rows = torch.arange(n, device=own.device), pairs.paired.float()
    count = rows.sum().clamp(min=1)
    scalars: dict[str, Tensor] = {}
    losses = []
    for name, logits, there in (
        ("first", logits_NN, pairs.has_second),
        ("second", logits_NN.T, pairs.has_first),
    ):
        # The own column stays also where it is no pair: a row without any would give no number.
        masked = logits.masked_fill(~own & (same | ~there), -torch.inf)
        each = functional.cross_entropy(masked, numbers, reduction="none")
        losses.append((each * rows).sum() / count)
        scalars[f"top1_{name}"] = ((masked.argmax(1) == numbers) * rows).sum() / count
    return {"loss": (losses[0] + losses[1]) / 2, **scalars}


@torch.no_grad()
def hard_negatives(
    logits_NN: Tensor, allowed_NN: Tensor, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Draw a column for each row among those allowed, by the softmax of its logits.

    Parameters
    ----------
    logits_NN
        Scaled similarities.
    allowed_NN
        Bool.
    generator
        On the CPU. It gives one number a row, whatever is allowed.

    Returns
    -------
    tuple
        (N,) int64 columns, and (N,) bool whether there was any to draw from.
    """
    possible = allowed_NN.any(1)
    shares = logits_NN.double().masked_fill(~allowed_NN & possible[:, None], -torch.inf).softmax(1)
    sums = shares.cumsum(1)
    drawn = torch.rand(len(sums), generator=generator, dtype=torch.float64).to(sums.device)
    columns = (sums <= (drawn * sums[:, -1])[:, None]).sum(1)
    return columns.clamp(max=len(sums) - 1), possible


class Matcher(nn.Module):
    """Tells pairs (N, C), (N, C) of one person from those of two: logits (N, 2), match last."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3 * width, width), nn.GELU(), nn.Linear(width, 2))

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        return self.layers(torch.cat([first, second, first * second], -1))


def match(
    pairs: Pairs, matcher: nn.Module, scale: Tensor, generator: torch.Generator
) -> dict[str, Tensor]:
    """Cross-entropy of telling pairs from hard negatives: for each pair one of either kind.

    Returns
    -------
    dict of scalar Tensors
        - ``loss``: mean over all pairs and negatives; 0, with a gradient of 0, without a pair.
        - ``accuracy``: share of them that are told rightly.
    """
    logits_NN = (scale * pairs.first @ pairs.second.T).detach()
    other = pairs.person[:, None] != pairs.person
    second, of_first = hard_negatives(logits_NN, other & pairs.has_second, generator)
    first, of_second = hard_negatives(logits_NN.T, other & pairs.has_first, generator)
    told = matcher(
        torch.cat([pairs.first, pairs.first, pairs.first[first]]),
        torch.cat([pairs.second, pairs.second[second], pairs.second]),
    )
    truth = (torch.arange(len(told), device=told.device) < len(pairs.person)).long()
    paired = pairs.paired
    weights = torch.cat([paired, paired & of_first, paired & of_second]).float()
    total = weights.sum().clamp(min=1)
    each = functional.cross_entropy(at_least_float32(told), truth, reduction="none")
    right = (told.argmax(1) == truth).float()
    return {"loss": (each * weights).sum() / total, "accuracy": (right * weights).sum() / total}

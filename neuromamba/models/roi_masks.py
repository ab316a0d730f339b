"""Masks over ROI series, and what an honest guess of the masked values gets.

While a model learns, masks are drawn from torch's global generator. In evaluation they come from a
generator that starts anew for each sample: the mask of a sample then depends on its repetition time
alone, so that losses of different steps and batches can be compared.

Everything is drawn on the CPU, and so is the same on every device.

Dimensions in names: B samples, R ROIs, L volumes, T time patches.
"""

from __future__ import annotations

import torch
from torch import Tensor

SEED_OF_EVALUATION = 0


def mask_generator(training: bool) -> torch.Generator | None:
    """The generator of one sample's masks; `None` is torch's global one."""
    return None if training else torch.Generator().manual_seed(SEED_OF_EVALUATION)


def stretches(
    n_rois: int, volumes: int, length: int, share: float, generator: torch.Generator | None
) -> Tensor:
    """Masked stretches of `length` volumes, at places of their own in each ROI.

    Their number is the one that comes nearest to `share` of the volumes, and at least one. They do
    not overlap, but may touch.

    Returns
    -------
    Tensor, (n_rois, volumes) bool
        True where masked.
    """
    length = min(length, volumes)
    count = min(max(1, round(share * volumes / length)), volumes // length)
    free = volumes - count * length
    gaps = torch.randint(free + 1, (n_rois, count), generator=generator).sort(1).values
    starts = gaps + length * torch.arange(count)
    change = torch.zeros(n_rois, volumes + 1)
    change.scatter_add_(1, starts, torch.ones(starts.shape))
    change.scatter_add_(1, starts + length, -torch.ones(starts.shape))
    return change.cumsum(1)[:, :volumes] > 0


def local_masks(
    n_rois: int,
    volumes: int,
    repetition_time_B: Tensor,
    seconds: float,
    share: float,
    share_of_rois: float,
    training: bool,
) -> Tensor:
    """Masks that are local in time, as long in seconds at every repetition time.

    A stretch has `seconds` / repetition time volumes, rounded, at least one. Besides,
    `share_of_rois` of the ROIs are masked from end to end.

    Returns
    -------
    Tensor, (B, R, L) bool
        True where masked, on the device of `repetition_time_B`.
    """
    masks = []
    for repetition_time in repetition_time_B.tolist():
        generator = mask_generator(training)
        length = max(1, round(seconds / repetition_time))
        mask_RL = stretches(n_rois, volumes, length, share, generator)
        whole = torch.randperm(n_rois, generator=generator)[: round(share_of_rois * n_rois)]
        mask_RL[whole] = True
        masks.append(mask_RL)
    return torch.stack(masks).to(repetition_time_B.device)


def interpolate(series_BRL: Tensor, visible_BRL: Tensor) -> Tensor:
    """Each ROI's values on straight lines in time between its visible volumes.

    Before the first visible volume and after the last one their values are held; a ROI that is not
    visible at all is 0.
    """
    volumes = series_BRL.shape[-1]
    now_L = torch.arange(volumes, device=series_BRL.device)
    before = torch.where(visible_BRL, now_L, -1).cummax(-1).values
    after = torch.where(visible_BRL, now_L, volumes).flip(-1).cummin(-1).values.flip(-1)
    has_before, has_after = before >= 0, after < volumes
    left = series_BRL.gather(-1, before.clamp(min=0))
    right = series_BRL.gather(-1, after.clamp(max=volumes - 1))
    share = (now_L - before) / (after - before).clamp(min=1)
    line = torch.where(has_before & has_after, left + share * (right - left), left)
    line = torch.where(has_before, line, right)
    return torch.where(has_before | has_after, line, 0.0)


def mean_of_samples(error_BRL: Tensor, counted_BRL: Tensor) -> Tensor:
    """The mean over samples of each one's mean over what is counted; 0 where nothing is."""
    count_B = counted_BRL.sum((1, 2))
    return (torch.where(counted_BRL, error_BRL, 0.0).sum((1, 2)) / count_B.clamp(min=1)).mean()


@torch.no_grad()
def reference_errors(
    series_BRL: Tensor, visible_BRL: Tensor, target_BRL: Tensor
) -> dict[str, Tensor]:
    """Mean squared errors of two guesses that learn nothing, over the targets.

    Returns
    -------
    dict of scalar Tensors
        ``mse_mean``: each ROI's mean over its visible volumes. ``mse_interpolation``: a straight
        line in time over the gap, see `interpolate`.
    """
    count_BR1 = visible_BRL.sum(-1, keepdim=True).clamp(min=1)
    mean_BR1 = torch.where(visible_BRL, series_BRL, 0.0).sum(-1, keepdim=True) / count_BR1
    guesses = {"mean": mean_BR1, "interpolation": interpolate(series_BRL, visible_BRL)}
    return {
        f"mse_{name}": mean_of_samples((series_BRL - guess).square(), target_BRL)
        for name, guess in guesses.items()
    }

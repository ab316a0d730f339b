"""Rolling a NeuroMamba out: a forecast made of forecasts, one patch after the other.

Why the error of `NeuroMamba.loss`, and the skills beside it, are not those of a forecast: in the
published order, time fastest, a patch at time t is predicted with all earlier patches of the
sequence in view, and these are known at *all* times of the window, later ones than t among them.
(With space fastest, they are known at t itself.) So a small loss shows that neighbouring places go
together as much as that the future can be told from the past. Here nothing later than the known
time patches is ever read: what the model has predicted takes the place of the truth, also as the
context of the patches that follow. Only this is an honest forecast.

The steps are read in the model's own order. With time fastest each patch gives its known time
patches, then its forecast ones, then the next patch follows; with space fastest the known time
patches of all patches come first. Each token takes one recurrent step, so that the cost grows with
the length of the sequence and the memory of the states does not.

Dimensions in names: B windows, P patches of each window, T time patches, V values of a patch,
C channels.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from tqdm import tqdm

from neuromamba.files import InputError

if TYPE_CHECKING:
    from neuromamba.models.neuromamba import Batch, NeuroMamba


@torch.no_grad()
def roll_out(model: NeuroMamba, batch: Batch, known: int, teacher_forcing: bool = False) -> Tensor:
    """Forecast the rest of each window from its first `known` time patches.

    Parameters
    ----------
    model : NeuroMamba
        With ``target: raw``.
    batch : dict of str to Tensor
        As `NeuroMamba` takes it. All windows have the same number of patches, such as windows of
        one run, and go through the sequence side by side. Of ``tokens`` only ``[:, :known]`` is
        read.
    known : int
        Time patches that are known, 1 <= known < T.
    teacher_forcing : bool
        Read the true value after each forecast instead of the forecast, and so all of ``tokens``:
        the same numbers as `NeuroMamba.predict_next`, for comparison.

    Returns
    -------
    Tensor, (N, T - known, V)
        In the units of ``tokens``, rows as there, N = B * P.

    Raises
    ------
    InputError
        When the model predicts patches in their own z units, which cannot be fed back.
    ValueError
        When the windows differ in their number of patches, or `known` is out of range.
    """
    if model.settings.target != "raw":
        raise InputError(
            f"a model with `target: {model.settings.target}` predicts each patch without its mean "
            "and size, so its forecasts cannot be fed back; only one with `target: raw` can be "
            "rolled out"
        )
    counts, n_time = batch["patches"].tolist(), batch["tokens"].shape[1]
    if len(set(counts)) > 1:
        raise ValueError(f"the windows have different numbers of patches: {sorted(set(counts))}")
    if not 1 <= known < n_time:
        raise ValueError(f"{known} of {n_time} time patches are known; 1 to {n_time - 1} can be")
    tokens_BPTV = batch["tokens"].unflatten(0, (len(counts), -1))
    position_NTC = model._position(batch["centers"], n_time)
    position_BPTC = position_NTC.unflatten(0, (len(counts), -1))
    forecast_BPTV = torch.empty_like(tokens_BPTV[:, :, known:])
    caches = [block.mixer.start(len(counts)) for block in model.blocks]  # type: ignore[union-attr,operator]
    h_BC = position_BPTC[:, 0, 0]  # of no use: the first token of a window is known
    for p, t in _places(counts[0], n_time, model.settings.order):
        if t >= known:
            forecast_BPTV[:, p, t - known] = model.head(model.norm(h_BC))
        true = t < known or teacher_forcing
        value_BV = tokens_BPTV[:, p, t] if true else forecast_BPTV[:, p, t - known]
        h_BC = model.embedding(value_BV) + position_BPTC[:, p, t]
        for block, cache in zip(model.blocks, caches, strict=True):
            h_BC = block.step(h_BC, cache)  # type: ignore[operator]
    return forecast_BPTV.flatten(0, 1)


def _places(n_patches: int, n_time: int, order: str) -> Iterator[tuple[int, int]]:
    """Patch and time patch of each step of a sequence, with a bar for long ones."""
    slow, fast = (n_patches, n_time) if order == "t-fastest" else (n_time, n_patches)
    steps = range(slow * fast)
    for step in tqdm(steps, desc="roll-out", unit="step", delay=5.0, mininterval=1.0, leave=False):
        i, j = divmod(step, fast)
        yield (i, j) if order == "t-fastest" else (j, i)

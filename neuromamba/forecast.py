"""Forecast the rest of windows of the test subjects' runs, and score it beside simple forecasts.

Design choices
--------------
- The model is rolled out (`neuromamba.models.rollout`): from the first volumes of a window it
  forecasts the others, reading its own forecasts in place of what it is not told. The skills that
  pretraining reports are something else, and higher: there the model has seen later volumes of the
  patches that come before in its sequence.
- Only subjects of the test part are forecast, and a model that has seen one of them is refused, as
  in the evaluation. The autoregression beside it is fitted on training subjects, and its order
  chosen on validation subjects (at most `FITTED_SUBJECTS` of each).
- Errors are averaged over the windows of a run, then over runs, then over subjects; intervals are
  by bootstrap over subjects. Brain voxels alone count.
- Values are normalised by the run's own statistics, in which its future has a share: more than a
  scanner would know at the time. With `normalization: voxel` every forecast is told each voxel's
  mean over the run in this way, which is 0. Persistence and the mean of the context make no use of
  that, while the model and the autoregression may. So the mean over the run is beside them as a
  forecast of its own, and only what is better than it tells of dynamics.
- `errors.tsv` is written first, and everything after it is computed from what it says.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from tqdm import tqdm

from neuromamba.batches import Batch, Windows, group_runs, list_runs, make_readers
from neuromamba.config import Config
from neuromamba.evaluate import find_seen
from neuromamba.files import InputError, write_json
from neuromamba.forecast_baselines import (
    Autoregression,
    Floats,
    brain_series,
    brain_voxels,
    context_mean,
    fit_autoregression,
    persistence,
    second_moments,
    squared_error,
)
from neuromamba.forecast_figure import draw_forecast
from neuromamba.layout import Layout
from neuromamba.metrics import Metrics, bootstrap, interval
from neuromamba.models import skills
from neuromamba.pretrained import open_pretrained
from neuromamba.record import provenance
from neuromamba.runtime import choose_device
from neuromamba.scalars import to_device
from neuromamba.spacing import some_of
from neuromamba.splits import read_split
from neuromamba.tables import read_table, write_table

FITTED_SUBJECTS = 64
"""Subjects of each part that the autoregression is fitted to: it has a handful of weights."""


def run_forecast(config: Config, dataset: str, model: str, seed: int) -> None:
    """Write `errors.tsv`, `forecast.tsv`, `forecast.svg` and, last, `forecast.json`.

    `errors.tsv` has one row for each subject and horizon, `forecast.tsv` one for each horizon.

    Raises
    ------
    InputError
        When there is no pretrained model of these settings, it cannot be rolled out or has seen a
        test subject; when `forecast.context` does not fit its window, or no run is long enough.
    """
    layout, section = Layout.of(config, dataset), config.models[model]
    folder = layout.forecast(model, seed)
    network, info = open_pretrained(config, dataset, model, seed)
    if not hasattr(network, "roll_out"):
        raise InputError(f"models.{model}: a model of family {section.family} makes no forecasts")
    known = known_volumes(config, model)
    split = read_split(layout.split)
    test = some_of(split["test"], config.forecast.max_subjects)
    seen = find_seen(config, dataset, info, test)
    network.to(choose_device(config.compute.device)).eval()
    fitted = {
        part: open_runs(config, dataset, model, network, some_of(split[part], FITTED_SUBJECTS))
        for part in ("train", "validation")
    }
    moments = {part: mean_moments(windows, config, known) for part, windows in fitted.items()}
    ar = fit_autoregression(moments["train"], moments["validation"], known)
    windows = open_runs(config, dataset, model, network, test)
    started = time.perf_counter()
    errors = forecast_subjects(network, windows, config, known, ar)
    seconds = time.perf_counter() - started
    write_table(folder / "errors.tsv", errors)
    summarize(folder, config, dataset, model)
    counts = {"n_subjects": len(windows.subjects), "n_runs": sum(map(len, windows.runs.values()))}
    facts = {
        "dataset": dataset,
        "model": model,
        "seed": seed,
        "weights": info["files"]["model.safetensors"],
        "settings": config.forecast.model_dump(mode="json"),
        "known_volumes": known,
        "forecast_volumes": section.volumes - known,
        "normalization": info["settings"]["model"]["normalization"],
        "n_test_subjects": len(split["test"]),
        **counts,
        "left_out": windows.left_out,
        "seen_subjects": seen,
        "autoregression": {
            **asdict(ar),
            "weights": ar.weights.tolist(),
            "subjects": {part: len(of_part.subjects) for part, of_part in fitted.items()},
        },
        "seconds": seconds,
        **provenance(),
    }
    write_json(folder / "forecast.json", facts)
    told = ", ".join(f"{count} {name.removeprefix('n_')}" for name, count in counts.items())
    tqdm.write(f"{dataset}, {model}: {told} forecast in {seconds:.0f} s", file=sys.stderr)


def known_volumes(config: Config, model: str) -> int:
    """The volumes of a window that are known: `forecast.context`, by default half of them."""
    time_patch, window = config.tokens.time_patch, config.models[model].volumes
    context = config.forecast.context
    if context is None:
        return max(1, window // time_patch // 2) * time_patch
    if context % time_patch or context >= window:
        raise InputError(
            f"forecast.context is {context}; for models.{model} it must be a multiple of "
            f"tokens.time_patch ({time_patch}) below the {window} volumes of its window"
        )
    return context


def open_runs(
    config: Config, dataset: str, model: str, network: nn.Module, subjects: Sequence[str]
) -> Windows:
    """Windows over the runs of some subjects."""
    layout, section = Layout.of(config, dataset), config.models[model]
    runs = list_runs(config, dataset, subjects, section.needs)
    readers = make_readers(network, layout, section, config.tokens)
    return Windows(group_runs(runs), readers, config.compute.max_excluded)


def mean_over_runs(
    windows: Windows, count: int, subject: str, measure: Callable[[Batch], Floats]
) -> Floats:
    """The mean over a subject's runs of a measure of a batch of `count` windows of one run."""
    spaced = windows.spaced(count, [subject])
    runs = [list(of_run) for _, of_run in groupby(spaced, key=lambda window: window.run)]
    return np.mean([measure(windows.batch(of_run)) for of_run in runs], axis=0)


def mean_moments(windows: Windows, config: Config, known: int) -> Floats:
    """Second moments (see `forecast_baselines`), averaged over windows, runs and subjects."""

    def measure(batch: Batch) -> Floats:
        return second_moments(brain_series(batch["tokens"], config.tokens.time_patch), known)

    subjects = tqdm(windows.subjects, desc="autoregression", unit="subject", mininterval=1.0)
    count = config.forecast.windows
    return np.mean([mean_over_runs(windows, count, name, measure) for name in subjects], axis=0)


def forecast_subjects(
    network: nn.Module, windows: Windows, config: Config, known: int, ar: Autoregression
) -> pd.DataFrame:
    """Mean squared errors of all forecasts.

    Returns
    -------
    pandas.DataFrame
        One row for each subject and horizon: `subject`, `horizon` in time patches after the known
        ones, and `mse_model`, `mse_persistence`, `mse_context_mean`, `mse_autoregression` and
        `mse_run_mean`, in the units of the normalised values, squared.
    """
    time_patch = config.tokens.time_patch
    device = next(network.parameters()).device
    future = len(ar.weights[0])
    simple = {
        "mse_persistence": persistence(known, future),
        "mse_context_mean": context_mean(known, future),
        "mse_autoregression": ar.weights,
    }

    def measure(batch: Batch) -> Floats:
        batch = to_device(batch, device)
        tokens = batch["tokens"]
        forecast = network.roll_out(batch, known // time_patch)  # type: ignore[operator]
        moments = second_moments(brain_series(tokens, time_patch), known)
        rows = [squared_error(moments, weights) for weights in simple.values()]
        run_mean = batch["mean"][:, None].expand_as(forecast)
        return np.stack(
            [
                forecast_error(forecast, tokens, time_patch),
                *(row.reshape(-1, time_patch).mean(1) for row in rows),
                forecast_error(run_mean, tokens, time_patch),
            ],
            axis=1,
        )

    tables = []
    for subject in tqdm(windows.subjects, desc="forecast", unit="subject", mininterval=1.0):
        errors = mean_over_runs(windows, config.forecast.windows, subject, measure)
        table = pd.DataFrame(errors, columns=["mse_model", *simple, "mse_run_mean"])
        table.insert(0, "subject", subject)
        table.insert(1, "horizon", np.arange(len(table)) + 1)
        tables.append(table)
    return pd.concat(tables, ignore_index=True)


def forecast_error(forecast: Tensor, tokens: Tensor, time_patch: int) -> Floats:
    """Mean squared error over brain voxels by horizon: (H,) float64.

    Parameters
    ----------
    forecast
        (N, H, V), of the last H time patches of `tokens`.
    tokens
        (N, T, V).
    """
    truth = tokens[:, -forecast.shape[1] :]
    error = (forecast - truth).double().square().unflatten(-1, (time_patch, -1)).mean(2)
    return error.transpose(1, 2)[brain_voxels(tokens, time_patch)].mean(0).cpu().numpy()


def repetition_times(config: Config, dataset: str, subjects: Sequence[str]) -> list[float]:
    """The repetition times in seconds that occur among the runs of some subjects, sorted."""
    if resampled := config.volumes.denoise.repetition_time:
        return [resampled]
    index = read_table(Layout.of(config, dataset).index, dtype={"subject": str})
    used = index.loc[index["subject"].isin(set(subjects)), "repetition_time"]
    return sorted(float(value) for value in used.dropna().unique())


def summarize(folder: Path, config: Config, dataset: str, model: str) -> None:
    """Compute `forecast.tsv` and draw `forecast.svg` from the `errors.tsv` in `folder`."""
    errors = read_table(folder / "errors.tsv", dtype={"subject": str})
    times = repetition_times(config, dataset, list(errors["subject"].unique()))
    table = average_errors(errors, config)
    volumes = table["horizon"] * config.tokens.time_patch
    table.insert(1, "volumes", volumes)
    # Where repetition times differ, a horizon is no one time.
    table.insert(2, "seconds", volumes * times[0] if len(times) == 1 else np.nan)
    write_table(folder / "forecast.tsv", table)
    draw_forecast(folder / "forecast.svg", table, config.evaluate.confidence, model)


def average_errors(errors: pd.DataFrame, config: Config) -> pd.DataFrame:
    """Errors averaged over subjects, and skills with bootstrap intervals over subjects.

    Parameters
    ----------
    errors
        As `forecast_subjects` gives them.

    Returns
    -------
    pandas.DataFrame
        One row for each horizon: `horizon`, `n` subjects, the columns `mse_*`, and for each
        predictor but the model `skill_<predictor>` = 1 - mse_model / mse_<predictor> with
        `skill_<predictor>_low` and `..._high`.
    """
    names = [str(name) for name in errors if str(name).startswith("mse_")]
    settings, rows = config.evaluate, []
    for horizon, of_horizon in errors.groupby("horizon"):
        values = of_horizon.sort_values("subject")[names].to_numpy(float)
        measures, strata = _skills_of(values, names), np.zeros(len(values), np.int64)
        drawn = bootstrap(measures, strata, settings.bootstrap, config.splits.seed)
        row: dict[str, Any] = {"horizon": horizon, "n": len(values)}
        row |= dict(zip(names, values.mean(0), strict=True))
        for name, skill in measures(np.ones((1, len(values)))).items():
            low, high = interval(skill[0], drawn[name], settings.confidence)
            row |= {name: skill[0], f"{name}_low": low, f"{name}_high": high}
        rows.append(row)
    return pd.DataFrame(rows)


def _skills_of(values: Floats, names: Sequence[str]) -> Metrics:
    """The skills as a function of weights, from (subject, `mse_*`) errors."""

    def measures(weight: Floats) -> dict[str, Floats]:
        means = torch.from_numpy(weight @ values / weight.sum(axis=1, keepdims=True))
        errors = {name: means[:, k] for k, name in enumerate(names)}
        return {name: skill.numpy() for name, skill in skills(errors).items()}

    return measures

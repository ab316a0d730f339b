"""Plots of quality, over the time of a run and over the runs of a dataset, as `data:` addresses."""

from __future__ import annotations

from typing import Any

import matplotlib
import numpy as np
import numpy.typing as npt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from neuromamba.qc_figures import (
    BLUE,
    GREEN,
    ORANGE,
    SKY,
    STYLE,
    WIDTH,
    YELLOW,
    Floats,
    as_svg,
    as_webp,
)
from neuromamba.qc_metrics import TISSUES, Course, Motion, find_spikes
from neuromamba.qc_table import Metric

TISSUE_COLOURS = (BLUE, YELLOW, "#666666")
LARGEST_STRIP = 300
"""Runs that are drawn as points; more of them are drawn as a histogram."""

# --- Over time ----------------------------------------------------------------------------------


def carpet_picture(course: Course, motion: Motion, threshold: float, repetition_time: float) -> str:
    """FD, DVARS and the global signal over time, above the signal of voxels grouped by tissue.

    Parameters
    ----------
    course, motion
        Of one run.
    threshold
        FD in mm; volumes above are marked.
    repetition_time
        Of the scan, in s, which may be another than that of the volumes as they are stored.
    """
    end = float(course.seconds[-1]) + course.repetition_time
    if motion.fd is not None:
        end = max(end, len(motion.fd) * repetition_time)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 7.2), layout="constrained")
        axes = figure.subplots(4, 1, sharex=True, height_ratios=[1, 1, 1, 4])
        _draw_fd(axes[0], motion, threshold, repetition_time)
        _draw_signal(axes[1], course, course.dvars, BLUE, "DVARS (%)")
        _mark(axes[1], course, find_spikes(course.dvars))
        change = course.global_signal - course.global_signal.mean()
        _draw_signal(axes[2], course, change, GREEN, "global\nsignal (%)")
        _draw_carpet(axes[3], course)
        if motion.fd is not None:
            high = np.flatnonzero(np.nan_to_num(motion.fd) > threshold)
            at = (high + 0.5) * repetition_time
            axes[3].plot(at, np.zeros(len(at)), "v", color=ORANGE, markersize=5, clip_on=False)
        axes[3].set_xlim(0, end)
        for axis in axes[:3]:
            axis.locator_params(axis="y", nbins=4)
        figure.align_ylabels(axes[:3])
        return as_webp(figure)


def _with_gaps(course: Course, values: Floats) -> tuple[Floats, Floats]:
    """Seconds and values of each moment from the first volume to the last, NaN in the gaps."""
    place = np.rint((course.seconds - course.seconds[0]) / course.repetition_time).astype(int)
    full = np.full((*values.shape[:-1], place[-1] + 1), np.nan, dtype=values.dtype)
    full[..., place] = values
    seconds = course.seconds[0] + np.arange(place[-1] + 1) * course.repetition_time
    return seconds, full


def _draw_fd(axis: Axes, motion: Motion, threshold: float, repetition_time: float) -> None:
    axis.set_ylabel("FD (mm)")
    if motion.fd is None:
        axis.text(0.5, 0.5, "motion is unknown", ha="center", transform=axis.transAxes)
        axis.set_ylim(0, 1)
        return
    fd = np.nan_to_num(motion.fd)
    seconds = (np.arange(len(fd)) + 0.5) * repetition_time
    axis.plot(seconds, fd, color=BLUE, linewidth=1)
    axis.axhline(threshold, color=ORANGE, linestyle="--", linewidth=1)
    axis.plot(seconds[fd > threshold], fd[fd > threshold], "x", color=ORANGE, markersize=5)
    axis.set_ylim(0, 1.08 * max(threshold, float(fd.max())))


def _draw_signal(axis: Axes, course: Course, values: Floats, colour: str, label: str) -> None:
    """Values over time, in percent of the mean signal."""
    seconds, full = _with_gaps(course, values * _percent(course))
    # A volume is drawn in the middle of the time that it took, as in the carpet.
    axis.plot(seconds + course.repetition_time / 2, full, color=colour, linewidth=1)
    axis.set_ylabel(label)


def _mark(axis: Axes, course: Course, found: npt.NDArray[np.bool_]) -> None:
    seconds = course.seconds[found] + course.repetition_time / 2
    axis.plot(seconds, course.dvars[found] * _percent(course), "x", color=ORANGE, markersize=5)


def _percent(course: Course) -> float:
    mean = float(course.global_signal.mean())
    return 100 / mean if mean > 0 else np.nan


def _draw_carpet(axis: Axes, course: Course) -> None:
    seconds, carpet = _with_gaps(course, course.carpet)
    extent = (seconds[0], seconds[-1] + course.repetition_time, float(len(carpet)), 0.0)
    palette = matplotlib.colormaps["gray"].with_extremes(bad=SKY)
    axis.imshow(carpet, cmap=palette, vmin=-2, vmax=2, aspect="auto", extent=extent)
    edges = np.searchsorted(course.tissue, np.arange(len(TISSUES) + 1))
    ticks, names = [], []
    for k, name in enumerate(TISSUES):
        first, last = int(edges[k]), int(edges[k + 1])
        if last > first:
            bar: dict[str, Any] = {
                "clip_on": False,
                "transform": axis.get_yaxis_transform(),
                "linewidth": 5,
            }
            axis.plot([-0.008] * 2, [first, last], color=TISSUE_COLOURS[k], **bar)
            ticks.append((first + last) / 2)
            names.append(name)
    axis.set_yticks(ticks, names, rotation=90, va="center")
    axis.tick_params(axis="y", length=0, pad=10)
    axis.set_xlabel("time (s)")


# --- Over runs ----------------------------------------------------------------------------------


def strip_picture(values: pd.Series, metric: Metric, flagged: npt.NDArray[np.bool_]) -> str:
    """Where the runs lie by one metric: points, or a histogram of many; crosses where flagged.

    Parameters
    ----------
    values
        One number a run; missing ones are left out.
    metric
        What it is.
    flagged
        Which runs are marked, in the order of the values.
    """
    x = values.to_numpy(float)
    marked = flagged & np.isfinite(x)
    known = x[np.isfinite(x)]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(3.4, 1.25), layout="constrained")
        axis = figure.subplots()
        if len(known) <= LARGEST_STRIP:
            # A golden-ratio sequence spreads points evenly and is the same each time.
            height = np.arange(1, len(x) + 1) * 0.618 % 1
            axis.plot(x[~marked], height[~marked], "o", color=BLUE, alpha=0.6, markersize=4)
            axis.plot(x[marked], height[marked], "x", color=ORANGE, markersize=7, mew=2)
            axis.set_ylim(-0.2, 1.2)
        else:
            axis.hist(known, bins=40, color=BLUE)
            axis.plot(x[marked], np.zeros(marked.sum()), "x", color=ORANGE, markersize=6)
        axis.axvline(float(np.median(known)), color="black", linestyle="--", linewidth=1)
        axis.set_yticks([])
        axis.spines["left"].set_visible(False)
        axis.locator_params(axis="x", nbins=4)
        axis.ticklabel_format(useOffset=False, style="plain")
        axis.set_xlabel(metric.title)
        return as_svg(figure)

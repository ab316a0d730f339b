"""The overview of a dataset: a table of the quality of all runs, and a page to look through it.

`overview.tsv` has a row for every run that was found, used or not. The page shows the same: it can
be sorted and searched without a server, and shows some hundred rows at a time, so that ten thousand
runs are no burden. That a run is flagged as unlike the others decides nothing; rules do.

Datasets of ROI series have the same two files, of what can be measured of series.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import xarray
import zarr.errors
from tqdm import tqdm

import neuromamba
from neuromamba import qc_figures
from neuromamba.config import Config
from neuromamba.files import InputError, write_text
from neuromamba.layout import Layout
from neuromamba.qc_plots import strip_picture
from neuromamba.qc_rules import broken_rules, read_quality, rules_of
from neuromamba.qc_table import COUNTS, METRICS, SERIES_METRICS, Metric, deviations, find_outliers
from neuromamba.qc_template import template_on
from neuromamba.series_quality import measure_series
from neuromamba.tables import read_table, write_table
from neuromamba.templates import environment

LARGEST_GROUP = 200
"""Runs that the group's maps are made of: more would change nothing that the eye can see."""
ROWS_SHOWN = 100
"""Rows of the page's table that are shown at first, and added at a time."""
MOST_NAMED = 5
ARROWS = {"high": "↑", "low": "↓"}


@dataclass(frozen=True)
class Quality:
    """All runs of a dataset.

    Attributes
    ----------
    table
        A row for each run, 0, 1, ...: `run`, `subject`, `stage` and `reason` where it is left out
        (else missing), the columns of `metrics` (NaN where unknown), `motion_note`.
    z
        Deviations from the other runs, a column for each metric, in robust SDs.
    outliers
        Row -> metric -> `high` or `low`.
    metrics
        What was measured, by column.
    """

    table: pd.DataFrame
    z: pd.DataFrame
    outliers: dict[int, dict[str, str]]
    metrics: dict[str, Metric]


def run_overview(config: Config, dataset: str) -> None:
    """Write `overview.tsv` and `overview.html` of a dataset.

    Raises
    ------
    InputError
        When the index, the list of runs left out, or the quality of a batch is missing.
    """
    layout = Layout.of(config, dataset)
    quality = collect_quality(config, dataset)
    write_table(layout.overview.with_suffix(".tsv"), as_table(quality))
    page = environment().get_template("overview.html.j2")
    write_text(layout.overview, page.render(_describe(config, dataset, quality)))


def collect_quality(config: Config, dataset: str) -> Quality:
    """Put together what the stages have left of each run."""
    layout = Layout.of(config, dataset)
    text = {"run": str, "subject": str, "stage": str, "reason": str}
    runs = read_table(layout.index, dtype=text)[["run", "subject"]]
    excluded = read_table(layout.excluded, dtype=text)
    has_images = config.datasets[dataset].series is None
    metrics = METRICS if has_images else SERIES_METRICS
    measured = (read_quality if has_images else measure_series)(config, dataset)
    # A run that could not be measured is used all the same, as long as there is no rule.
    unmeasured = "its quality could not be measured: " + measured["reason"]
    measured["motion_note"] = measured["motion_note"].where(measured["reason"].isna(), unmeasured)
    first = excluded.drop_duplicates("run")[["run", "stage", "reason"]]
    columns = ["run", *metrics, "motion_note"]
    table = runs.merge(first, on="run", how="outer")
    table = table.merge(measured.reindex(columns=columns), on="run", how="left")
    table["subject"] = table["subject"].fillna(table["run"].str.split("_").str[0])
    table = table.sort_values("run", kind="stable", ignore_index=True)
    table[list(metrics)] = table[list(metrics)].astype(float)
    z = deviations(table)
    return Quality(table, z, find_outliers(z, config.qc.outlier), metrics)


def as_table(quality: Quality) -> pd.DataFrame:
    """The table for other programs.

    `excluded` (the reason), `stage`, `outlier` (the metrics that are unlike those of the other
    runs), then the metrics, and `{metric}_z`, their deviations in robust SDs.
    """
    table = quality.table
    flags = {row: ", ".join(found) for row, found in quality.outliers.items()}
    head = table[["run", "subject"]].assign(
        excluded=table["reason"], stage=table["stage"], outlier=table.index.map(flags)
    )
    whole = {name: "Int64" for name in COUNTS if name in quality.metrics}
    metrics = table[list(quality.metrics)].astype(whole)
    z = quality.z.round(3).add_suffix("_z")
    return pd.concat([head, metrics, z, table[["motion_note"]]], axis=1)


# --- The page -----------------------------------------------------------------------------------


def _describe(config: Config, dataset: str, quality: Quality) -> dict[str, Any]:
    layout, table = Layout.of(config, dataset), quality.table
    used = table["reason"].isna()
    has_images = config.datasets[dataset].series is None
    data = _rows(layout, quality, links=has_images and config.qc.pages)
    return {
        "dataset": dataset,
        "space": config.datasets[dataset].space if has_images else None,
        "sentences": _summarise(config, quality),
        "metrics": quality.metrics,
        "rules": rules_of(config.qc),
        "settings": config.qc,
        "data": data,
        "first": [
            [*row, _flags_in_words(quality.metrics, row[3])] for row in data["rows"][:ROWS_SHOWN]
        ],
        "step": ROWS_SHOWN,
        "arrows": ARROWS,
        "n_runs": len(table),
        "n_used": int(used.sum()),
        "strips": _strips(config, quality),
        "group": has_images and _group(layout, [str(run) for run in table.loc[used, "run"]]),
        "version": neuromamba.__version__,
    }


def _rows(layout: Layout, quality: Quality, links: bool) -> dict[str, Any]:
    """The page's rows, compact, because there may be thousands.

    A row is [run, has a page, reason or "", {column: "high" or "low"}, numbers of `metrics`].
    """
    pages = {path.stem for path in layout.qc("run").parent.glob("*.html")} if links else set()
    metrics = quality.metrics
    order = {name: k for k, name in enumerate(metrics)}
    numbers = quality.table[list(metrics)].to_numpy(float)
    digits = [metric.digits for metric in metrics.values()]
    rows = []
    for k, (run, stage, reason) in enumerate(
        quality.table[["run", "stage", "reason"]].itertuples(index=False)
    ):
        why = f"{stage}: {reason}" if isinstance(reason, str) else ""
        flags = {order[name]: side for name, side in quality.outliers.get(k, {}).items()}
        values = [_compact(float(v), d) for v, d in zip(numbers[k], digits, strict=True)]
        rows.append([run, int(run in pages), why, flags, values])
    columns = [[metric.title, metric.digits] for metric in metrics.values()]
    return {"columns": columns, "names": list(metrics), "rows": rows}


def _flags_in_words(metrics: dict[str, Metric], flags: dict[int, str]) -> str:
    labels = [metric.label for metric in metrics.values()]
    return "; ".join(f"{labels[k]} {side}" for k, side in flags.items())


def _compact(value: float, digits: int) -> float | int | None:
    """A number as it is shown: by Python here and by the browser there, which round differently."""
    if not np.isfinite(value):
        return None
    rounded = round(value, digits)
    return int(rounded) if rounded.is_integer() else rounded


def _summarise(config: Config, quality: Quality) -> list[str]:
    """Who is used and who is not, in sentences."""
    table = quality.table
    used = table["reason"].isna()
    n_flagged = sum(1 for row in quality.outliers if used[row])
    n_subjects = table.loc[used, "subject"].nunique()
    sentences = [
        f"{used.sum():,} of {len(table):,} runs are used, of {n_subjects:,} of "
        f"{table['subject'].nunique():,} subjects."
    ]
    stages = table.loc[~used, "stage"].value_counts()
    if len(stages):
        listed = ", ".join(
            f"{count:,} by {_stage_in_words(str(name))}" for name, count in stages.items()
        )
        sentences.append(f"{(~used).sum():,} are left out: {listed}.")
    broken = pd.Series(
        [rule for row in table.to_dict("records") for rule in _broken(config, row)], dtype=str
    ).value_counts()
    if len(broken):
        listed = ", ".join(f"{rule} {count:,}" for rule, count in broken.items())
        sentences.append(f"Runs by the rule that they do not meet (some more than one): {listed}.")
    if table["motion_note"].notna().any():
        sentences.append(f"The motion of {table['motion_note'].notna().sum():,} runs is unknown.")
    if n_flagged:
        verb = "runs that are used are" if n_flagged > 1 else "run that is used is"
        sentences.append(
            f"{n_flagged:,} {verb} flagged as unlike the others (by more than "
            f"{config.qc.outlier:g} robust SDs); that is a reason to look, and leaves nothing out."
        )
    return sentences


def _broken(config: Config, row: dict[Any, Any]) -> list[str]:
    measured = pd.notna(row["n_volumes"])
    return list(broken_rules(row, config.qc)) if measured else []


def _stage_in_words(stage: str) -> str:
    known = {"qc": "the rules of quality", "index": "the index (files, preprocessing)"}
    return known.get(stage, f"the stage {stage}")


def _strips(config: Config, quality: Quality) -> list[dict[str, Any]]:
    """A picture for each metric that differs between runs, with the names of the flagged ones."""
    strips = []
    for name, metric in quality.metrics.items():
        values = quality.table[name]
        if values.nunique() < 2:
            continue
        rows = [row for row, flags in quality.outliers.items() if name in flags]
        rows.sort(key=lambda row: -abs(quality.z[name][row]))
        flagged = values.index.isin(rows)
        strips.append(
            {
                "metric": metric,
                "picture": strip_picture(values, metric, flagged),
                "median": metric.shown(values.median()),
                "low": metric.shown(values.min()),
                "high": metric.shown(values.max()),
                "named": [
                    (quality.table["run"][row], metric.shown(values[row]))
                    for row in rows[:MOST_NAMED]
                ],
                "n_flagged": len(rows),
                "n": int(values.notna().sum()),
            }
        )
    return strips


def _group(layout: Layout, runs: Sequence[str]) -> dict[str, Any] | None:
    """Maps over the runs that are used, evenly chosen where they are many; `None` without runs."""
    chosen = runs[:: -(-len(runs) // LARGEST_GROUP)] if runs else []
    if not chosen:
        return None
    _, mask, affine = _read_maps(layout.array("volumes", chosen[0]))
    total, count = np.zeros(mask.shape), np.zeros(mask.shape)
    for run in tqdm(chosen, desc="overview", unit="run", mininterval=1.0):
        mean, mask, _ = _read_maps(layout.array("volumes", run))
        level = float(mean[mask].mean())
        total += np.where(mask, mean / level if level > 0 else 0.0, 0.0)
        count += mask
    template = template_on(count.T.shape, affine)
    brain = template.brain if template.brain.any() else count > 0
    mosaic = qc_figures.plan_mosaic(brain, affine)
    mean = np.divide(total, count, out=np.full_like(total, np.nan), where=count > 0)
    share = np.where(count > 0, count / len(chosen), np.nan)
    most = count > len(chosen) / 2
    return {
        "n": len(chosen),
        "mean": qc_figures.mean_picture(mean, most, template, mosaic),
        "coverage": qc_figures.group_picture(share, template, mosaic, "share"),
    }


def _read_maps(store: Path) -> tuple[Any, Any, Any]:
    """Mean volume and mask, (z, y, x), and the affine of one run."""
    try:
        with xarray.open_zarr(store, chunks=None, mask_and_scale=False) as volumes:
            mean, mask = volumes["mean"].values, volumes["mask"].values.astype(bool)
            return mean, mask, np.asarray(volumes.attrs["affine"], dtype=float)
    except (zarr.errors.BaseZarrError, OSError, KeyError, ValueError) as error:
        raise InputError(
            f"{store}: these volumes are damaged ({error}); delete them and make them again"
        ) from error

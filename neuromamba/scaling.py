"""The scaling study: its table, its figure, and a power law through its trainings.

Every training is at the end of its learning-rate schedule, and only such ends are fitted: what a
schedule cut short would have reached is not known from its middle (Hoffmann et al., arXiv
2203.15556). The way there is drawn, and counted where it passes below the law: see `judge`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from neuromamba.config import Config
from neuromamba.files import atomic_path, write_json
from neuromamba.layout import Layout
from neuromamba.scaling_cells import average_seeds, read_cells
from neuromamba.scaling_figure import draw_scaling
from neuromamba.scaling_fit import Fit, count_below, fit_points, judge
from neuromamba.tables import write_table


def run_scaling(config: Config, dataset: str) -> None:
    """Write `scaling.tsv`, `scaling.svg`, `scaling.png` and `fit.json`, and print the verdict.

    Parameters
    ----------
    config, dataset
        The run, and a dataset or mixture of it. Cells that have not been trained are left out, and
        named in `fit.json`.

    Raises
    ------
    InputError
        When no cell has been trained, one is broken, or the models cannot be compared.
    """
    study = config.study()
    folder = Layout.of(config, dataset).scaling
    cells, curves, missing = read_cells(study, dataset)
    points = average_seeds(cells)
    resamples, confidence = config.evaluate.bootstrap, config.evaluate.confidence
    flops = points["flops"].to_numpy(float)
    losses = pd.DataFrame(points["losses"].tolist()).to_numpy(float)
    best = fit_points(flops, losses, True, resamples, confidence)
    every = fit_points(flops, losses, False, resamples, confidence)
    way = pd.concat([curve.iloc[:-1] for curve in curves.values()])
    n_below = count_below(best, *(way[name].to_numpy() for name in way)) if best else 0
    claimed, verdict = judge(best, every, int(points["frontier"].sum()), n_below)
    lines = describe(cells, points, missing)
    lines += [_sentence("On the frontier", best), _sentence("Over all points", every), verdict]
    write_table(folder / "scaling.tsv", cells)
    for kind in ("svg", "png"):
        with atomic_path(folder / f"scaling.{kind}") as temporary:
            draw_scaling(temporary, kind, points, curves, best, every, confidence)
    report = {
        "note": "our own fit: the published paper does not give its own",
        "power_law_claimed": claimed,
        "verdict": lines,
        "frontier": _summary(best),
        "all": _summary(every),
        "confidence": confidence,
        "points": points.drop(columns="losses").to_dict("records"),
        "validations_below": n_below,
        "missing": missing,
    }
    write_json(folder / "fit.json", report)
    print("\n".join(lines))


def describe(cells: pd.DataFrame, points: pd.DataFrame, missing: list[str]) -> list[str]:
    """What the study consists of, in words."""
    text = (
        f"{len(cells)} trainings, {len(points)} points (a model on a share of the subjects), "
        f"{int(points['frontier'].sum())} of them on the frontier."
    )
    lines = [text]
    if missing:
        lines.append(f"{len(missing)} trainings are missing, which may be those that failed.")
    if points["seeds"].max() == 1:
        lines.append("One seed: how much the losses depend on it is not known.")
    return lines


def _sentence(where: str, fit: Fit | None) -> str:
    if fit is None:
        return f"{where}: too few different amounts of compute for a fit."
    law = fit.law
    constant = f" + {law.floor:.4g}" if law.floor else ""
    text = f"{where}: loss = a C^-b{constant}, b = {law.exponent:.3g}"
    text += f" [{fit.low:.3g}, {fit.high:.3g}], R2 = {fit.r_squared:.2f}, {len(fit.flops)} points."
    if fit.undefined >= 0.01:
        text += f" {fit.undefined:.0%} of the resamples could not be fitted."
    return text


def _summary(fit: Fit | None) -> dict[str, Any] | None:
    if fit is None:
        return None
    return {
        "form": "a C^-b + c" if fit.law.floor else "a C^-b",
        "log10_a": fit.law.log_coefficient / np.log(10),
        "b": fit.law.exponent,
        "b_low": _defined(fit.low),
        "b_high": _defined(fit.high),
        "c": fit.law.floor,
        "r_squared": _defined(fit.r_squared),
        "points": len(fit.flops),
        "decades": fit.decades,
        "resamples_undefined": fit.undefined,
    }


def _defined(value: float) -> float | None:
    """JSON has no word for what is not a number but null."""
    return value if np.isfinite(value) else None

"""What is known of a subject without its brain signal: age, sex, site, head motion and size.

They are what the confound model predicts from, and what `fc-regress` takes out of the FC. A model
that does not beat them may have learnt who moved, or which scanner was used.

- `age` and `sex` are what the dataset's targets of these names are told by, or else the columns of
  the table of subjects that are called so; `site` is `participants.site_column`. The column the
  target is told by, and the confound of the target's name, are never among them. Another column
  that says the same is: leave it out of `evaluate.confounds`.
- `mean_fd` (framewise displacement by the confounds of the preprocessing, mm), `tsnr` and
  `n_voxels` (brain voxels) are means over a subject's runs, `n_volumes` is their sum. Where no run
  has its motion, `mean_fd` is the column of the table of subjects that is called so. ROI series
  tell neither `tsnr` nor `n_voxels`.
- Of states, all that counts is head motion during the state: `mean_fd` and `std_dvars`.
- A column in which the training subjects do not differ is left out. Missing numbers become the
  training median; a missing site or sex is a category of its own, and one that training lacks is
  none of those that it has.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pandas as pd
from sklearn.compose import ColumnTransformer
from sklearn.impute import SimpleImputer
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder, StandardScaler

from neuromamba.config import Config, Dataset
from neuromamba.events import NONE, label_volumes, sample_name, subject_of
from neuromamba.files import InputError
from neuromamba.layout import Layout
from neuromamba.participants import read_rows
from neuromamba.qc_metrics import Motion, read_motion
from neuromamba.stage import read_manifest
from neuromamba.states import States
from neuromamba.tables import read_table

CATEGORIES = ("sex", "site")
ALSO_CALLED = {"gender": "sex"}
UNKNOWN = "unknown"
MEASURED = {"volumes": ("n_volumes", "n_voxels"), "rois": ("n_volumes", "tsnr")}
"""What the manifests of the stages tell of a run; the first that tells it counts."""


def confounds_of(config: Config, dataset: str, target: str, runs: pd.DataFrame) -> pd.DataFrame:
    """The confounds that `evaluate.confounds` names and the dataset has.

    Parameters
    ----------
    config, dataset, target
        Which target's own column is left out.
    runs
        Columns `run`, `subject`: the runs that count.

    Returns
    -------
    pandas.DataFrame
        Indexed by subject: text in `sex` and `site`, float64 in the others, in the config's order.
    """
    measured = _of_runs(config, dataset, runs)
    people = _of_people(config, dataset, target)
    if "mean_fd" in measured and measured["mean_fd"].isna().all():
        measured = measured.drop(columns="mean_fd")
    # One source for all, as programs differ in how they measure displacement.
    if "mean_fd" in measured:
        people = people.drop(columns="mean_fd", errors="ignore")
    known = measured.join(people, how="left")
    return known[[name for name in config.evaluate.confounds if name in known]]


def _of_people(config: Config, dataset: str, target: str) -> pd.DataFrame:
    settings = config.datasets[dataset]
    if settings.participants is None:
        return pd.DataFrame()
    table = read_rows(settings.participants)
    columns = {}
    for name in ("age", "mean_fd", *CATEGORIES):
        column = _column_of(name, settings, list(map(str, table)))
        if column in table and not says_target(settings, target, name, column):
            cells = table[column].str.strip()
            columns[name] = cells if name in CATEGORIES else pd.to_numeric(cells, errors="coerce")
    return pd.DataFrame(columns, index=table.index)


def says_target(settings: Dataset, target: str, name: str, column: str | None) -> bool:
    """Whether a confound, told by a column, is of a target's name or told by what it is told by."""
    own = settings.targets[target].column
    return column == own or name in {_plain(target), _plain(own)}


def _column_of(name: str, settings: Dataset, columns: Sequence[str]) -> str | None:
    """The column of the table of subjects that tells a confound."""
    if name == "site":
        return settings.participants.site_column if settings.participants else None
    if name in settings.subject_targets:
        return settings.subject_targets[name].column
    return next((column for column in columns if _plain(column) == name), None)


def _plain(name: str) -> str:
    return ALSO_CALLED.get(name.lower(), name.lower())


def _of_runs(config: Config, dataset: str, runs: pd.DataFrame) -> pd.DataFrame:
    layout = Layout.of(config, dataset)
    index = read_table(layout.index, dtype={"run": str, "confounds": str}).set_index("run")
    table = runs.set_index("run")
    files = index["confounds"].to_dict() if "confounds" in index else {}
    lengths = index["n_volumes"].to_dict()
    if "mean_fd" in config.evaluate.confounds:
        fd = [_mean_fd(files.get(run), lengths[run]) for run in table.index]
        table = table.assign(mean_fd=fd)
    for stage, names in MEASURED.items():
        if stage not in config.datasets[dataset].arrays:
            continue
        parts = [read_manifest(layout, stage, k) for k in range(config.compute.batches)]
        made = pd.concat(parts, ignore_index=True).set_index("run")
        for name in names:
            if name in made and name not in table:
                table[name] = pd.to_numeric(made[name], errors="coerce").reindex(table.index)
    grouped = table.groupby("subject")
    found = grouped.mean()
    if "n_volumes" in found:
        found["n_volumes"] = grouped["n_volumes"].sum(min_count=1)
    return found


def state_confounds(
    config: Config, dataset: str, states: States, samples: Sequence[str]
) -> pd.DataFrame:
    """What head motion tells of samples, which are subjects in states.

    Returns
    -------
    pandas.DataFrame
        Indexed by sample: `mean_fd` (mm) and `std_dvars`, means over the volumes of the state; NaN
        where they are not known. Without columns where `evaluate.confounds` does not name mean_fd.
    """
    if "mean_fd" not in config.evaluate.confounds:
        return pd.DataFrame(index=list(samples))
    columns = {"run": str, "subject": str, "confounds": str}
    index = read_table(Layout.of(config, dataset).index, dtype=columns)
    wanted = [run for name in {*map(subject_of, samples)} for run in states.runs[name]]
    volumes = []
    for row in index[index["run"].isin(wanted)].to_dict("records"):
        motion = _motion(row.get("confounds"), int(row["n_volumes"]))
        if motion is None:
            continue
        # All volumes of the scan, of which there may be fewer in the ROI series.
        step = float(row["repetition_time"])
        times = np.arange(int(row["n_volumes"])) * step
        labels = label_volumes(times, step, states.events[row["run"]], states.target.lag)
        of_run = pd.DataFrame({"state": labels, "subject": row["subject"]})
        for name, values in (("mean_fd", motion.fd), ("std_dvars", motion.std_dvars)):
            of_run[name] = np.nan if values is None else values
        volumes.append(of_run[of_run["state"] != NONE])
    if not volumes:
        return pd.DataFrame(index=list(samples))
    together = pd.concat(volumes)
    names = together["state"].map(dict(enumerate(states.target.class_names)))
    pairs = zip(together["subject"], names, strict=True)
    means = together[["mean_fd", "std_dvars"]].groupby([sample_name(*pair) for pair in pairs])
    return means.mean().reindex(list(samples))


def _mean_fd(path: object, n_volumes: float) -> float:
    motion = _motion(path, int(n_volumes))
    return np.nan if motion is None or motion.fd is None else float(np.nanmean(motion.fd))


def _motion(path: object, n_volumes: int) -> Motion | None:
    """The motion that a run's confounds tell; `None` where it has none."""
    if not isinstance(path, str):
        return None
    if not Path(path).exists():
        raise InputError(
            f"{path} is not there, which the index names: bring the confounds back, or leave "
            "mean_fd out of evaluate.confounds"
        )
    return read_motion(path, n_volumes)


def design(
    table: pd.DataFrame, train: Sequence[str], test: Sequence[str]
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64], list[str]]:
    """Confounds as numbers, by what the training subjects have.

    Parameters
    ----------
    table
        Of `confounds_of`; subjects without a row have no values.
    train, test
        Subjects, in the order of the rows returned.

    Returns
    -------
    train, test : (subject, column) float64
        Numbers standardised, categories as one column each.
    used : list of str
        The columns of `table` that were used.
    """
    first, other = table.reindex(list(train)), table.reindex(list(test))
    used = [str(name) for name in table if first[name].nunique(dropna=True) > 1]
    words = [name for name in used if name in CATEGORIES]
    numbers = [name for name in used if name not in CATEGORIES]
    transform = ColumnTransformer(
        [
            ("numbers", make_pipeline(SimpleImputer(strategy="median"), StandardScaler()), numbers),
            ("words", OneHotEncoder(handle_unknown="ignore", sparse_output=False), words),
        ]
    )
    for part in (first, other):
        part[words] = part[words].astype(object).where(part[words].notna(), UNKNOWN)
    x, x_test = transform.fit_transform(first[used]), transform.transform(other[used])
    return np.asarray(x, dtype=np.float64), np.asarray(x_test, dtype=np.float64), used

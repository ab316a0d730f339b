"""What is known of a subject without its brain signal: age, sex, site, head motion and size.

They are what the confound model predicts from, and what `evaluate.adjust: regress` takes out of the
features of the other baselines. A model that does not beat them may have learnt who moved, or which
scanner was used.

- `age` and `sex` are the columns of the table of subjects that are called so (`gender` too), `site`
  that of `participants.site_column`. The target's own column is never among them.
- `mean_fd` (framewise displacement by the confounds of the preprocessing, mm), `tsnr` and
  `n_voxels` (brain voxels) are means over a subject's runs, `n_volumes` is their sum.
- A column that no training subject has a value in is left out. Missing numbers become the training
  median; a missing site or sex is a category of its own, and one that training lacks is none.
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

from neuromamba.bids_scan import subject_name
from neuromamba.config import Config
from neuromamba.layout import Layout
from neuromamba.participants import MISSING
from neuromamba.qc_metrics import read_motion
from neuromamba.stage import read_manifest
from neuromamba.tables import read_table

CATEGORIES = ("sex", "site")
ALSO_CALLED = {"gender": "sex"}
UNKNOWN = "unknown"


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
    known = measured.join(_of_people(config, dataset, target), how="left")
    return known[[name for name in config.evaluate.confounds if name in known]]


def _of_people(config: Config, dataset: str, target: str) -> pd.DataFrame:
    settings = config.datasets[dataset].participants
    if settings is None:
        return pd.DataFrame()
    table = read_table(settings.file, dtype=str, na_values=MISSING)
    table.columns = table.columns.str.strip()
    subjects = pd.Index(table[settings.id_column].map(subject_name), name="subject")
    own = config.datasets[dataset].targets[target].column
    columns = {}
    for column in table.columns:
        name = ALSO_CALLED.get(column.lower(), column.lower())
        name = "site" if column == settings.site_column else name
        if column != own and name in ("age", *CATEGORIES) and name not in columns:
            cells = table[column].str.strip()
            columns[name] = cells if name in CATEGORIES else pd.to_numeric(cells, errors="coerce")
    if settings.site_column is None:
        columns.pop("site", None)
    return pd.DataFrame(columns).set_axis(subjects)


def _of_runs(config: Config, dataset: str, runs: pd.DataFrame) -> pd.DataFrame:
    layout = Layout.of(config, dataset)
    index = read_table(layout.index, dtype={"run": str, "confounds": str}).set_index("run")
    table = runs.set_index("run")
    files = index["confounds"].to_dict() if "confounds" in index else {}
    lengths = index["n_volumes"].to_dict()
    table = table.assign(mean_fd=[_mean_fd(files.get(run), lengths[run]) for run in table.index])
    for stage, names in (("volumes", ("n_volumes", "n_voxels")), ("rois", ("tsnr",))):
        parts = [read_manifest(layout, stage, k) for k in range(config.compute.batches)]
        made = pd.concat(parts, ignore_index=True).set_index("run")
        for name in names:
            if name in made:
                table[name] = pd.to_numeric(made[name], errors="coerce").reindex(table.index)
    grouped = table.groupby("subject")
    found = grouped.mean()
    if "n_volumes" in found:
        found["n_volumes"] = grouped["n_volumes"].sum(min_count=1)
    return found


def _mean_fd(path: object, n_volumes: float) -> float:
    if not isinstance(path, str) or not Path(path).exists():
        return np.nan
    fd = read_motion(path, int(n_volumes)).fd
    return np.nan if fd is None else float(np.nanmean(fd))


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

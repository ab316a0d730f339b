"""The baselines of the evaluation on real ROI series: ABIDE, CC400, five-fold by subject.

Input: the folder `abide_cc400/` that `paint_abide.py` describes. The baselines are those of
`neuromamba.baselines`, with the defaults of the config, on `StratifiedKFold(5, shuffle=True,
random_state=0)`; a fold's four other parts are for training, the penalty is chosen within them.

    python benchmarks/abide_baselines.py DATA --baselines fc fc-combat fc-regress confounds

Age, sex, site, mean FD and the number of volumes are the confounds; the sites are what `fc-combat`
harmonises.
With 642 subjects it takes minutes a target; `fc-tangent` would take an hour and more.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd
import xarray
from common import RESULTS, head, machine, write_results
from sklearn.metrics import balanced_accuracy_score, roc_auc_score
from sklearn.model_selection import StratifiedKFold
from tqdm import tqdm

from neuromamba.baselines import Subjects, predict_baselines
from neuromamba.config import Evaluate
from neuromamba.connectivity import connectivity
from neuromamba.tables import read_table

PACKAGES = ("neuromamba", "numpy", "scipy", "scikit-learn")
FOLDS = 5
TARGETS: dict[str, tuple[str, list[str]]] = {
    "asd": ("dx", ["TC", "ASD"]),
    "sex": ("sex", ["F", "M"]),
    "age": ("age", []),
}
"""Column and classes; no classes for a number."""
CLASS_METRICS, NUMBER_METRICS = ("AUROC", "balanced accuracy"), ("MAE", "Pearson r")


def load(data: Path, folder: Path) -> tuple[pd.DataFrame, dict[str, list[Path]]]:
    """The participants, and ROI stores in the form of the `rois` stage, written to `folder`."""
    series = np.load(data / "timeseries.npz")
    people = read_table(data / "participants.tsv").set_index("participant_id")
    if list(series["file_id"]) != list(people["file_id"]):
        raise SystemExit(f"{data}: the series and the table are of other subjects")
    starts, scale = series["offset"], float(series["scale"])
    stores = {}
    for row, subject in enumerate(tqdm(people.index, desc="connectivity", unit="subject")):
        stored = series["ts"][starts[row] : starts[row + 1]]
        values = stored * (scale * series["sd"][row]) + series["mean"][row]
        values[:, (stored == 0).all(axis=0)] = np.nan
        values = values.astype(np.float32)
        fc = connectivity(values)
        rois = xarray.Dataset(
            {
                "timeseries": (("time", "roi"), values),
                "fc": (("roi", "roi_2"), fc, {"fisher_z": False}),
            },
            attrs={"connectivity": ["pearson"]},
        )
        stores[str(subject)] = [folder / f"{subject}.zarr"]
        rois.to_zarr(stores[str(subject)][0], zarr_format=3, consolidated=False)
    return people, stores


def evaluate(
    people: pd.DataFrame, stores: dict[str, list[Path]], target: str, baselines: list[str]
) -> pd.DataFrame:
    """The metrics of each baseline in each fold."""
    column, classes = TARGETS[target]
    labels = people[column]
    confounds = people[["age", "sex", "site", "mean_fd"]].assign(n_volumes=1.0 * people["n_vols"])
    confounds = confounds.drop(columns=column, errors="ignore")
    settings = Evaluate.model_validate({"baselines": baselines})
    rows = []
    strata = labels if classes else pd.qcut(labels.rank(method="first"), FOLDS, labels=False)
    folds = StratifiedKFold(FOLDS, shuffle=True, random_state=0).split(labels, strata)
    for fold, (train, test) in enumerate(folds):
        subjects = Subjects(classes, labels.iloc[train], labels.iloc[test], 0)
        predicted, notes = predict_baselines(settings, subjects, stores, confounds, 0)
        for name, table in predicted.items():
            for metric, value in score(subjects, table).items():
                penalty = notes[name]["inverse_penalty"]
                rows.append((target, name, fold, metric, value, penalty))
    names = ["target", "baseline", "fold", "metric", "value", "inverse_penalty"]
    return pd.DataFrame(rows, columns=names)


def score(subjects: Subjects, table: pd.DataFrame) -> dict[str, float]:
    """The metrics of one table of predictions."""
    if not subjects.classes:
        true, said = subjects.test.to_numpy(float), table["value"].to_numpy()
        values = (np.abs(true - said).mean(), np.corrcoef(true, said)[0, 1])
        return dict(zip(NUMBER_METRICS, map(float, values), strict=True))
    positive = (subjects.test == subjects.classes[1]).to_numpy()
    share = table.iloc[:, 1].to_numpy()
    values = (roc_auc_score(positive, share), balanced_accuracy_score(positive, share > 0.5))
    return dict(zip(CLASS_METRICS, map(float, values), strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path, help="folder with timeseries.npz and participants.tsv")
    parser.add_argument(
        "--baselines", nargs="+", default=["fc", "fc-combat", "fc-regress", "confounds"]
    )
    parser.add_argument("--targets", nargs="+", choices=sorted(TARGETS), default=sorted(TARGETS))
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        people, stores = load(options.data, Path(folder))
        found = [evaluate(people, stores, name, options.baselines) for name in options.targets]
    table = pd.concat(found, ignore_index=True)
    host = machine(*PACKAGES)
    rows = [
        head(host, PACKAGES),
        "",
        f"{len(people)} subjects of ABIDE, CC400; mean over {FOLDS} folds, SD over folds in "
        "brackets. Age in years.",
        "",
        "| target | baseline | | |",
        "|---|---|---|---|",
    ]
    for (target, name), part in table.groupby(["target", "baseline"], sort=False):
        cells = [
            f"{metric} {values.mean():.3f} ({values.std():.3f})"
            for metric, values in part.groupby("metric", sort=False)["value"]
        ]
        rows.append(f"| {target} | {name} | {' | '.join(cells)} |")
    text = "\n".join(rows)
    print(text)
    result = {"machine": host, "folds": table.to_dict("records")}
    write_results(options.results, "abide_baselines", result, text)


if __name__ == "__main__":
    main()

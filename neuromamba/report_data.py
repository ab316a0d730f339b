"""The report's section on the data: what there is, what was left out, how good it is."""

from __future__ import annotations

from typing import Any
from urllib.parse import quote

import numpy as np
import pandas as pd

from neuromamba import figures
from neuromamba.collect import Data, group_connectivity
from neuromamba.config import Config, Denoise
from neuromamba.layout import Layout
from neuromamba.qc_rules import rules_of
from neuromamba.tables import read_table
from neuromamba.verdicts import number

COLUMNS = {
    "tsnr": "tSNR",
    "mean_fd": "mean FD (mm)",
    "n_volumes": "volumes",
    "n_voxels": "brain voxels",
    "n_tokens": "tokens",
    "n_rois": "ROIs",
}
COUNTS = ("n_volumes", "n_voxels", "n_tokens", "n_rois")
LONGEST_LIST = 200
MOST_FLAGGED = 10


def describe_data(config: Config, data: Data) -> dict[str, Any]:
    """What the page shows of a dataset's runs."""
    shown = _known(data)
    values = {COLUMNS[name]: data.runs[name] for name in shown if data.runs[name].nunique() > 1}
    group = group_connectivity(config, data)
    return {
        "n_runs": len(data.index),
        "n_subjects": data.index["subject"].nunique(),
        "n_usable": len(data.runs),
        "n_usable_subjects": data.runs["subject"].nunique(),
        "n_sites": int(data.labels["site"].nunique()) if "site" in data.labels else 0,
        "parts": {part: len(subjects) for part, subjects in data.split.items()},
        "preprocessed_by": data.preprocessed_by,
        "denoised": changes_of(config.volumes.denoise),
        "facts": _run_facts(data),
        "runs": _run_table(data),
        "distributions": figures.distributions(values) if values else None,
        "fc": group and figures.connectivity(group[0]),
        "fc_runs": group and group[1],
        "fc_rois": group and len(group[0]),
        **_exclusions(data),
        "quality": describe_quality(config, data.name),
    }


def _exclusions(data: Data) -> dict[str, Any]:
    """Who was left out, at which stage, and why."""
    table = data.excluded
    stages = table.drop_duplicates("run")["stage"].value_counts()
    return {
        "excluded": table.head(LONGEST_LIST).to_dict("records"),
        "n_excluded": len(table),
        "excluded_at": ", ".join(f"{count:,} at {stage}" for stage, count in stages.items()),
    }


def describe_quality(config: Config, dataset: str) -> dict[str, Any] | None:
    """How many runs are unlike the others, from `overview.tsv`; `None` where there is none."""
    layout = Layout.of(config, dataset)
    if not layout.overview.with_suffix(".tsv").exists():
        return None
    table = read_table(layout.overview.with_suffix(".tsv"), dtype=str)
    used = table["excluded"].isna()
    flagged = table[used & table["outlier"].notna()]
    pages = layout.qc("run").parent
    return {
        "n_used": int(used.sum()),
        "n_flagged": len(flagged),
        "n_by_rule": int((table["stage"] == "qc").sum()),
        "rules": rules_of(config.qc),
        "page": layout.overview.exists(),
        "flagged": [
            {
                "run": run,
                "why": why,
                "link": f"../{dataset}/qc/{quote(run)}.html"
                if (pages / f"{run}.html").exists()
                else None,
            }
            for run, why in flagged[["run", "outlier"]].head(MOST_FLAGGED).itertuples(index=False)
        ],
    }


def changes_of(denoise: Denoise) -> str:
    """What is taken out of the signal, as `key value, ...`; empty where nothing is."""
    changed = {
        key: value
        for key, value in denoise.model_dump(mode="json").items()
        if value and (key in ("strategy", "detrend") or value != Denoise.model_fields[key].default)
    }
    shown = {
        key: ", ".join(value) if isinstance(value, list) else value
        for key, value in changed.items()
    }
    return "; ".join(f"{key} {value}" for key, value in shown.items())


def describe_labels(data: Data, target: str, kind: str) -> str:
    """Who has which label, among the subjects with usable runs."""
    if target not in data.labels:
        return "no table of subjects"
    found = data.labels[target].reindex(data.runs["subject"].unique())
    missing = f"; {found.isna().sum()} without a label" if found.isna().any() else ""
    if kind == "classification":
        return ", ".join(f"{n} {name}" for name, n in found.value_counts().items()) + missing
    if found.isna().all():
        return "nobody has one"
    low, middle, high = (number(v) for v in np.nanpercentile(found.astype(float), [0, 50, 100]))
    return f"{found.notna().sum()} subjects, median {middle}, from {low} to {high}{missing}"


def _known(data: Data) -> list[str]:
    """The columns of runs that hold anything."""
    return [name for name in COLUMNS if name in data.runs and data.runs[name].notna().any()]


def _run_facts(data: Data) -> list[dict[str, str]]:
    facts = []
    for name in _known(data):
        values = data.runs[name].dropna().astype(float)
        low, middle, high = (_shown(name, value) for value in values.quantile([0, 0.5, 1]))
        row = {"label": COLUMNS[name], "low": low, "median": middle, "high": high}
        facts.append(row | {"n": str(len(values))})
    return facts


def _run_table(data: Data) -> dict[str, list[Any]]:
    known = _known(data)
    rows = data.runs.head(LONGEST_LIST)
    cells = [
        [row["run"], *(_shown(name, row[name]) for name in known)] for _, row in rows.iterrows()
    ]
    return {"columns": ["run", *(COLUMNS[name] for name in known)], "rows": cells}


def _shown(name: str, value: float) -> str:
    whole = name in COUNTS and pd.notna(value) and np.isfinite(value)
    return number(round(value) if whole else float(value))

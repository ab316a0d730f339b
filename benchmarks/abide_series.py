"""Write real ROI time series as a BIDS-Derivatives dataset, to run the whole workflow on them.

Input: the folder `abide_cc400/` that `paint_abide.py` describes (`timeseries.npz`,
`participants.tsv`). Output: all its subjects, a table of their series each, which
`benchmarks/abide_series.yaml` describes:

    python benchmarks/abide_series.py DATA data/abide-series
    snakemake --cores 2 all --configfile benchmarks/abide_series.yaml

Values are in the units of the published series; regions without signal are `n/a`. ABIDE is
CC BY-NC-SA: cite Di Martino 2014 and Craddock 2013, and do not distribute what this script writes
without its licence.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import pandas as pd
from paint_abide import REPETITION_TIMES
from tqdm import tqdm

from neuromamba.files import write_json
from neuromamba.tables import read_table, write_table

SIDECAR = {
    "TaskName": "rest",
    "Description": "C-PAC, band-pass and global signal regression (filt_global)",
}


def read_series(arrays: np.lib.npyio.NpzFile, series: np.ndarray, row: int) -> pd.DataFrame:
    """The series of one subject in the published units: (time, region), NaN without signal."""
    start, stop = arrays["offset"][row : row + 2]
    stored = series[start:stop]
    sd, mean = arrays["sd"][row].astype(np.float32), arrays["mean"][row].astype(np.float32)
    values = stored * (np.float32(arrays["scale"]) * sd) + mean
    values[:, (stored == 0).all(axis=0)] = np.nan
    return pd.DataFrame(values, columns=[f"CC400-{label}" for label in arrays["roi_label"]])


def main() -> None:
    """Write the derivatives."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path, help="folder with abide_cc400/")
    parser.add_argument("output", type=Path)
    options = parser.parse_args()
    arrays = np.load(options.data / "abide_cc400" / "timeseries.npz", allow_pickle=False)
    people = read_table(options.data / "abide_cc400" / "participants.tsv")
    rows = {name: row for row, name in enumerate(arrays["file_id"])}
    series = arrays["ts"]
    for subject in tqdm(list(people.itertuples()), desc="write", unit="subject"):
        name = f"{subject.participant_id}_task-rest_seg-CC400_stat-mean_timeseries"
        folder = options.output / str(subject.participant_id) / "func"
        table = read_series(arrays, series, rows[subject.file_id])
        write_table(folder / f"{name}.tsv", table.round(4))
        repetition_time = REPETITION_TIMES.get(str(subject.site), 2.0)
        facts = {"RepetitionTime": repetition_time, "SamplingFrequency": 1 / repetition_time}
        write_json(folder / f"{name}.json", SIDECAR | facts)
    kept = ["participant_id", "dx", "sex", "age", "site", "mean_fd"]
    write_table(
        options.output / "participants.tsv", people[kept].rename(columns={"dx": "diagnosis"})
    )
    write_json(
        options.output / "dataset_description.json",
        {
            "Name": "ABIDE I, CC400 time series of the Preprocessed Connectomes Project",
            "BIDSVersion": "1.9.0",
            "DatasetType": "derivative",
            "GeneratedBy": [{"Name": "C-PAC"}, {"Name": "benchmarks/abide_series.py"}],
            "License": "CC BY-NC-SA 3.0",
        },
    )
    print(f"{len(people)} subjects in {options.output}")


if __name__ == "__main__":
    main()

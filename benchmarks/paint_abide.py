"""Paint real ROI time series into 4D scans, to run the whole workflow on real time courses.

Input: a folder with `abide_cc400/` (`timeseries.npz`: CC400 ROI series of ABIDE subjects from the
Preprocessed Connectomes Project, C-PAC with band-pass and global signal regression, int8 z values
per ROI; `participants.tsv`) and `atlas/cc400_roi_atlas_3mm.nii.gz`. Output: a folder that looks
like fMRIPrep derivatives, one run a subject, with the atlas beside them, which
`benchmarks/painted_abide.yaml` describes:

    python benchmarks/paint_abide.py DATA data/painted-abide
    snakemake --cores 2 all --configfile benchmarks/painted_abide.yaml

With `--everybody` into data/painted-abide-all, for benchmarks/painted_abide_folds.yaml.

The time courses are real; space is not: every voxel of a region carries the same series, so a model
of voxels sees no more than a model of regions. ABIDE is CC BY-NC-SA: cite Di Martino 2014 and
Craddock 2013, and do not distribute what this script writes without its licence.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
from tqdm import tqdm

from neuromamba.files import atomic_path, write_json
from neuromamba.tables import read_table, write_table

# Repetition times of ABIDE I in seconds, from the sites' scan parameters; 2 s elsewhere.
REPETITION_TIMES = {
    "KKI": 2.5,
    "LEUVEN_1": 1.656,
    "LEUVEN_2": 1.656,
    "MAX_MUN": 3.0,
    "OHSU": 2.5,
    "OLIN": 1.5,
    "PITT": 1.5,
    "SBL": 2.2,
    "UCLA_1": 3.0,
    "UCLA_2": 3.0,
}
BASELINE, AMPLITUDE = 1000.0, 20.0
"""Level and SD of the painted signal: a z of 1 is a change of 2 %, a usual size for BOLD."""


def choose_subjects(participants: pd.DataFrame, number: int, seed: int) -> pd.DataFrame:
    """As many women as men at each site, with no region that lacks signal.

    Sites differ in repetition time, which a model of short windows reads at a glance. Were the
    sexes not matched within sites, it would learn the sites' shares of the sexes, and in a small
    split these are turned round between training and test.
    """
    whole = participants[participants["n_zero_rois"] == 0].sample(frac=1, random_state=seed)
    order = whole.groupby(["site", "sex"]).cumcount()
    pair = whole["site"] + "_" + order.astype(str)
    complete = pair[whole.groupby(pair)["sex"].transform("nunique") == 2]
    chosen = complete.drop_duplicates().head(number // 2)
    return whole[pair.isin(chosen)].sort_values("participant_id")


def paint(series: np.ndarray, labels: np.ndarray, atlas: np.ndarray) -> np.ndarray:
    """Fill an atlas (x, y, z) with the series (time, roi) of its labels: int16 (x, y, z, time)."""
    lookup = np.zeros((int(atlas.max()) + 1, len(series)), np.float32)
    lookup[labels] = (BASELINE + AMPLITUDE * series.T) * 10
    return np.rint(lookup[atlas]).astype(np.int16)


def main() -> None:
    """Write the derivatives."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--subjects", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    text = "paint all subjects with signal in every region, matched for nothing"
    parser.add_argument("--everybody", action="store_true", help=text)
    options = parser.parse_args()

    arrays = np.load(options.data / "abide_cc400" / "timeseries.npz", allow_pickle=False)
    rows = {name: row for row, name in enumerate(arrays["file_id"])}
    regions = options.data / "atlas" / "cc400_roi_atlas_3mm.nii.gz"
    image = nib.load(regions)
    atlas = np.asarray(image.dataobj).astype(np.int16)
    labels = arrays["roi_label"]
    atlas[~np.isin(atlas, labels)] = 0
    table = read_table(options.data / "abide_cc400" / "participants.tsv")
    if options.everybody:
        subjects = table[table["n_zero_rois"] == 0].sort_values("participant_id")
    else:
        subjects = choose_subjects(table, options.subjects, options.seed)

    for subject in tqdm(list(subjects.itertuples()), desc="paint", unit="subject"):
        row = rows[subject.file_id]
        start, stop = arrays["offset"][row : row + 2]
        series = arrays["ts"][start:stop].astype(np.float32) * float(arrays["scale"])
        name = f"{subject.participant_id}_task-rest_space-MNI152NLin6Asym"
        folder = options.output / subject.participant_id / "func"
        for suffix, values in (
            ("desc-preproc_bold", paint(series, labels, atlas)),
            ("desc-brain_mask", (atlas > 0).astype(np.uint8)),
        ):
            painted = nib.Nifti1Image(values, image.affine)
            if suffix == "desc-preproc_bold":
                painted.header.set_slope_inter(0.1, 0.0)
            with atomic_path(folder / f"{name}_{suffix}.nii.gz") as path:
                painted.to_filename(path)
        repetition_time = REPETITION_TIMES.get(str(subject.site), 2.0)
        write_json(
            folder / f"{name}_desc-preproc_bold.json",
            {"RepetitionTime": repetition_time, "TaskName": "rest"},
        )
    with atomic_path(options.output / regions.name) as path:
        shutil.copyfile(regions, path)
    write_table(options.output / "participants.tsv", subjects)
    write_json(
        options.output / "dataset_description.json",
        {
            "Name": "ABIDE I, CC400 time series painted into their regions",
            "BIDSVersion": "1.9.0",
            "DatasetType": "derivative",
            "GeneratedBy": [{"Name": "benchmarks/paint_abide.py"}],
            "License": "CC BY-NC-SA 3.0",
        },
    )
    print(f"{len(subjects)} subjects in {options.output}")


if __name__ == "__main__":
    main()

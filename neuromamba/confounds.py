"""A run's confounds: what nilearn's `load_confounds` takes from fMRIPrep's table, checked first.

Choices
-------
- `nilearn.interfaces.fmriprep.load_confounds` picks the columns and the volumes, so that a strategy
  means here what it means there; non-steady-state volumes are dropped whenever a strategy is asked
  for. It finds tables by the scan's name, and a dataset's files may be named otherwise: the table
  goes to a temporary folder under the name that it looks for.
- nilearn fills what is missing in the first row (derivatives have no value there) from the second.
  Any other cell that is no number is an error here, and not a volume that is not scrubbed.
"""

from __future__ import annotations

import math
import shutil
import tempfile
import uuid
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pandas as pd
from nilearn.interfaces.fmriprep import load_confounds

from neuromamba.config import Denoise
from neuromamba.files import InputError, read_json
from neuromamba.tables import read_table

STEM = "sub-01_desc-confounds_timeseries"
IMAGE = "sub-01_desc-preproc_bold.nii.gz"
SCRUB_COLUMNS = ["framewise_displacement", "std_dvars"]
NON_STEADY_STATE = "non_steady_state"
COSINE_PERIOD = 128.0
"""Longest period in seconds that fMRIPrep's cosines leave in the data; shorter runs have none."""


@dataclass(frozen=True)
class Confounds:
    """Regressors of one run, and which of its volumes are used.

    Attributes
    ----------
    values
        (volume, column) float64, all volumes, in the table's units.
    columns
        Their names.
    kept, dropped, scrubbed
        Volumes (counted from 0, ascending) that are used, that came before the steady state, and
        that move too much or stand in too short a segment.
    """

    values: npt.NDArray[np.float64]
    columns: list[str]
    kept: npt.NDArray[np.intp]
    dropped: list[int]
    scrubbed: list[int]


def no_confounds(n_volumes: int) -> Confounds:
    """Nothing to regress out, and all volumes used."""
    return Confounds(np.empty((n_volumes, 0)), [], np.arange(n_volumes), [], [])


def sidecar_of(table: Path) -> Path:
    """The JSON file that says of which mask each CompCor component is."""
    return table.with_suffix(".json")


def read_confounds(
    path: Path | None, run: str, n_volumes: int, repetition_time: float, denoise: Denoise
) -> Confounds:
    """Read what `denoise.strategy` asks for.

    Parameters
    ----------
    path
        The run's table, tab-separated, one row a volume; `None` where there is none.
    run
        The run's name, for messages.
    n_volumes, repetition_time
        Of the scan; the latter in seconds.
    denoise
        Which columns, and when a volume is scrubbed.

    Raises
    ------
    InputError
        When there is no table, it has another number of rows than the scan has volumes, lacks
        columns of the strategy, holds cells that are no numbers, or no volume is left.
    """
    if path is None or not path.exists():
        raise InputError(
            f"{run}: has no confounds table ({path or 'none was found beside the scan'}), but "
            f"volumes.denoise.strategy asks for {', '.join(denoise.strategy)}; add the table, name "
            "its place in the dataset's files.confounds, or empty the strategy"
        )
    text = read_table(path, dtype=str)
    if len(text) != n_volumes:
        raise InputError(
            f"{path}: has {len(text)} rows, but the scan of {run} has {n_volumes} volumes; give "
            "the table that was made with this scan"
        )
    numbers = text.apply(pd.to_numeric, errors="coerce").astype(np.float64)
    _refuse_missing_columns(path, numbers, repetition_time, denoise)
    columns, values, kept = _by_nilearn(path, numbers, denoise)
    steady = [str(name) for name in numbers if NON_STEADY_STATE in str(name)]
    scrub = SCRUB_COLUMNS if "scrub" in denoise.strategy else []
    _refuse_text(path, text, numbers, [*columns, *scrub, *steady])
    _refuse_none_left(path, kept, n_volumes, denoise)
    early = (numbers[steady] != 0).any(axis=1).to_numpy()
    removed = np.setdiff1d(np.arange(n_volumes), kept)
    return Confounds(
        values=values,
        columns=columns,
        kept=kept,
        dropped=[int(n) for n in removed if early[n]],
        scrubbed=[int(n) for n in removed if not early[n]],
    )


def _by_nilearn(
    path: Path, numbers: pd.DataFrame, denoise: Denoise
) -> tuple[list[str], npt.NDArray[np.float64], npt.NDArray[np.intp]]:
    """Columns, their values and the volumes kept."""
    # nilearn always looks for non-steady-state volumes, and warns when asked to.
    strategy = [part for part in denoise.strategy if part != NON_STEADY_STATE]
    with _named_for_nilearn(path, numbers, "compcor" in strategy) as image:
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="strategy is empty")
                warnings.filterwarnings("ignore", message="All volumes were marked")
                table, kept = load_confounds(
                    str(image),
                    strategy=strategy,
                    motion=denoise.motion,
                    scrub=denoise.scrub,
                    fd_threshold=denoise.fd_threshold,
                    std_dvars_threshold=denoise.std_dvars_threshold,
                    wm_csf=denoise.wm_csf,
                    global_signal=denoise.global_signal,
                    compcor=denoise.compcor,
                    n_compcor=denoise.n_compcor,
                    demean=False,
                )
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"{path}: cannot be used with volumes.denoise.strategy "
                f"[{', '.join(denoise.strategy)}]: {' '.join(str(error).split())}; choose another "
                "strategy, or preprocess the run again"
            ) from None
    if table is None:
        table = pd.DataFrame(index=numbers.index)
    kept = np.arange(len(numbers)) if kept is None else np.asarray(kept, dtype=np.intp)
    return list(table.columns), table.to_numpy(np.float64), kept


@contextmanager
def _named_for_nilearn(path: Path, numbers: pd.DataFrame, sidecar: bool) -> Iterator[Path]:
    """Yield the path of a scan (which is not there) that nilearn finds the table beside."""
    # nilearn replaces "tsv" by "json" anywhere in the path; no hexadecimal name has a "t".
    folder = Path(tempfile.gettempdir()) / f"confounds-{uuid.uuid4().hex}"
    folder.mkdir(mode=0o700)
    try:
        numbers.to_csv(folder / f"{STEM}.tsv", sep="\t", index=False, na_rep="n/a")
        if sidecar:
            read_json(sidecar_of(path))
            shutil.copyfile(sidecar_of(path), folder / f"{STEM}.json")
        yield folder / IMAGE
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _refuse_missing_columns(
    path: Path, numbers: pd.DataFrame, repetition_time: float, denoise: Denoise
) -> None:
    """What nilearn would pass over in silence, or not explain."""
    missing = [name for name in SCRUB_COLUMNS if name not in numbers]
    if "scrub" in denoise.strategy and missing:
        raise InputError(
            f"{path}: has no column {' and no '.join(missing)}, which scrubbing goes by; take "
            "scrub out of volumes.denoise.strategy, or add the columns"
        )
    seconds = len(numbers) * repetition_time
    cosines = any("cosine" in str(name) for name in numbers)
    if "high_pass" in denoise.strategy and not cosines and seconds >= COSINE_PERIOD / 2:
        raise InputError(
            f"{path}: has no cosine columns, which the strategy high_pass consists of; in "
            "volumes.denoise, give high_pass a frequency in Hz instead"
        )


def _refuse_none_left(
    path: Path, kept: npt.NDArray[np.intp], n_volumes: int, denoise: Denoise
) -> None:
    if not len(kept):
        raise InputError(
            f"{path}: all {n_volumes} volumes are scrubbed (fd_threshold {denoise.fd_threshold:g} "
            f"mm, std_dvars_threshold {denoise.std_dvars_threshold:g}, segments of at least "
            f"{denoise.scrub}); raise the thresholds in volumes.denoise, or leave the run out"
        )


def _refuse_text(path: Path, text: pd.DataFrame, numbers: pd.DataFrame, columns: list[str]) -> None:
    """Raise `InputError` when a column that is used has cells that are no finite numbers."""
    for name in columns:
        bad = ~np.isfinite(numbers[name].to_numpy())
        # The first row's missing cells are nilearn's to fill.
        bad[0] &= not (pd.isna(text[name].iloc[0]) or _is_nan(text[name].iloc[0]))
        if bad.any():
            row = int(np.flatnonzero(bad)[0])
            cell = text[name].iloc[row]
            raise InputError(
                f"{path}: column {name} has {'nothing' if pd.isna(cell) else repr(cell)} at volume "
                f"{row} (counted from 0) where a number is needed; correct the table, or choose "
                "a volumes.denoise.strategy without it"
            )


def _is_nan(cell: str) -> bool:
    try:
        return math.isnan(float(cell))
    except ValueError:
        return False

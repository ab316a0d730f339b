"""Predict the target of a fine-tuned model on new scans.

Design choices
--------------
- A scan goes through the code of the `volumes` and `tokens` stages with the settings that the model
  was trained under, in a temporary folder, one run after the other: memory and disk hold one run.
- A model of T1w images and connectivity is given images alone: its fine-tuning reads the image of
  whoever has one, so nothing else would be looked at.
- A scan that does not fit is refused with a reason in its row, and the others go on.
- The predicted class is the one that the evaluation would name: the most probable before
  calibration, where classes count the same. Calibrated probabilities follow how common classes
  were among validation subjects; where they favour another class, a warning says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from neuromamba.anat_scan import Anatomical
from neuromamba.calibration_file import Level
from neuromamba.files import InputError
from neuromamba.fitness import (
    judge_length,
    judge_place,
    judge_repetition_time,
    judge_subject,
    refuse_short,
)
from neuromamba.new_scans import Asked, NewScan, find_scans
from neuromamba.observe import Observed, observe_run
from neuromamba.predicted import Outcome, summarize, tabulate
from neuromamba.predicted_maps import add_maps, refuse_unmapped
from neuromamba.predictor import Predictor, open_predictor, with_atlas, with_tokenizer
from neuromamba.scan_windows import image_windows, scan_windows
from neuromamba.tables import write_table
from neuromamba.volumes import Source

CONFIDENCE = 0.9
"""Of sets and intervals, where none is asked for."""


def run_predict(
    model: Path,
    scans: Sequence[Path],
    output: Path | None = None,
    asked: Asked | None = None,
    level: Level = "run",
    confidence: float = CONFIDENCE,
    any_repetition_time: bool = False,
    device: str = "auto",
    explain: Path | None = None,
    atlas: str | None = None,
    tokenizer: Path | None = None,
) -> bool:
    """Predict scans, print a summary, and write the table of `predicted` to `output`.

    The table is there before the maps are, and names them when they are done.

    Parameters
    ----------
    model
        Folder of a finished fine-tuning.
    scans
        NIfTI files (of runs, or of T1w images where the model reads these), and folders of
        derivatives.
    level
        A row for each `run`, or for each `subject` by the mean over the windows of all its runs.
    confidence
        Of sets and intervals, above 0 and below 1.
    any_repetition_time
        Predict also where it is far from those of the training.
    explain
        Folder for a map of each prediction (see `predicted_maps`); by default none is made.
    atlas
        File or name of the atlas whose regions the model reads, if it does.
    tokenizer
        Folder of the tokenizer whose codes the model reads, if it does.

    Returns
    -------
    bool
        Whether every scan was predicted.

    Raises
    ------
    InputError
        When the model or an option does not serve.
    """
    if not 0 < confidence < 1:
        raise InputError(f"--confidence {confidence:g}: must be above 0 and below 1, such as 0.9")
    predictor = with_tokenizer(with_atlas(open_predictor(model, device), atlas), tokenizer)
    images = bool(predictor.model.pairs)
    found = find_scans(scans, predictor.space, asked or Asked(), images)
    if explain is not None:
        refuse_unmapped(predictor, found, level, explain)
    bar = tqdm(found, desc=f"predict {predictor.target}", unit="run", mininterval=1.0)
    outcomes = [predict_scan(predictor, scan, any_repetition_time) for scan in bar]
    table = tabulate(predictor, outcomes, level, confidence)
    if output is not None:
        write_table(output, table)
    if explain is not None:
        table = add_maps(predictor, outcomes, table, level, explain)
        if output is not None:
            write_table(output, table)
    print(summarize(predictor, table, level, confidence, output is not None))
    if output is not None:
        print(f"table: {output}")
    if explain is not None:
        print(f"maps: {explain} ({table['map'].notna().sum()})")
    return all(one.observed is not None for one in outcomes)


def predict_scan(predictor: Predictor, scan: NewScan, any_repetition_time: bool) -> Outcome:
    """See one run as the model sees it, or the reason why that cannot be."""
    try:
        if scan.image is not None:
            return Outcome(scan, see_image(predictor, scan.image), judge_subject(predictor, scan))
        if scan.source is None:
            return Outcome(scan, reason=scan.reason)
        seconds = scan.source.repetition_time
        refuse_short(predictor, scan.n_volumes, seconds, str(scan.source.bold))
        warnings = judge_repetition_time(predictor, scan, any_repetition_time)
        observed, n_volumes = see(predictor, scan.source)
        warnings += judge_length(predictor, n_volumes)
        warnings += judge_place(predictor, observed, scan.source.bold)
    except InputError as error:
        return Outcome(scan, reason=" ".join(str(error).split()))
    return Outcome(scan, observed, warnings + judge_subject(predictor, scan))


def see(predictor: Predictor, source: Source) -> tuple[Observed, int]:
    """See the evenly spaced windows of one run.

    The number is that of the volumes that are left after denoising, in whole time patches.

    Raises
    ------
    InputError
        When the run cannot be used, or what the model gives of it is not finite.
    """
    with scan_windows(predictor, source) as (windows, n_volumes):
        of_run = windows.spaced(predictor.finetune.evaluation_windows)
        size = predictor.finetune.batch_size
        observed = observe_run(predictor.network, windows, of_run, size, predictor.grid)
    _refuse_unless_finite(observed, str(source.bold))
    return observed, n_volumes


def see_image(predictor: Predictor, image: Anatomical) -> Observed:
    """See one T1w image.

    Raises
    ------
    InputError
        When the image cannot be used, or what the model gives of it is not finite.
    """
    with image_windows(predictor, image) as windows:
        observed = observe_run(predictor.network, windows, windows.spaced(1), batch_size=1)
    _refuse_unless_finite(observed, str(image.t1w))
    return observed


def _refuse_unless_finite(observed: Observed, path: str) -> None:
    if not torch.isfinite(observed.values).all():
        raise InputError(f"{path}: the model gives no finite prediction of it")

"""Preprocess a subject without a container: motion, slice timing, registration, confounds.

This is not fMRIPrep, and its dataset description says so with all that is left out
(`neuromamba.ants_outputs`). What it does make has fMRIPrep's names and meanings, so that every
later stage reads it alike.

A run that cannot be used is left out with its reason, and the others go on; what is wrong with the
T1w or the template is wrong for all of them.
"""

from __future__ import annotations

from pathlib import Path

from tqdm import tqdm

from neuromamba.ants_anatomy import Anatomy, register_anatomy
from neuromamba.ants_outputs import Outputs, describe_dataset, write_anatomy
from neuromamba.ants_registration import require_ants
from neuromamba.ants_run import Job, preprocess_run
from neuromamba.ants_template import BrainTemplate, load_template
from neuromamba.config import Preprocess
from neuromamba.files import InputError
from neuromamba.raw_bids import RawSubject


def preprocess_subject(
    bids: Path, subject: RawSubject, output: Path, work: Path, space: str, settings: Preprocess
) -> dict[str, str]:
    """Preprocess all runs of a subject.

    Parameters
    ----------
    bids
        The raw dataset.
    subject
        The subject and its runs.
    output
        Folder for the derivatives: `sub-XX` and `dataset_description.json`.
    work
        Folder for what is in progress.
    space
        Of the template, as files are named.
    settings
        The `preprocess` section.

    Returns
    -------
    dict
        Why runs were left out, by their names.

    Raises
    ------
    InputError
        When ANTsPy is not installed, the template cannot be used, or the subject's T1w cannot.
    """
    require_ants()
    work.mkdir(parents=True, exist_ok=True)
    template = load_template(settings.ants, space)
    grid = template.output_grid(settings.ants.voxel_size)
    outputs = Outputs(bids, output, space, settings.ants.voxel_size)
    anatomy = _anatomy(subject, template, settings, work)
    if anatomy is not None:
        write_anatomy(outputs, anatomy, subject, template, grid)
    job = Job(bids, work, settings, template, grid, anatomy, outputs)
    left_out = {}
    for run in tqdm(subject.runs, desc=subject.name, unit="run"):
        try:
            preprocess_run(job, run)
        except InputError as error:
            left_out[run.name] = str(error)
    describe_dataset(output, template)
    return left_out


def _anatomy(
    subject: RawSubject, template: BrainTemplate, settings: Preprocess, work: Path
) -> Anatomy | None:
    """The subject's first T1w, unless runs go straight to the template."""
    wanted = settings.ants.registration
    if wanted == "t1w" and not subject.t1w:
        raise InputError(
            f"{subject.name} has no T1w, and preprocess.ants.registration is t1w; add one, or set "
            "it to auto or epi"
        )
    if wanted == "epi" or not subject.t1w or (wanted == "auto" and template.t1w is None):
        return None
    return register_anatomy(subject.t1w[0], template, work)

"""Names, images and sidecars of what the `ants` engine writes: fMRIPrep's names, its own words."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel
import numpy as np

from neuromamba import __version__
from neuromamba.ants_alignment import MIN_OVERLAP, Alignment, rigid_matrix
from neuromamba.ants_anatomy import MIN_CORRELATION, Anatomy
from neuromamba.ants_registration import warp
from neuromamba.ants_template import BrainTemplate, Grid
from neuromamba.files import write_json
from neuromamba.raw_bids import RawRun, RawSubject
from neuromamba.resample_series import write_image

NAME = "NeuroMamba ants engine"
LEFT_OUT = (
    "susceptibility distortion correction",
    "surfaces and other FreeSurfer outputs",
    "boundary-based registration (BBR)",
    "ICA-AROMA",
    "combination of echoes",
    "segmentation of the subject's own T1w (tissues are the template's probability maps)",
    "temporal CompCor, edge regressors and crown regressors",
    "averaging of several T1w images (the first is used)",
    "T2w images",
    "CIFTI outputs",
    "visual reports",
)
DESCRIPTION = (
    "This is NOT fMRIPrep. Files and columns have fMRIPrep's names and meanings, and come from a "
    "simpler pipeline: N4 bias correction, rigid registration of the run to the T1w and SyN of the "
    "T1w to the template by ANTs, rigid motion estimation, slice timing by cubic B-splines, one "
    "composed interpolation, and confounds in the template's space. It leaves out: "
    + "; ".join(LEFT_OUT)
    + "."
)


@dataclass(frozen=True)
class Outputs:
    """Where a subject's files go."""

    bids: Path
    root: Path
    space: str
    voxel_size: float

    @property
    def version(self) -> str:
        """Entities of files in the template's space."""
        return f"space-{self.space}_res-{self.voxel_size:g}".replace(".", "p")

    def func(self, run: RawRun, ending: str) -> Path:
        """A file of a run in the template's space."""
        return self._folder(run) / f"{run.name}_{self.version}_{ending}"

    def confounds(self, run: RawRun, suffix: str) -> Path:
        """The run's table of confounds, or its sidecar."""
        return self._folder(run) / f"{run.name}_desc-confounds_timeseries{suffix}"

    def anat(self, t1w: Path, ending: str, standard: bool = False) -> Path:
        """A file of a T1w image, in its own space or the template's."""
        stem = t1w.name.split("_T1w.")[0]
        folder = self.root / t1w.parent.relative_to(self.bids)
        return folder / "_".join([stem, *([self.version] if standard else []), ending])

    def source(self, path: Path) -> str:
        """A raw file as a BIDS URI."""
        return f"bids:raw:{path.relative_to(self.bids).as_posix()}"

    def _folder(self, run: RawRun) -> Path:
        return self.root / run.bold[0].parent.relative_to(self.bids)


def write_anatomy(
    outputs: Outputs, anatomy: Anatomy, subject: RawSubject, template: BrainTemplate, grid: Grid
) -> None:
    """Write the T1w and its brain mask, in its own space and in the template's."""
    own = Grid(anatomy.mask.shape, anatomy.image.affine)
    empty = nibabel.Nifti1Image(np.zeros(grid.shape, np.float32), grid.affine)
    moved = warp(anatomy.image, empty, anatomy.to_template.forward)
    inside = template.on(grid, template.mask)
    source = outputs.source(anatomy.source)
    for standard, where, image, mask in (
        (False, own, anatomy.image, anatomy.mask),
        (True, grid, moved, inside),
    ):
        target = outputs.anat(anatomy.source, "desc-preproc_T1w.nii.gz", standard)
        write_image(target, where, image.get_fdata(dtype=np.float32))
        brain = outputs.anat(anatomy.source, "desc-brain_mask.nii.gz", standard)
        write_image(brain, where, mask)
        write_json(
            outputs.anat(anatomy.source, "desc-preproc_T1w.json", standard),
            {
                "SkullStripped": False,
                "BiasCorrected": "N4",
                "Sources": [source],
                "NotUsed": [outputs.source(path) for path in subject.t1w[1:]],
                "CorrelationWithTemplate": round(anatomy.correlation, 4),
                "MinimumCorrelation": MIN_CORRELATION,
            },
        )
        write_json(
            outputs.anat(anatomy.source, "desc-brain_mask.json", standard),
            {
                "Type": "Brain",
                "Description": "The template's brain mask, carried over by the registration",
                "Sources": [source],
            },
        )


def bold_sidecar(
    outputs: Outputs,
    run: RawRun,
    repetition_time: float,
    start_time: float | None,
    alignment: Alignment,
    anatomy: Anatomy | None,
) -> dict[str, Any]:
    """What the run's sidecar says.

    `start_time` is the time in a volume that its slices were brought to, s; `None`: they were not.
    """
    timing = {} if start_time is None else {"StartTime": round(start_time, 6)}
    return {
        "RepetitionTime": repetition_time,
        "TaskName": run.entities.get("task"),
        "SkullStripped": False,
        "SliceTimingCorrected": start_time is not None,
        **timing,
        "Resolution": f"{outputs.voxel_size:g} mm isotropic",
        "Sources": [outputs.source(path) for path in run.bold],
        "Registration": {
            "Through": outputs.source(anatomy.source) if anatomy else "the template directly",
            "Method": "rigid, then affine and SyN" if anatomy else "affine and stiff SyN",
            "T1wToReference": rigid_matrix(alignment),
            "BrainOverlap": round(alignment.overlap, 4),
            "MinimumBrainOverlap": MIN_OVERLAP,
        },
        "GeneratedBy": f"{NAME} {__version__}; this is not fMRIPrep",
    }


def describe_dataset(output: Path, template: BrainTemplate) -> None:
    """Write `dataset_description.json`, which says what was done, and what was not."""
    write_json(
        output / "dataset_description.json",
        {
            "Name": "NeuroMamba ants engine: preprocessed scans",
            "BIDSVersion": "1.9.0",
            "DatasetType": "derivative",
            "GeneratedBy": [
                {"Name": NAME, "Version": __version__, "Description": DESCRIPTION},
            ],
            "SpatialReference": {template.space: template.name},
        },
    )

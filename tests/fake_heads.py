"""A raw BIDS subject made of the packaged template: a T1w head, and a run that moves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from scipy import ndimage
from scipy.spatial.transform import Rotation

SIZE = 5.0
STEP = 2.0
N_VOLUMES = 20
SPACE = "MNI152NLin2009aSym"


def write_template(folder: Path) -> dict[str, str]:
    """The packaged template on voxels of 5 mm, as files: settings for `ants.template`."""
    from nilearn import datasets

    folder.mkdir(parents=True, exist_ok=True)
    load = {
        "t1w": datasets.load_mni152_template,
        "mask": datasets.load_mni152_brain_mask,
        "gray_matter": datasets.load_mni152_gm_template,
        "white_matter": datasets.load_mni152_wm_template,
    }
    for name, function in load.items():
        image = function(resolution=1)
        smooth = ndimage.gaussian_filter(image.get_fdata(dtype=np.float32), SIZE / 2.355)
        affine = image.affine @ np.diag([SIZE, SIZE, SIZE, 1])
        nib.save(nib.Nifti1Image(smooth[::5, ::5, ::5], affine), folder / f"{name}.nii.gz")
    return {name: str(folder / f"{name}.nii.gz") for name in load}


def pose(translation: list[float], degrees: list[float]) -> np.ndarray:
    """A rigid motion about the origin, mm to mm."""
    matrix = np.eye(4)
    matrix[:3, :3] = Rotation.from_euler("xyz", degrees, degrees=True).as_matrix()
    matrix[:3, 3] = translation
    return matrix


class Head:
    """Someone whose brain is a rotated and scaled template: values at world coordinates.

    Outside the brain are 6 mm of dark skull and 6 mm of bright scalp.
    """

    def __init__(self, template: dict[str, str]):
        t1w, mask = nib.load(template["t1w"]), nib.load(template["mask"])
        brain = mask.get_fdata() > 0.5
        away = ndimage.distance_transform_edt(~brain) * SIZE
        tissue = np.where(brain, t1w.get_fdata() / t1w.get_fdata().max(), 0.05)
        self.t1w = np.where((away > 6) & (away <= 14), 0.6, np.where(away > 14, 0.0, tissue))
        # The other way round, as T2*: CSF is bright.
        self.bold = np.where(brain, 1.4 - tissue, 0.0)
        scaled = np.diag([1.06, 0.95, 1.04, 1])
        self.to_index = np.linalg.inv(mask.affine) @ np.linalg.inv(
            pose([3, -4, 5], [6, -4, 5]) @ scaled
        )

    def at(self, values: np.ndarray, shape: tuple[int, ...], affine: np.ndarray) -> np.ndarray:
        """(x, y, z) values on a grid in the head's world."""
        matrix = self.to_index @ affine
        return ndimage.affine_transform(values, matrix[:3, :3], matrix[:3, 3], shape, order=1)


def motion(n: int = N_VOLUMES) -> np.ndarray:
    """(t, 3) mm that the head has moved by: a drift, and a step."""
    time = np.arange(n)[:, None]
    return time / n * [0.6, -1.0, 0.4] + (time >= n // 2) * [0.9, 0.0, -1.2]


def write_subject(root: Path, template: dict[str, str], n_volumes: int = N_VOLUMES) -> Head:
    """`sub-01` with a T1w and a resting run with slice timing."""
    head = Head(template)
    shape, affine = (35, 43, 37), np.diag([SIZE, SIZE, SIZE, 1.0])
    affine[:3, 3] = [-85, -110, -80]
    anat, func = root / "sub-01" / "anat", root / "sub-01" / "func"
    anat.mkdir(parents=True)
    func.mkdir()
    nib.save(
        nib.Nifti1Image((head.at(head.t1w, shape, affine) * 800).astype(np.int16), affine),
        anat / "sub-01_T1w.nii.gz",
    )
    write_run(func / "sub-01_task-rest_bold", head, n_volumes)
    (root / "dataset_description.json").write_text('{"Name": "heads", "BIDSVersion": "1.9.0"}')
    return head


def write_run(stem: Path, head: Head, n_volumes: int, **sidecar: Any) -> None:
    """A run in a slanted field of view, first volume brighter, slices interleaved."""
    shape, affine = (34, 42, 29), np.diag([-SIZE, SIZE, SIZE, 1.0])
    affine[:3, 3] = [84, -104, -66]
    affine = pose([0, 0, 0], [8, 0, 0]) @ affine
    random = np.random.default_rng(0)
    still = head.at(head.bold, shape, affine) * 900
    breathing = 1 + 0.01 * np.sin(np.arange(n_volumes) * 0.9)
    volumes = []
    for k, shift in enumerate(motion(n_volumes)):
        moved = affine.copy()
        moved[:3, 3] -= shift
        volume = head.at(head.bold, shape, moved) * 900 * breathing[k]
        volumes.append(volume + 4 * random.standard_normal(shape) * (still > 0))
    volumes[0] = volumes[0] * 1.3
    data = np.stack(volumes, axis=-1).round().astype(np.int16)
    image = nib.Nifti1Image(data, affine)
    image.header.set_xyzt_units("mm", "sec")
    image.header.set_zooms((SIZE, SIZE, SIZE, STEP))
    nib.save(image, f"{stem}.nii.gz")
    times = np.argsort(np.argsort(np.arange(shape[2]) % 2, kind="stable")) * STEP / shape[2]
    content = {"RepetitionTime": STEP, "TaskName": "rest", "SliceTiming": times.tolist(), **sidecar}
    Path(f"{stem}.json").write_text(json.dumps(content))

"""Volumes of bad runs: each is left out with its reason, and too many stop the stage."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scans import affine_8mm, ball, make_config, series, write_index, write_run, write_scan

from neuromamba.files import InputError
from neuromamba.tables import read_table
from neuromamba.volumes import run_volumes

pytestmark = pytest.mark.usefixtures("small_blocks")


def truncate(row: dict[str, Any]) -> None:
    path = Path(row["bold"])
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])


def no_gzip(row: dict[str, Any]) -> None:
    Path(row["bold"]).write_bytes(b"text")


def three_d(row: dict[str, Any]) -> None:
    write_scan(Path(row["bold"]), series()[..., 0], affine_8mm())


def too_short(row: dict[str, Any]) -> None:
    write_scan(Path(row["bold"]), series(n_volumes=5), affine_8mm())


def nan_in_brain(row: dict[str, Any]) -> None:
    data = series()
    data[10, 12, 10, 7] = np.nan
    write_scan(Path(row["bold"]), data, affine_8mm())


def all_constant(row: dict[str, Any]) -> None:
    data = np.repeat(series()[..., :1], 20, axis=3)
    write_scan(Path(row["bold"]), data, affine_8mm())


def late_artefact(row: dict[str, Any]) -> None:
    data = series()
    data[10, 12, 10, 15] = 1e9
    write_scan(Path(row["bold"]), data, affine_8mm())


def mask_of_other_shape(row: dict[str, Any]) -> None:
    write_scan(Path(row["mask"]), np.ones((20, 24, 20), np.uint8), affine_8mm())


def mask_of_other_place(row: dict[str, Any]) -> None:
    affine = affine_8mm()
    affine[0, 3] += 4
    write_scan(Path(row["mask"]), np.ones((20, 24, 21), np.uint8), affine)


def empty_mask(row: dict[str, Any]) -> None:
    write_scan(Path(row["mask"]), np.zeros((20, 24, 21), np.uint8), affine_8mm())


def no_mask(row: dict[str, Any]) -> None:
    Path(row["mask"]).unlink()


def elsewhere(row: dict[str, Any]) -> None:
    affine = affine_8mm()
    affine[2, 3] = 500
    write_scan(Path(row["bold"]), series(), affine)
    write_scan(Path(row["mask"]), ball((20, 24, 21)).astype(np.uint8), affine)


BAD_RUNS = {
    truncate: "bold.nii.gz: is truncated",
    no_gzip: "bold.nii.gz: is not gzip",
    three_d: "bold.nii.gz: is 3D",
    too_short: r"has 5 volumes, fewer than volumes.min_volumes = 6",
    nan_in_brain: r"bold.nii.gz: 1 voxels of the brain mask are NaN or infinite in volume 7",
    all_constant: "bold.nii.gz: no voxel of the brain mask varies",
    late_artefact: "times the brain's SD from its mean",
    mask_of_other_shape: "mask.nii.gz: this mask has .* give the mask that was made with the run",
    mask_of_other_place: "mask.nii.gz: this mask's affine differs",
    empty_mask: "mask.nii.gz: this brain mask is empty",
    no_mask: "mask.nii.gz: does not exist",
    elsewhere: "is it in MNI space",
}


@pytest.mark.parametrize("spoil", BAD_RUNS, ids=lambda spoil: spoil.__name__)
def test_a_bad_run_is_left_out_and_the_others_go_on(tmp_path: Path, spoil: Any) -> None:
    rows = [write_run(tmp_path, f"sub-{i:02}", series(seed=i)) for i in range(1, 4)]
    spoil(rows[1])
    config = make_config(tmp_path, compute={"max_excluded": 0.5})
    layout = write_index(config, rows)
    run_volumes(config, "toy", 0)
    manifest = read_table(layout.manifest("volumes", 0), dtype={"run": str}).set_index("run")
    assert manifest["reason"].isna().tolist() == [True, False, True]
    assert pytest.approx(20) == manifest.loc["sub-03", "n_volumes"]
    reason = manifest.loc["sub-02", "reason"]
    with pytest.raises(InputError, match=BAD_RUNS[spoil]):
        raise InputError(reason)
    assert sorted(path.name for path in layout.array("volumes", "x").parent.iterdir()) == [
        "batch-0.tsv",
        "sub-01.zarr",
        "sub-03.zarr",
    ]


def test_the_stage_fails_when_too_many_runs_are_bad(tmp_path: Path) -> None:
    rows = [write_run(tmp_path, f"sub-{i:02}", series(seed=i)) for i in (1, 2)]
    truncate(rows[0])
    config = make_config(tmp_path)
    layout = write_index(config, rows)
    with pytest.raises(InputError, match="1 of 2 runs cannot be used"):
        run_volumes(config, "toy", 0)
    assert not layout.manifest("volumes", 0).exists()

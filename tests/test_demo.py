"""The synthetic dataset: its files are valid, and say the same as each other."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from neuromamba import demo, demo_anatomy, demo_brain, demo_signal
from neuromamba.anat_scan import find_anatomicals
from neuromamba.bids import index_runs
from neuromamba.config import Dataset
from neuromamba.demo import write_demo
from neuromamba.demo_brain import NETWORKS, PARCELS
from neuromamba.files import InputError, digest_file
from neuromamba.participants import read_participants
from neuromamba.tables import read_table

SUBJECTS, VOLUMES = 4, 70


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo") / "data"
    write_demo(folder, subjects=SUBJECTS, volumes=VOLUMES, voxel_size=8.0)
    return folder


def contents(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): digest_file(path) for path in files}


def dataset(folder: Path) -> Dataset:
    return Dataset(
        derivatives=str(folder),
        participants={"file": str(folder / "participants.tsv"), "site_column": "site"},
        targets={
            "sex": {"kind": "classification", "column": "sex", "classes": {"F": "F", "M": "M"}},
            "age": {"kind": "regression", "column": "age"},
        },
    )


# --- Files --------------------------------------------------------------------------------------


def test_the_bids_validator_finds_no_error(folder: Path) -> None:
    beside_python = Path(sys.executable).with_name("bids-validator-deno")
    command = str(beside_python) if beside_python.exists() else shutil.which("bids-validator-deno")
    if command is None:
        pytest.skip("bids-validator-deno is not installed (it is in the extra `dev`)")
    result = subprocess.run(
        [command, "--format", "json", str(folder)], capture_output=True, text=True, check=False
    )
    report = json.loads(result.stdout)
    errors = [i for i in report["issues"]["issues"] if i["severity"] == "error"]
    assert errors == []
    assert len(report["summary"]["subjects"]) == SUBJECTS
    assert result.returncode == 0


def test_the_same_arguments_give_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    write_demo(tmp_path / "again", subjects=SUBJECTS, volumes=VOLUMES, voxel_size=8.0)
    assert contents(tmp_path / "again") == contents(folder)
    write_demo(tmp_path / "other", subjects=SUBJECTS, volumes=VOLUMES, voxel_size=8.0, seed=1)
    bold = next(name for name in contents(folder) if name.endswith("bold.nii.gz"))
    assert contents(tmp_path / "other")[bold] != contents(folder)[bold]


def test_the_index_finds_every_run(folder: Path) -> None:
    table = index_runs(dataset(folder))
    assert list(table["run"]) == [f"sub-0{i}_task-rest" for i in range(1, SUBJECTS + 1)]
    assert table["reason"].isna().all()
    assert table["confounds"].notna().all()
    assert list(table["repetition_time"]) == [2.0] * SUBJECTS
    assert list(table["n_volumes"]) == [VOLUMES] * SUBJECTS
    people = read_participants(dataset(folder))
    assert set(people.index) == set(table["subject"])
    assert people.notna().all(axis=None)


def test_the_images_are_what_fmriprep_would_write(folder: Path) -> None:
    (path,) = (folder / "sub-01" / "func").glob("*_bold.nii.gz")
    bold = nib.load(path)
    mask = nib.load(str(path).replace("preproc_bold", "brain_mask"))
    inside = np.asarray(mask.dataobj) > 0
    data = bold.get_fdata()
    assert bold.shape == (*mask.shape, VOLUMES)
    assert np.array_equal(bold.affine, mask.affine)
    assert tuple(bold.affine[:3, 3]) == (-96.5, -132.5, -78.5)
    assert bold.header.get_zooms() == (8, 8, 8, 2)
    assert bold.header.get_xyzt_units() == ("mm", "sec")
    assert not data[~inside].any()
    amplitude = data[inside].std(axis=1) / data[inside].mean(axis=1)
    assert 0.01 < np.median(amplitude) < 0.03
    millilitres = inside.sum() * 8**3 / 1000
    assert millilitres == pytest.approx(1885, rel=0.03)  # the brain mask of the template


def test_the_confounds_belong_to_the_bold(folder: Path) -> None:
    (path,) = (folder / "sub-02" / "func").glob("*_bold.nii.gz")
    (table_path,) = path.parent.glob("*_timeseries.tsv")
    table = read_table(table_path)
    data = nib.load(path).get_fdata()
    series = data[data.any(axis=-1)].T
    assert len(table) == VOLUMES
    assert np.allclose(table["global_signal"], series.mean(axis=1), rtol=1e-4)
    dvars = np.sqrt((np.diff(series, axis=0) ** 2).mean(axis=1))
    assert np.allclose(table["dvars"][1:], dvars, rtol=5e-3)  # the BOLD is stored rounded
    motion = table[["trans_x", "trans_y", "trans_z"]].to_numpy()
    turning = 50 * table[["rot_x", "rot_y", "rot_z"]].to_numpy()
    moved = np.abs(np.diff(np.hstack([motion, turning]), axis=0)).sum(axis=1)
    assert np.allclose(table["framewise_displacement"][1:], moved, atol=1e-4)
    empty_first = ["dvars", "std_dvars", "framewise_displacement", "trans_x_derivative1"]
    assert table.loc[0, empty_first].isna().all()
    assert table.isna().sum().sum() == table.loc[0].isna().sum()
    explained = json.loads(table_path.with_suffix(".json").read_text())
    assert set(explained) == set(table.columns)


def test_the_atlas_is_on_the_grid_of_the_bold(folder: Path) -> None:
    atlas = folder / "tpl-MNI152NLin2009cAsym" / "anat" / "tpl-MNI152NLin2009cAsym_atlas-demo_dseg"
    image = nib.load(f"{atlas}.nii.gz")
    labels = np.asarray(image.dataobj)
    (mask,) = (folder / "sub-01" / "func").glob("*_mask.nii.gz")
    assert np.array_equal(labels > 0, np.asarray(nib.load(mask).dataobj) > 0)
    table = read_table(f"{atlas}.tsv")
    assert list(table["index"]) == list(range(1, PARCELS + 1))
    assert set(np.unique(labels)) == {0, *table["index"]}
    assert set(table["network"]) == set(NETWORKS)
    x = nib.affines.apply_affine(image.affine, np.argwhere(labels > 0))[:, 0]
    assert (x[labels[labels > 0] <= PARCELS // 2] < 0).all()


def test_runs_are_numbered_when_there_are_several(tmp_path: Path) -> None:
    write_demo(tmp_path / "d", subjects=1, volumes=10, voxel_size=12.0, runs=2)
    table = index_runs(Dataset(derivatives=str(tmp_path / "d")))
    assert list(table["run"]) == ["sub-01_task-rest_run-1", "sub-01_task-rest_run-2"]
    first, second = (digest_file(path) for path in table["bold"])
    assert first != second


def test_an_earlier_demo_is_replaced_as_a_whole(tmp_path: Path) -> None:
    for subjects in (3, 2):
        write_demo(tmp_path / "d", subjects=subjects, volumes=10, voxel_size=12.0)
    assert sorted(p.name for p in (tmp_path / "d").glob("sub-*")) == ["sub-01", "sub-02"]
    assert len(list(tmp_path.iterdir())) == 1


def test_somebody_elses_folder_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "dataset_description.json").write_text('{"Name": "mine"}')
    with pytest.raises(InputError, match="exists and is not a demo dataset"):
        write_demo(tmp_path, subjects=1, volumes=10)
    assert [path.name for path in tmp_path.iterdir()] == ["dataset_description.json"]


def test_a_failure_on_the_way_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(demo, "write_run", fail)
    with pytest.raises(OSError, match="No space left"):
        write_demo(tmp_path / "d", subjects=1, volumes=10, voxel_size=12.0)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "wrong", [{"subjects": 0}, {"volumes": 2}, {"voxel_size": 0.0}, {"repetition_time": 2000.0}]
)
def test_numbers_out_of_range(tmp_path: Path, wrong: dict[str, float]) -> None:
    with pytest.raises(InputError, match=f"{next(iter(wrong))} must be between"):
        write_demo(tmp_path / "d", **wrong)  # type: ignore[arg-type]


def test_the_truth_is_written_down(folder: Path) -> None:
    truth = json.loads((folder / "truth.json").read_text())
    assert truth["sex_on_logit_coherence"] == demo_signal.SEX
    assert truth["age_on_logit_coherence_per_30_years"] == demo_signal.AGE
    assert [row["participant_id"] for row in truth["subjects"]] == [
        f"sub-0{i}" for i in range(1, SUBJECTS + 1)
    ]
    assert all(0 < c < 1 for row in truth["subjects"] for c in row["coherence"])


def test_every_subject_has_a_t1w_image_on_the_grid_of_the_bold(folder: Path) -> None:
    bold = nib.load(next(folder.rglob("sub-01*_bold.nii.gz")))
    found = find_anatomicals(dataset(folder))
    assert [(one.subject, one.reason) for one in found] == [
        (f"sub-{i + 1:02d}", None) for i in range(SUBJECTS)
    ]
    image, mask = nib.load(found[0].t1w), nib.load(found[0].mask)
    assert image.shape == mask.shape == bold.shape[:3]
    assert np.array_equal(image.affine, bold.affine)
    assert (image.get_fdata()[mask.get_fdata() == 0] == 0).all()
    assert (image.get_fdata()[mask.get_fdata() == 1] > 0).all()


def test_anatomy_tells_the_share_of_connectivity_that_it_is_said_to(monkeypatch) -> None:
    monkeypatch.setattr(demo_anatomy, "FIELD", 0.0)
    brain = demo_brain.load_brain(8.0)
    people = demo_signal.draw_subjects(400, 0)
    z, told, seen = [], [], []
    for number, person in enumerate(people):
        rng = np.random.default_rng([7, number])
        connectivity = demo_signal.draw_connectivity(person, rng)
        image, tissue = demo_anatomy.draw_t1w(brain, person, connectivity, rng)
        z.append(demo_anatomy.deviations(connectivity))
        told.append(tissue)
        ratio = image / (brain.intensity * demo_signal.SITES[person.site].scale)
        network = brain.network[brain.parcel]
        seen.append([ratio[network == k].mean() for k in range(len(NETWORKS))])
    z, told, seen = (np.array(one) for one in (z, told, seen))
    assert np.allclose(z.mean(0), 0, atol=0.2)
    assert np.allclose(z.std(0), 1, atol=0.1)
    for k in range(len(NETWORKS)):
        assert np.corrcoef(told[:, k], z[:, k])[0, 1] ** 2 == pytest.approx(
            demo_anatomy.SHARE, abs=0.08
        )
        assert np.corrcoef(told[:, k], seen[:, k])[0, 1] > 0.97


def test_the_receive_field_is_large_and_smooth_and_tells_nothing_of_a_subject(monkeypatch) -> None:
    brain = demo_brain.load_brain(8.0)
    fields, z = [], []
    for number, person in enumerate(demo_signal.draw_subjects(400, 0)):
        connectivity = demo_signal.draw_connectivity(person, np.random.default_rng([7, number]))
        images = {}
        for field in (0.3, 0.0):
            monkeypatch.setattr(demo_anatomy, "FIELD", field)
            rng = np.random.default_rng([8, number])
            images[field], _ = demo_anatomy.draw_t1w(brain, person, connectivity, rng)
        fields.append(np.log(images[0.3] / images[0.0]))
        z.append(demo_anatomy.deviations(connectivity))
    fields, z = np.array(fields), np.array(z)
    assert fields.std(axis=0).mean() == pytest.approx(0.3, rel=0.1)
    near = np.linalg.norm(brain.mm - brain.mm[0], axis=1) < 13
    assert np.corrcoef(fields[:, near].T)[0].min() > 0.95
    told = np.corrcoef(fields[:, :: len(brain.mm) // 50].T, z.T)[: -z.shape[1], -z.shape[1] :]
    assert np.abs(told).max() < 4 / np.sqrt(400)

"""The ants engine on a synthetic head: where things end up, what is refused, and the real scans."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
from fake_heads import (
    N_VOLUMES,
    SIZE,
    SPACE,
    STEP,
    Head,
    motion,
    write_run,
    write_subject,
    write_template,
)
from nilearn.interfaces.fmriprep import load_confounds
from scipy import ndimage

from neuromamba.ants_alignment import find_brain
from neuromamba.ants_engine import preprocess_subject
from neuromamba.ants_template import load_template
from neuromamba.config import Dataset, Preprocess
from neuromamba.files import InputError
from neuromamba.publish import verify_subject
from neuromamba.raw_bids import RawSubject, find_raw_subjects

ants = pytest.importorskip("ants")
STEM = f"sub-01/func/sub-01_task-rest_space-{SPACE}_res-5"


@dataclass
class Case:
    """A subject, and what became of it."""

    bids: Path
    template: dict[str, str]
    output: Path
    left_out: dict[str, str]

    def settings(self, **changes: Any) -> Preprocess:
        options = {"template": self.template, "voxel_size": SIZE, **changes}
        return Preprocess.model_validate({"engine": "ants", "threads": 1, "ants": options})

    def subject(self) -> RawSubject:
        return find_raw_subjects(Dataset(bids=str(self.bids), derivatives="x", space=SPACE))[0]

    def run(self, output: Path, **changes: Any) -> dict[str, str]:
        work = output.with_name("work")
        settings = self.settings(**changes)
        return preprocess_subject(self.bids, self.subject(), output, work, SPACE, settings)

    def image(self, name: str) -> Any:
        return nib.load(self.output / name)


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    """A head with a good run and five that cannot be used, through the whole engine."""
    folder = tmp_path_factory.mktemp("ants")
    template = write_template(folder / "template")
    head = write_subject(folder / "bids", template)
    func = folder / "bids" / "sub-01" / "func"
    write_run(func / "sub-01_task-short_bold", head, 4)
    for echo in (1, 2):
        shutil.copy(
            func / "sub-01_task-rest_bold.nii.gz",
            func / f"sub-01_task-echoes_echo-{echo}_bold.nii.gz",
        )
    whole = (func / "sub-01_task-rest_bold.nii.gz").read_bytes()
    (func / "sub-01_task-cut_bold.nii.gz").write_bytes(whole[: len(whole) // 2])
    shutil.copy(func / "sub-01_task-rest_bold.json", func / "sub-01_task-cut_bold.json")
    for task, change in (
        ("times", {"SliceTiming": ["a", [0.5]]}),
        ("slow", {"RepetitionTime": 99}),
    ):
        shutil.copy(func / "sub-01_task-rest_bold.nii.gz", func / f"sub-01_task-{task}_bold.nii.gz")
        sidecar = json.loads((func / "sub-01_task-rest_bold.json").read_text())
        (func / f"sub-01_task-{task}_bold.json").write_text(json.dumps(sidecar | change))
    case = Case(folder / "bids", template, folder / "out", {})
    case.left_out = case.run(case.output)
    return case


def agreement(case: Case, bold: np.ndarray, mask: np.ndarray) -> float:
    """Correlation of the mean volume with what it should be; a voxel off, it is 0.74.

    Without the outermost voxels, which are part brain.
    """
    inner = ndimage.binary_erosion(mask, iterations=2)
    return float(np.corrcoef(bold.mean(axis=-1)[inner], Head(case.template).bold[inner])[0, 1])


def test_the_run_is_whole_and_the_others_are_left_out_with_reasons(case: Case) -> None:
    tasks = ("short", "echoes", "cut", "times", "slow")
    assert set(case.left_out) == {f"sub-01_task-{task}" for task in tasks}
    assert "it is not a list of numbers" in case.left_out["sub-01_task-times"]
    assert "RepetitionTime must be seconds" in case.left_out["sub-01_task-slow"]
    assert "4 volumes, and at least 10" in case.left_out["sub-01_task-short"]
    assert "2 echoes" in case.left_out["sub-01_task-echoes"]
    assert "fMRIPrep" in case.left_out["sub-01_task-echoes"]
    assert "truncated" in case.left_out["sub-01_task-cut"]
    rest = [run for run in case.subject().runs if run.name == "sub-01_task-rest"]
    assert verify_subject(case.output, replace(case.subject(), runs=tuple(rest)), SPACE) == {}
    assert not list(case.output.rglob("*task-cut*"))
    assert not list(case.output.rglob(".tmp-*"))


def test_files_have_fmripreps_names(case: Case) -> None:
    files = {str(path.relative_to(case.output)) for path in case.output.rglob("*.*")}
    images = {
        f"{STEM}_{name}.nii.gz" for name in ("desc-preproc_bold", "desc-brain_mask", "boldref")
    }
    for version in ("", f"_space-{SPACE}_res-5"):
        for kind in ("preproc_T1w", "brain_mask"):
            images.add(f"sub-01/anat/sub-01{version}_desc-{kind}.nii.gz")
    assert {name for name in files if name.endswith(".nii.gz")} == images
    assert {
        "dataset_description.json",
        f"{STEM}_desc-preproc_bold.json",
        "sub-01/func/sub-01_task-rest_desc-confounds_timeseries.tsv",
        "sub-01/func/sub-01_task-rest_desc-confounds_timeseries.json",
    } <= files


def test_the_brain_lies_where_the_templates_does(case: Case) -> None:
    template = load_template(case.settings().ants, SPACE)
    t1w = case.image(f"sub-01/anat/sub-01_space-{SPACE}_res-5_desc-preproc_T1w.nii.gz").get_fdata()
    mask = case.image(f"{STEM}_desc-brain_mask.nii.gz").get_fdata() > 0
    bold = case.image(f"{STEM}_desc-preproc_bold.nii.gz").get_fdata()
    brain = template.on(template.output_grid(SIZE), template.mask)
    assert np.corrcoef(t1w[brain], template.t1w[brain])[0, 1] > 0.9
    assert agreement(case, bold, mask) > 0.9
    assert mask.sum() > 0.7 * brain.sum()
    assert not mask[~brain].any()
    assert bold[mask].min() > 0


def test_the_t1w_mask_is_its_brain(case: Case) -> None:
    head = case.image("sub-01/anat/sub-01_desc-preproc_T1w.nii.gz")
    mask = case.image("sub-01/anat/sub-01_desc-brain_mask.nii.gz").get_fdata() > 0
    raw = nib.load(case.bids / "sub-01" / "anat" / "sub-01_T1w.nii.gz")
    np.testing.assert_allclose(head.affine, raw.affine)
    volume = mask.sum() * SIZE**3 / 1e6
    expected = (
        (nib.load(case.template["mask"]).get_fdata() > 0.5).sum()
        * SIZE**3
        / 1e6
        * 1.06
        * 0.95
        * 1.04
    )
    assert volume == pytest.approx(expected, rel=0.06)


def test_interpolation_undoes_the_motion(case: Case) -> None:
    table = pd.read_csv(
        case.output / "sub-01" / "func" / "sub-01_task-rest_desc-confounds_timeseries.tsv",
        sep="\t",
        na_values="n/a",
    )
    found = table[["trans_x", "trans_y", "trans_z"]].to_numpy()
    np.testing.assert_allclose(
        (found - found.mean(axis=0))[1:], (motion() - motion()[1:].mean(axis=0))[1:], atol=0.25
    )
    mask = case.image(f"{STEM}_desc-brain_mask.nii.gz").get_fdata() > 0
    bold = case.image(f"{STEM}_desc-preproc_bold.nii.gz").get_fdata()[mask][:, 1:]
    raw = nib.load(case.bids / "sub-01" / "func" / "sub-01_task-rest_bold.nii.gz").get_fdata()
    inside = raw.mean(axis=-1) > 300
    assert np.median(bold.std(axis=1)) < 0.75 * np.median(raw[inside][:, 1:].std(axis=1))


def test_the_start_is_found_and_nilearn_loads_every_strategy(case: Case) -> None:
    table = pd.read_csv(
        case.output / "sub-01" / "func" / "sub-01_task-rest_desc-confounds_timeseries.tsv", sep="\t"
    )
    assert len(table) == N_VOLUMES
    assert table["non_steady_state_outlier00"].tolist() == [1] + [0] * (N_VOLUMES - 1)
    assert table.loc[N_VOLUMES // 2, "framewise_displacement"] > 1.5
    for compcor in ("anat_combined", "anat_separated"):
        loaded, sample = load_confounds(
            str(case.output / f"{STEM}_desc-preproc_bold.nii.gz"),
            ("motion", "wm_csf", "global_signal", "high_pass", "compcor", "scrub"),
            scrub=0,
            compcor=compcor,
        )
        assert loaded.shape[1] > 24 + 2 + 1
        assert 0 not in sample
        assert N_VOLUMES // 2 not in sample
    sidecar = json.loads((case.output / f"{STEM}_desc-preproc_bold.json").read_text())
    assert sidecar["NonSteadyStateVolumes"] == 1


def test_sidecars_say_what_was_done(case: Case) -> None:
    sidecar = json.loads((case.output / f"{STEM}_desc-preproc_bold.json").read_text())
    assert sidecar["RepetitionTime"] == STEP
    assert sidecar["SliceTimingCorrected"] is True
    assert 0.8 < sidecar["StartTime"] < 1.2
    assert sidecar["Registration"]["BrainOverlap"] > 0.85
    assert sidecar["Sources"] == ["bids:raw:sub-01/func/sub-01_task-rest_bold.nii.gz"]
    assert case.image(f"{STEM}_desc-preproc_bold.nii.gz").header.get_zooms()[3] == STEP
    made = json.loads((case.output / "dataset_description.json").read_text())["GeneratedBy"][0]
    assert made["Name"] == "NeuroMamba ants engine"
    assert "NOT fMRIPrep" in made["Description"]
    assert "susceptibility distortion correction" in made["Description"]


def test_a_second_time_gives_the_same_bytes(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sought: list[str] = []

    def counted(reference: Any, where: Path) -> Any:
        sought.append(where.name)
        return find_brain(reference, where)

    monkeypatch.setattr("neuromamba.ants_run.find_brain", counted)
    case.run(tmp_path / "out")
    assert sought.count("sub-01_task-rest_bold.nii.gz") == 1
    files = sorted(path.relative_to(case.output) for path in case.output.rglob("*.*"))
    assert files == sorted(p.relative_to(tmp_path / "out") for p in (tmp_path / "out").rglob("*.*"))
    for name in files:
        if (case.output / name).is_file():
            assert (case.output / name).read_bytes() == (tmp_path / "out" / name).read_bytes(), name


def test_without_a_t1w_runs_go_straight_to_the_template(case: Case, tmp_path: Path) -> None:
    bids = tmp_path / "bids"
    shutil.copytree(
        case.bids,
        bids,
        ignore=shutil.ignore_patterns("anat", "*short*", "*echo*", "*cut*", "*times*", "*slow*"),
    )
    alone = Case(bids, case.template, tmp_path / "out", {})
    assert alone.run(alone.output, slice_timing=False, motion_parameters=6) == {}
    assert not list(alone.output.rglob("anat"))
    mask = alone.image(f"{STEM}_desc-brain_mask.nii.gz").get_fdata() > 0
    bold = alone.image(f"{STEM}_desc-preproc_bold.nii.gz").get_fdata()
    assert agreement(case, bold, mask) > 0.9
    sidecar = json.loads((alone.output / f"{STEM}_desc-preproc_bold.json").read_text())
    assert sidecar["SliceTimingCorrected"] is False
    assert sidecar["Registration"]["Through"] == "the template directly"
    with pytest.raises(InputError, match=r"sub-01 has no T1w.*auto or epi"):
        alone.run(tmp_path / "other", registration="t1w")


def test_a_t1w_without_a_head_is_refused(case: Case, tmp_path: Path) -> None:
    bids = tmp_path / "bids"
    shutil.copytree(case.bids, bids)
    path = bids / "sub-01" / "anat" / "sub-01_T1w.nii.gz"
    noise = np.random.default_rng(0).integers(0, 500, (35, 43, 37)).astype(np.int16)
    nib.save(nib.Nifti1Image(noise, nib.load(path).affine), path)
    with pytest.raises(InputError, match=r"sub-01_T1w\.nii\.gz: (correlates|no brain)"):
        Case(bids, case.template, tmp_path / "out", {}).run(tmp_path / "out")


def test_the_packaged_template_is_only_for_its_space() -> None:
    with pytest.raises(InputError, match="set space: MNI152NLin2009aSym in the dataset YAML"):
        load_template(Preprocess().ants, "MNI152NLin2009cAsym")


def test_tissues_of_the_packaged_template() -> None:
    template = load_template(Preprocess().ants, SPACE)
    ml = {name: mask.sum() * 8 / 1000 for name, mask in template.tissues.items()}
    assert 60 < ml["white_matter"] < 150
    assert 3 < ml["csf"] < 15
    assert not (template.tissues["csf"] & template.tissues["white_matter"]).any()
    assert (
        template.t1w[template.tissues["csf"]].mean()
        < 0.5
        < 0.8
        < template.t1w[template.tissues["white_matter"]].mean()
    )
    grid = template.output_grid(2.0)
    assert grid.shape == (99, 117, 95)
    np.testing.assert_array_equal(grid.affine[:3, 3], [-98, -134, -72])


def test_grids_too_coarse_to_follow_motion_are_refused(real_data: Path, tmp_path: Path) -> None:
    bids = tmp_path / "bids"
    func = bids / "sub-001" / "func"
    func.mkdir(parents=True)
    name = "sub-001_task-objectviewing_run-01_bold.nii.gz"
    shutil.copy(real_data / "haxby_25mm" / name, func)
    (bids / "task-objectviewing_bold.json").write_text('{"RepetitionTime": 2.5}')
    subject = find_raw_subjects(Dataset(bids=str(bids), derivatives="x", space=SPACE))[0]
    left_out = preprocess_subject(
        bids, subject, tmp_path / "out", tmp_path / "work", SPACE, Preprocess()
    )
    assert list(left_out) == ["sub-001_task-objectviewing_run-01"]
    assert f"{name}: " in left_out["sub-001_task-objectviewing_run-01"]

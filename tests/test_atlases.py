"""Atlases: names of regions, spaces, fetching by name without a network, and parcels of our own."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import nibabel
import numpy as np
import pandas as pd
import pytest
import requests
from nilearn import datasets
from nilearn.datasets import load_mni152_brain_mask

from neuromamba import atlases
from neuromamba.atlas_files import read_atlas
from neuromamba.atlases import FETCHERS, atlas_digest, is_named, open_atlas
from neuromamba.files import InputError, digest_file
from neuromamba.parcellation import count_voxels, make_cubes, make_parcels, resample_labels

SPACE = "MNI152NLin6Asym"


def write_labels(path: Path, labels: np.ndarray | None = None) -> Path:
    """Three regions, 2, 5 and 9, in a row."""
    if labels is None:
        labels = np.zeros((6, 4, 4), np.int16)
        labels[:2], labels[2:4], labels[4:] = 2, 5, 9
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(labels, np.diag([4.0, 4, 4, 1])), path)
    return path


# --- Names of regions ---------------------------------------------------------------------------

TSV = "index\tname\n2\tInsula\n9\tCaudate\n"
CSV = "Index,Name,color\n2,Insula,red\n9,Caudate,blue\n"


@pytest.mark.parametrize(
    ("image", "table", "text"),
    [
        ("mine.nii.gz", "mine.tsv", TSV),
        ("mine.nii", "mine.csv", CSV),
        ("tpl-MNI_res-01_atlas-A_desc-B_dseg.nii.gz", "tpl-MNI_atlas-A_desc-B_dseg.tsv", TSV),
        ("tpl-MNI_res-01_atlas-A_dseg.nii.gz", "atlas-A_dseg.tsv", TSV),
        ("AAL116_space-MNI152NLin6_res-2.nii.gz", "aal116_ROI_labels.csv", CSV),
        ("mine.nii.gz", "labels.csv", CSV),
    ],
)
def test_regions_are_named_by_the_table_beside_the_atlas(
    tmp_path: Path, image: str, table: str, text: str
) -> None:
    path = write_labels(tmp_path / image)
    (tmp_path / "participants.tsv").write_text("index\tname\n2\tno region\n")
    (tmp_path / table).write_text(text)
    found = read_atlas(path)
    assert found.labels == ["Insula", "5", "Caudate"]
    assert found.names_from == table


def test_tables_of_other_atlases_are_left_alone(tmp_path: Path) -> None:
    path = write_labels(tmp_path / "tpl-MNI_atlas-A_desc-100_dseg.nii.gz")
    write_labels(tmp_path / "tpl-MNI_atlas-B_dseg.nii.gz")
    (tmp_path / "tpl-MNI_atlas-A_desc-200_dseg.tsv").write_text(TSV)
    (tmp_path / "tpl-MNI_atlas-A_desc-100_dseg.tsv").write_text("")  # a promise, not a table
    (tmp_path / "labels.csv").write_text(CSV)  # of which of the two?
    found = read_atlas(path)
    assert found.labels == ["2", "5", "9"]
    assert found.names_from is None


def test_a_table_without_the_bids_columns_gives_numbers(tmp_path: Path) -> None:
    path = write_labels(tmp_path / "cc400.nii.gz")
    (tmp_path / "CC400_labels.csv").write_text("ROI_number,volume\n2,10\n5,20\n9,30\n")
    assert read_atlas(path).labels == ["2", "5", "9"]


def test_names_are_made_unique(tmp_path: Path) -> None:
    path = write_labels(tmp_path / "a.nii.gz")
    (tmp_path / "a.tsv").write_text("index\tname\n2\tInsula\n5\tInsula\n9\tCaudate\n")
    assert read_atlas(path).labels == ["Insula (2)", "Insula (5)", "Caudate"]


@pytest.mark.parametrize("rows", ["2\tInsula\n2\tCaudate\n", "x\tInsula\n"])
def test_a_table_with_unusable_numbers_is_refused(tmp_path: Path, rows: str) -> None:
    path = write_labels(tmp_path / "a.nii.gz")
    (tmp_path / "a.tsv").write_text(f"index\tname\n{rows}")
    with pytest.raises(InputError, match=r"a\.tsv.*index"):
        read_atlas(path)


def test_the_published_atlases_are_named_by_their_tables(real_data: Path) -> None:
    aal = read_atlas(real_data / "atlas" / "AAL116_space-MNI152NLin6_res-2.nii.gz")
    assert aal.labels[0] == "Precentral_L"
    assert aal.labels[-1] == "Vermis_10"
    assert aal.space == "MNI152NLin6"
    cc400 = read_atlas(real_data / "atlas" / "cc400_roi_atlas_3mm.nii.gz")
    assert (cc400.labels[0], cc400.labels[-1], cc400.space) == ("1", "400", None)


# --- Space --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["tpl-MNI152NLin6Asym_atlas-A_dseg.nii.gz", "A_space-MNI152NLin6Asym.nii.gz"]
)
def test_another_mni_space_is_warned_of_and_the_same_is_not(
    tmp_path: Path, name: str, recwarn: pytest.WarningsRecorder
) -> None:
    atlas = str(write_labels(tmp_path / name))
    assert open_atlas(atlas, SPACE).space == SPACE
    assert not recwarn
    with pytest.warns(UserWarning, match="MNI152NLin6Asym.*MNI152NLin2009cAsym.*few mm"):
        open_atlas(atlas, "MNI152NLin2009cAsym")


@pytest.mark.parametrize("space", ["Talairach", "T1w", "MNIInfant"])
def test_a_space_that_is_no_neighbour_is_refused(tmp_path: Path, space: str) -> None:
    atlas = write_labels(tmp_path / f"A_space-{space}.nii.gz")
    with pytest.raises(InputError, match=f"is in {space}.*do not overlap"):
        open_atlas(str(atlas), SPACE)


def test_an_atlas_that_says_nothing_is_taken_as_it_is(
    tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    assert open_atlas(str(write_labels(tmp_path / "a.nii.gz")), SPACE).space is None
    assert not recwarn


# --- By name ------------------------------------------------------------------------------------


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data folder of nilearn's, and no network."""

    def refuse(*_: Any, **__: Any) -> None:
        raise requests.exceptions.ConnectionError("no network")

    monkeypatch.setattr(requests.Session, "send", refuse)
    monkeypatch.setenv("NILEARN_DATA", str(tmp_path / "nilearn"))
    monkeypatch.delenv("NILEARN_SHARED_DATA", raising=False)
    return tmp_path / "nilearn"


def test_what_nilearn_has_on_disk_needs_no_network(offline: Path) -> None:
    folder = offline / "schaefer_2018"
    labels = np.zeros((6, 4, 4), np.int16)
    labels[:2], labels[2:] = 1, 2
    image = write_labels(folder / "Schaefer2018_200Parcels_17Networks_order_FSLMNI152_2mm.nii.gz")
    image = write_labels(image, labels)
    rows = "1\t17Networks_LH_VisCent\t120\t18\t131\t0\n2\t17Networks_RH_VisCent\t120\t18\t132\t0\n"
    (folder / "Schaefer2018_200Parcels_17Networks_order.txt").write_text(rows)
    name = "nilearn:schaefer_2018?n_rois=200&yeo_networks=17&resolution_mm=2"
    found = open_atlas(name, SPACE)
    assert found.name == name
    assert found.labels == ["17Networks_LH_VisCent", "17Networks_RH_VisCent"]
    assert found.sha256 == digest_file(image)
    assert (found.space, found.names_from) == (SPACE, "nilearn")


def test_an_atlas_that_is_neither_on_disk_nor_to_be_had_is_told_of(offline: Path) -> None:
    with pytest.raises(InputError, match=r"NILEARN_DATA.*no network.*packaged:100"):
        open_atlas("nilearn:schaefer_2018?n_rois=200&resolution_mm=2", SPACE)


@pytest.mark.parametrize(
    ("atlas", "problem"),
    [
        ("nilearn:msdl", "there is no 'msdl'; nilearn's atlases here: aal, "),
        ("nilearn:aal?edition=3", "unknown option 'edition'; known here: version"),
        ("nilearn:schaefer_2018?n_rois=many", "n_rois must be a whole number"),
        ("nilearn:schaefer_2018?n_rois=401", "must be one of"),
        ("nilearn:schaefer_2018?n_rois", r"\?key=value"),
        ("nilearn:harvard_oxford", "atlas_name"),
        ("nilearn:destrieux_2009?lateralized=yes", "must be true or false"),
        ("packaged:many", "such as packaged:100"),
        ("packaged:99", "even number"),
        ("packaged:0", "even number"),
        ("packaged:4000", "even number"),
    ],
)
def test_a_name_that_means_nothing_is_refused(offline: Path, atlas: str, problem: str) -> None:
    assert is_named(atlas)
    with pytest.raises(InputError, match=problem):
        open_atlas(atlas, SPACE)
    assert not (offline / "schaefer_2018").exists() or not any(offline.rglob("*.nii.gz"))


def test_an_atlas_that_nilearn_makes_in_memory_is_digested_by_its_labels(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given: dict[str, Any] = {}

    def fetch(**options: Any) -> SimpleNamespace:
        given.update(options)
        data = np.arange(8, dtype=np.int32).reshape(2, 2, 2)
        lut = pd.DataFrame({"index": range(8), "name": [f"region {i}" for i in range(8)]})
        image = nibabel.Nifti1Image(data, np.eye(4))
        return datasets.atlas.Atlas(image, "made up", "deterministic", lut=lut)

    monkeypatch.setattr(datasets, "fetch_atlas_harvard_oxford", fetch)
    name = "nilearn:harvard_oxford?atlas_name=cort-maxprob-thr25-2mm&symmetric_split=true"
    found = open_atlas(name, SPACE)
    assert given == {"atlas_name": "cort-maxprob-thr25-2mm", "symmetric_split": True, "verbose": 0}
    assert found.labels == [f"region {i}" for i in range(1, 8)]
    assert len(found.sha256 or "") == 64


def test_a_probabilistic_atlas_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def fetch(**_: Any) -> SimpleNamespace:
        image = nibabel.Nifti1Image(np.ones((2, 2, 2, 3), np.float32), np.eye(4))
        return datasets.atlas.Atlas(image, "made up", "probabilistic", labels=["a", "b", "c"])

    monkeypatch.setattr(datasets, "fetch_atlas_juelich", fetch)
    with pytest.raises(InputError, match="one 3D image of labels"):
        open_atlas("nilearn:juelich?atlas_name=prob-2mm", SPACE)


def test_every_fetcher_is_one_of_nilearns_and_takes_its_options() -> None:
    import inspect

    for name, fetcher in FETCHERS.items():
        known = inspect.signature(getattr(datasets, f"fetch_atlas_{name}")).parameters
        assert {*fetcher.options, *fetcher.fixed} <= {*known}, name


class FakeTemplateFlow(ModuleType):
    """TemplateFlow's client over a folder."""

    def __init__(self, folder: Path) -> None:
        super().__init__("templateflow")
        self.api = self
        self.folder = folder
        self.asked: list[dict[str, Any]] = []

    def ls(self, template: str, **query: Any) -> list[Path]:
        self.asked.append({"template": template, **query})
        return sorted(self.folder.glob(f"tpl-{template}_*{query['extension']}"))

    def get(self, template: str, **query: Any) -> Path:
        return self.ls(template, **query)[0]


@pytest.fixture
def templateflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeTemplateFlow:
    fake = FakeTemplateFlow(tmp_path)
    monkeypatch.setitem(sys.modules, "templateflow", fake)
    return fake


def test_templateflow_is_asked_for_the_datasets_own_space(templateflow: FakeTemplateFlow) -> None:
    stem = f"tpl-{SPACE}_res-02_atlas-Schaefer2018_desc-100Parcels7Networks_dseg"
    write_labels(templateflow.folder / f"{stem}.nii.gz")
    (templateflow.folder / f"{stem.replace('_res-02', '')}.tsv").write_text(TSV)
    name = "templateflow:Schaefer2018?desc=100Parcels7Networks&resolution=2"
    found = open_atlas(name, SPACE)
    assert (found.name, found.space) == (name, SPACE)
    assert found.labels == ["Insula", "5", "Caudate"]
    wanted = {"atlas": "Schaefer2018", "desc": "100Parcels7Networks", "suffix": "dseg"}
    assert templateflow.asked[0] == {
        "template": SPACE,
        **wanted,
        "resolution": 2,
        "extension": ".nii.gz",
    }


@pytest.mark.parametrize("files", [[], ["desc-1", "desc-2"]])
def test_templateflow_must_have_one_such_file(
    templateflow: FakeTemplateFlow, files: list[str]
) -> None:
    for file in files:
        write_labels(templateflow.folder / f"tpl-{SPACE}_{file}_dseg.nii.gz")
    with pytest.raises(InputError, match=r"desc-1.*desc-2" if files else f"none in {SPACE}"):
        open_atlas("templateflow:Schaefer2018?resolution=2", SPACE)


def test_templateflow_without_a_network_or_the_package_is_told_of(
    templateflow: FakeTemplateFlow, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise requests.exceptions.ConnectionError("no network")

    write_labels(templateflow.folder / f"tpl-{SPACE}_dseg.nii.gz")
    monkeypatch.setattr(templateflow, "get", refuse)
    with pytest.raises(InputError, match=r"TEMPLATEFLOW_HOME.*no network"):
        open_atlas("templateflow:Schaefer2018", SPACE)
    with pytest.raises(InputError, match="unknown option 'label'"):
        open_atlas("templateflow:Schaefer2018?label=1", SPACE)
    monkeypatch.setitem(sys.modules, "templateflow", None)
    with pytest.raises(InputError, match="needs the package templateflow"):
        open_atlas("templateflow:Schaefer2018", SPACE)


def test_the_real_templateflow_gives_what_lies_in_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TEMPLATEFLOW_HOME", str(tmp_path))
    monkeypatch.setenv("TEMPLATEFLOW_AUTOUPDATE", "off")
    pytest.importorskip("templateflow")
    folder = tmp_path / f"tpl-{SPACE}"
    stem = f"tpl-{SPACE}_res-02_atlas-Schaefer2018_desc-100Parcels7Networks_dseg"
    write_labels(folder / f"{stem}.nii.gz")
    (folder / f"{stem.replace('_res-02', '')}.tsv").write_text(TSV)
    name = "templateflow:Schaefer2018?desc=100Parcels7Networks&resolution=2"
    assert open_atlas(name, SPACE).labels == ["Insula", "5", "Caudate"]


# --- Digests ------------------------------------------------------------------------------------


def test_the_digest_tells_atlases_and_the_names_of_their_regions_apart(tmp_path: Path) -> None:
    path = write_labels(tmp_path / "a.nii.gz")
    without = atlas_digest(str(path))
    (tmp_path / "a.tsv").write_text(TSV)
    assert atlas_digest(str(path)) != without
    assert atlas_digest("packaged:100") != atlas_digest("packaged:200")
    assert not is_named(str(path))
    assert not is_named("packaged")


# --- Parcels ------------------------------------------------------------------------------------


def test_parcels_cover_the_packaged_brain_in_mirrored_pairs() -> None:
    start = time.perf_counter()
    found = make_parcels(100)
    assert time.perf_counter() - start < 10  # alone 0.3 s, once nilearn is loaded
    assert make_parcels(100).sha256 == found.sha256
    assert "ours, not anatomical" in found.name
    assert found.space == "MNI152NLin2009aSym"
    brain = load_mni152_brain_mask()
    grid = resample_labels(found, brain.shape, brain.affine)
    inside = np.asarray(brain.dataobj) > 0
    assert (inside & (grid < 0)).sum() < 0.04 * inside.sum()
    assert ((grid >= 0) & ~inside).sum() < 0.04 * inside.sum()
    sizes = np.bincount(found.index[found.index >= 0], minlength=100)
    assert sizes.min() > sizes.max() / 3
    left, right = found.labels.index("L7"), found.labels.index("R7")
    assert ((found.index == left) == (found.index == right)[::-1]).all()
    x = (found.affine @ [*np.argwhere(found.index < 50)[0], 1])[0]
    assert x < 0


def test_parcels_in_another_space_are_warned_of() -> None:
    with pytest.warns(UserWarning, match="MNI152NLin2009aSym"):
        assert len(atlases.open_atlas("packaged:20", SPACE).labels) == 20


def test_voxels_beyond_the_grid_count() -> None:
    cubes = make_cubes((4, 4, 4), np.diag([2.0, 2, 2, 1]), 4.0)
    shifted = np.diag([2.0, 2, 2, 1])
    shifted[:3, 3] = [6, 0, 0]  # a grid that begins where the last voxel is
    assert (count_voxels(cubes, shifted) == 8).all()
    assert (resample_labels(cubes, (4, 4, 4), shifted) >= 0).sum() == 16

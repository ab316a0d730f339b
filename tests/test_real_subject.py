"""One real subject: from raw scans to T1w image and connectivity, and a step of Cinp on both."""

from __future__ import annotations

from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from scipy import ndimage

from neuromamba.anat import run_anat
from neuromamba.batches import Windows, make_readers
from neuromamba.bids import run_index
from neuromamba.config import Config
from neuromamba.files import read_json
from neuromamba.layout import Layout
from neuromamba.models import Cinp
from neuromamba.preprocess import run_preprocess
from neuromamba.pretrain import make_network, make_settings, sources_of
from neuromamba.rois import run_rois
from neuromamba.volumes import run_volumes

ATLAS = "AAL116_space-MNI152NLin6_res-2.nii.gz"


SPACE = "MNI152NLin2009aSym"

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def config(real_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Config:
    """The subject is preprocessed."""
    pytest.importorskip("ants", reason="the ants extra is not installed")
    folder = tmp_path_factory.mktemp("real")
    raw = {"bids": str(real_data / "studyforrest_sub02_bids"), "space": SPACE}
    raw |= {"derivatives": str(folder / "derivatives")}
    model = {"family": "cinp", "width": 32, "feature_size": 12, "window": 4, "network_hidden": 32}
    config = Config.model_validate(
        {
            "results": str(folder / "results"),
            "datasets": {"real": {**raw, "atlas": str(real_data / "atlas" / ATLAS)}},
            "models": {"m": model},
            "preprocess": {"engine": "ants", "ants": {"interpolation": "linear"}},
            "compute": {"device": "cpu"},
        }
    )
    run_preprocess(config, "real", "sub-02")
    return config


def test_head_and_run_lie_where_the_template_does(config: Config) -> None:
    output = Path(config.datasets["real"].derivatives)
    anat = output / "sub-02" / "anat"
    sidecar = f"sub-02_space-{SPACE}_res-2_desc-preproc_T1w.json"
    assert read_json(anat / sidecar)["CorrelationWithTemplate"] > 0.65
    (run,) = (output / "sub-02" / "func").glob("*_bold.json")
    assert read_json(run)["Registration"]["BrainOverlap"] > 0.9
    stem = str(run).removesuffix("_desc-preproc_bold.json")
    head = nibabel.load(anat / sidecar.replace(".json", ".nii.gz")).get_fdata()
    mean, mask = (nibabel.load(f"{stem}_{name}.nii.gz") for name in ("boldref", "desc-brain_mask"))
    core = ndimage.binary_erosion(mask.get_fdata() > 0, iterations=8)
    # The ventricles coincide; a run that lies 3 mm off has -0.3.
    assert np.corrcoef(mean.get_fdata()[core], head[core])[0, 1] < -0.5


def test_it_goes_on_to_a_step_of_a_model_of_both(config: Config) -> None:
    run_index(config, "real")
    for stage in (run_volumes, run_rois, run_anat):
        stage(config, "real", 0)
    layout, section = Layout.of(config, "real"), config.models["m"]
    (run,) = (path.stem for path in layout.array("rois", "x").parent.glob("*.zarr"))
    sources = sources_of(layout, section, [run])
    assert sources["regions"]["n_rois"] == 116
    settings = make_settings(config, "m", section.pretrain, 0, sources)
    network = make_network(config, "m", 0, settings)
    assert isinstance(network, Cinp)
    windows = Windows({"sub-02": [run]}, make_readers(network, layout, section, config.tokens))
    batch = windows.batch(windows.spaced(1))
    assert batch["anat"].shape == (1, 96, 96, 96)
    assert bool(batch["has_anat"].all() and batch["has_fc"].all())
    inside = batch["anat"][batch["anat"] > 0]
    # A brain of 1.2 to 2 litres, in voxels of 8 mm^3, and intensities that fill the range.
    assert 150_000 < len(inside) < 250_000
    assert 0.2 < float(inside.mean()) < 0.8
    fc = batch["fc"][0][batch["present"][0]][:, batch["present"][0]]
    assert len(fc) > 100
    assert float(fc.mean()) > 0.05
    loss = network.train().loss(batch)
    loss["loss"].backward()
    assert torch.stack([one.grad.norm() for one in network.parameters()]).isfinite().all()
    assert float(loss["mim"]) > 0
    # Of a single pair there is nothing to be told from.
    assert float(loss["inc"]) == 0

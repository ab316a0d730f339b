"""One real subject: from raw scans to T1w image and connectivity, and a step of Cinp on both."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from neuromamba.anat import run_anat
from neuromamba.batches import Windows, make_readers
from neuromamba.bids import run_index
from neuromamba.config import Config
from neuromamba.layout import Layout
from neuromamba.models import Cinp
from neuromamba.preprocess import run_preprocess
from neuromamba.pretrain import make_network, make_settings, regions_of
from neuromamba.rois import run_rois
from neuromamba.volumes import run_volumes

ATLAS = "AAL116_space-MNI152NLin6_res-2.nii.gz"


@pytest.mark.slow
def test_a_real_subject_goes_from_raw_scans_to_a_step(real_data: Path, tmp_path: Path) -> None:
    pytest.importorskip("ants", reason="the ants extra is not installed")
    raw = {"bids": str(real_data / "studyforrest_sub02_bids"), "space": "MNI152NLin2009aSym"}
    model = {"family": "cinp", "width": 32, "feature_size": 12, "window": 4, "network_hidden": 32}
    config = Config.model_validate(
        {
            "results": str(tmp_path / "results"),
            "datasets": {"real": {**raw, "atlas": str(real_data / "atlas" / ATLAS)}},
            "models": {"m": model},
            "preprocess": {"engine": "ants"},
            "compute": {"device": "cpu"},
        }
    )
    run_preprocess(config, "real", "sub-02")
    run_index(config, "real")
    for stage in (run_volumes, run_rois, run_anat):
        stage(config, "real", 0)
    layout, section = Layout.of(config, "real"), config.models["m"]
    (run,) = (path.stem for path in layout.array("rois", "x").parent.glob("*.zarr"))
    regions = regions_of(layout, section, [run])
    assert regions is not None
    assert regions["n_rois"] == 116
    settings = make_settings(config, "m", section.pretrain, 0, regions)
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

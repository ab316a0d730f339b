"""The stage that measures quality, and the page it writes for each run."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from pages import Page
from scans import make_config, series, write_index, write_run

from neuromamba.config import Config
from neuromamba.files import InputError
from neuromamba.layout import Layout
from neuromamba.qc import run_qc
from neuromamba.qc_page import describe_denoising, read_page
from neuromamba.qc_table import METRICS
from neuromamba.tables import read_table
from neuromamba.tokens import run_tokens
from neuromamba.volumes import run_volumes

MOVING, STILL = "sub-01_task-rest", "sub-02_task-rest"


def write_confounds(folder: Path, fd: list[float]) -> str:
    path = folder / f"{MOVING}_desc-confounds_timeseries.tsv"
    table = pd.DataFrame({"framewise_displacement": fd, "std_dvars": np.ones(len(fd))})
    table.to_csv(path, sep="\t", index=False, na_rep="n/a")
    return str(path)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs that have been measured, the first one with confounds, to be copied."""
    folder = tmp_path_factory.mktemp("made")
    config = make_config(folder)
    rows = [write_run(folder, MOVING, series(seed=1)), write_run(folder, STILL, series(seed=2))]
    rows[0]["confounds"] = write_confounds(folder, [float("nan"), *[0.1] * 17, 0.9, 1.1])
    write_index(config, rows)
    for stage in (run_volumes, run_tokens, run_qc):
        stage(config, "toy", 0)
    return folder


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    part = read_table(Layout.of(make_config(tmp_path), "toy").manifest("index", 0), dtype=str)
    moved = part["confounds"].str.replace(str(made), str(tmp_path))
    write_index(make_config(tmp_path), part.assign(confounds=moved).to_dict("records"))
    return tmp_path


def measure(config: Config) -> pd.DataFrame:
    run_qc(config, "toy", 0)
    text = {"reason": str, "motion_note": str}
    return read_table(Layout.of(config, "toy").manifest("qc", 0), dtype=text).set_index("run")


def page_of(config: Config, run: str) -> Path:
    return Layout.of(config, "toy").qc(run)


# --- The table ----------------------------------------------------------------------------------


def test_the_table_has_every_metric_of_every_run(folder: Path) -> None:
    table = measure(make_config(folder))
    assert list(table.columns) == ["reason", "key", *METRICS, "motion_note"]
    assert table["reason"].isna().all()
    moving, still = table.loc[MOVING], table.loc[STILL]
    assert moving["n_volumes"] == 20
    assert moving["minutes"] == pytest.approx(20 * 2 / 60)
    assert moving["mean_fd"] == pytest.approx((17 * 0.1 + 0.9 + 1.1) / 19)
    assert moving["high_motion"] == pytest.approx(0.1)
    assert moving["minutes_low_motion"] == pytest.approx(18 * 2 / 60)
    assert np.isnan(still["mean_fd"])
    assert still["motion_note"] == "the run has no confounds"
    # Noise of SD 20 around 1000, less after interpolation between voxels.
    assert 45 < still["tsnr"] < 120
    tokens = read_table(Layout.of(make_config(folder), "toy").manifest("tokens", 0))
    assert sorted(table["n_tokens"]) == sorted(tokens["n_tokens"])


def test_damaged_volumes_leave_out_their_run_alone(folder: Path) -> None:
    config = make_config(folder, compute={"max_excluded": 0.5})
    store = Layout.of(config, "toy").array("volumes", STILL)
    for shard in (store / "bold").glob("c*"):
        shard.unlink() if shard.is_file() else shutil.rmtree(shard)
    page_of(config, STILL).unlink()
    table = measure(config)
    assert "damaged" in table.loc[STILL, "reason"]
    assert pd.isna(table.loc[MOVING, "reason"])
    with pytest.raises(InputError, match="max_excluded"):
        run_qc(make_config(folder, compute={"max_excluded": 0.1}), "toy", 0)


def test_the_metrics_do_not_depend_on_the_pages(folder: Path) -> None:
    with_pages = measure(make_config(folder))
    shutil.rmtree(page_of(make_config(folder), STILL).parent)
    without = measure(make_config(folder, qc={"pages": False}))
    pd.testing.assert_frame_equal(with_pages, without)
    assert not page_of(make_config(folder), STILL).exists()


# --- What is made again -------------------------------------------------------------------------


def test_a_page_that_is_current_is_kept_with_what_it_measured(folder: Path) -> None:
    config = make_config(folder)
    first = measure(config)
    before = {run: page_of(config, run).stat().st_mtime_ns for run in (MOVING, STILL)}
    pd.testing.assert_frame_equal(measure(config), first)
    assert {run: page_of(config, run).stat().st_mtime_ns for run in before} == before


def test_other_confounds_and_another_threshold_measure_again(folder: Path) -> None:
    config = make_config(folder)
    first = measure(config)
    stricter = measure(make_config(folder, qc={"fd_threshold": 0.05}))
    assert stricter.loc[MOVING, "high_motion"] == pytest.approx(0.95)
    write_confounds(folder, [0.2] * 20)
    calmer = measure(config)
    assert calmer.loc[MOVING, "mean_fd"] == pytest.approx(0.2)
    assert calmer.loc[MOVING, "key"] != first.loc[MOVING, "key"]
    assert calmer.loc[STILL, "key"] == first.loc[STILL, "key"]


def test_a_rule_changes_what_pages_say_and_no_key(folder: Path) -> None:
    config = make_config(folder)
    first, kept = measure(config), page_of(config, MOVING).stat().st_mtime_ns
    ruled = make_config(folder, qc={"max_mean_fd": 0.5})
    assert measure(ruled)["key"].tolist() == first["key"].tolist()
    assert page_of(ruled, MOVING).stat().st_mtime_ns > kept
    assert "Meets the rules of quality" in page_of(ruled, MOVING).read_text()
    assert read_page(page_of(ruled, STILL))["said"]["broken"].keys() == {"max_mean_fd"}


def test_a_page_without_a_readable_head_is_made_again(folder: Path) -> None:
    config = make_config(folder)
    measure(config)
    page = page_of(config, MOVING)
    page.write_text(page.read_text().replace('content="{', 'content="broken {'))
    assert read_page(page) is None
    measure(config)
    assert read_page(page) is not None


# --- The page -----------------------------------------------------------------------------------


def test_a_page_is_whole_and_asks_nothing_of_the_network(folder: Path) -> None:
    config = make_config(folder)
    measure(config)
    for run in (MOVING, STILL):
        html = page_of(config, run).read_text(encoding="utf-8")
        page = Page(html)
        assert page.open == []
        assert len(html) < 1_500_000
        assert not re.search(r"url\(|@import|https?:", html)
        pictures = [attributes for tag, attributes in page.tags if tag == "img"]
        assert len(pictures) == 5
        assert all(p["src"].startswith("data:image/webp;base64,") and p["alt"] for p in pictures)
        assert not {"script", "link", "iframe"} & {tag for tag, _ in page.tags}
        assert all(metric.label in page.text for metric in METRICS.values())


def test_a_page_says_what_is_wrong(folder: Path) -> None:
    config = make_config(folder, qc={"max_mean_fd": 0.15, "min_tsnr": 1})
    measure(config)
    moving, still = (Page(page_of(config, run).read_text()).text for run in (MOVING, STILL))
    assert "Left out by the rules" in moving
    assert "over qc.max_mean_fd = 0.15" in moving
    assert "Motion is unknown" not in moving
    assert "mark the 2 volumes above it" in moving
    assert "Motion is unknown : the run has no confounds" in still
    assert "Not denoised" in still


def test_a_page_links_to_the_overview_and_the_preprocessing(folder: Path) -> None:
    config = make_config(folder)
    (folder / "sub-01.html").write_text("fMRIPrep's")
    measure(config)
    for run, n in ((MOVING, 2), (STILL, 1)):
        path = page_of(config, run)
        links = [a["href"] for tag, a in Page(path.read_text()).tags if tag == "a"]
        assert len(links) == n
        targets = [(path.parent / link).resolve() for link in links]
        assert targets[0] == Layout.of(config, "toy").overview.resolve()
        assert targets[1:] == ([(folder / "sub-01.html").resolve()] if n == 2 else [])


def test_what_files_are_called_cannot_become_markup(folder: Path) -> None:
    config = make_config(folder)
    layout = Layout.of(config, "toy")
    part = read_table(layout.manifest("index", 0), dtype=str)
    part["confounds"] = "<script>alert(1)</script>.tsv"
    write_index(config, part.to_dict("records"))
    measure(config)
    html = page_of(config, MOVING).read_text()
    assert "&lt;script&gt;" in html
    assert "<script" not in html


def test_denoising_is_told_in_words() -> None:
    done = {
        "strategy": ["motion", "scrub"],
        "columns": ["rot_x", "rot_y"],
        "scrubbed": [4, 5, 6],
        "dropped": [],
        "low_pass": 0.1,
        "high_pass": None,
        "detrend": True,
        "repetition_time": None,
    }
    assert describe_denoising({"denoise": done, "smoothing": 6.0}) == [
        "2 confounds regressed out (motion, scrub)",
        "3 volumes of high motion taken out",
        "linear trend taken out",
        "frequencies above 0.1 Hz taken out",
        "smoothed by 6 mm (FWHM)",
    ]
    assert describe_denoising({}) == []

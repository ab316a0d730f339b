"""The stages of a dataset of ROI series, from the tables to the baselines: what runs, and again."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray
from fake_series import DATASET, add_series, make_series, write_dataset

from neuromamba.batches import list_runs
from neuromamba.check import check_dataset
from neuromamba.cli import main
from neuromamba.config import Config, save_config
from neuromamba.confound_model import confounds_of
from neuromamba.files import InputError
from neuromamba.keys import Keys
from neuromamba.layout import Layout
from neuromamba.report import run_report
from neuromamba.splits import read_split
from neuromamba.stages import Job, all_jobs, jobs_before
from neuromamba.states import good_runs
from neuromamba.tables import read_table
from neuromamba.verify import run_verify

STAGES = ("index", "rois", "excluded", "overview", "splits", "baselines")
pytestmark = pytest.mark.filterwarnings("ignore:data/toy/participants.tsv has no row")


def make_config(**sections: Any) -> Config:
    settings: dict[str, Any] = {
        "results": "results",
        "datasets": {"toy": DATASET},
        "models": {"m": {"family": "roi_transformer", "volumes": 20}},
        "splits": {"test": 0.4, "validation": 0.2},
        "evaluate": {"baselines": ["fc", "confounds"], "inner_folds": 2},
        "compute": {"batches": 2},
    }
    for name, section in sections.items():
        settings[name] = {**settings.get(name, {}), **section}
    return Config.model_validate(settings)


def command(stage: str, config: Config) -> int:
    save_config("config.yaml", config)
    return main([stage, "--config", "config.yaml"])


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve subjects through all stages, and two whose tables are too short and broken."""
    folder = tmp_path_factory.mktemp("series")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        root = Path("data/toy")
        write_dataset(root)
        add_series(root, "sub-20_task-rest_seg-Toy", make_series(0, volumes=19))
        broken = add_series(root, "sub-21_task-rest_seg-Toy", make_series(0))
        lines = broken.read_text().splitlines()
        broken.write_text("\n".join([*lines[:4], f"{lines[4]}\t1", *lines[5:]]))
        for stage in STAGES:
            assert command(stage, make_config()) == 0, stage
    return folder


@pytest.fixture
def made(results: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Layout:
    """A copy of them, to be changed."""
    shutil.copytree(results, tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    return Layout.of(make_config(), "toy")


def stale(**sections: Any) -> list[str]:
    """The stages that are not current, of those that the fixture has made."""
    config = make_config(**sections)
    keys = Keys(config)
    jobs = [job for job in all_jobs(config) if job.stage in STAGES and keys.is_stale(job)]
    return sorted({job.stage for job in jobs}, key=STAGES.index)


def test_the_stages_that_need_no_images_make_all_that_baselines_need(made: Layout):
    config = make_config()
    excluded = read_table(made.excluded).set_index("run")
    assert list(excluded.index) == ["sub-20_task-rest", "sub-21_task-rest"]
    assert set(excluded["stage"]) == {"rois"}
    assert "has 19, volumes.min_volumes is 20" in excluded["reason"].iloc[0]
    assert "has 7 cells where line 1 names 6" in excluded["reason"].iloc[1]
    subjects = sorted(name for part in read_split(made.split).values() for name in part)
    assert subjects == [f"sub-{k:02}" for k in range(12)]
    runs = list_runs(config, "toy", subjects, ["rois"])
    assert list(runs["subject"]) == subjects
    assert set(good_runs(config, "toy")["subject"]) == set(subjects)
    predicted = read_table(made.baselines("sex") / "predictions.tsv")
    assert set(predicted["predictor"]) == {"fc", "confounds"}
    assert set(predicted["subject"]) == set(read_split(made.split)["test"])
    assert {job.stage for job in all_jobs(config)} == {
        *STAGES, "pretrain", "finetune", "evaluate", "scores", "report"
    }  # fmt: skip
    assert stale() == []


def test_the_overview_tells_what_can_be_measured_of_series(made: Layout):
    table = read_table(made.overview.with_suffix(".tsv")).set_index("run")
    assert len(table) == 14
    assert list(table.index[table["excluded"].notna()]) == ["sub-20_task-rest", "sub-21_task-rest"]
    series = make_series(3)
    add_series(Path("data/toy"), "sub-03_task-rest_seg-Toy_stat-mean", series)
    correlation = np.corrcoef(series.T)[np.triu_indices(6, k=1)].mean()
    series[:, 2] = 5.0
    add_series(Path("data/toy"), "sub-04_task-rest_seg-Toy_stat-mean", series)
    motion = Path("data/toy/sub-05/func/sub-05_task-rest_motion.tsv")
    motion.write_text("framewise_displacement\nn/a\n" + "0.5\n" * 29)
    for stage in ("index", "rois", "excluded", "overview"):
        assert command(stage, make_config()) == 0, stage
    table = read_table(made.overview.with_suffix(".tsv")).set_index("run")
    row = table.loc["sub-03_task-rest"]
    assert (row["n_volumes"], row["minutes"], row["n_missing"]) == (30, 1.0, 0)
    assert row["mean_correlation"] == pytest.approx(correlation, abs=1e-6)
    assert row["mean_fd"] == pytest.approx(0.155)
    assert table.loc["sub-04_task-rest", "n_missing"] == 1
    assert table.loc["sub-04_task-rest", "outlier"] == "n_missing"
    assert table.loc["sub-05_task-rest", "mean_fd"] == 0.5
    page = made.overview.read_text()
    assert "12 of 14 runs are used" in page
    assert "tSNR" not in page


def test_models_of_series_train_on_the_series_of_datasets_with_images_too():
    models = {"m": {"family": "roi_transformer"}, "t": {"family": "neuromamba"}}
    config = make_config(datasets={"toy": {"derivatives": "scans"}}).model_dump(mode="json")
    config = Config.model_validate(config | {"models": models})
    before = {
        model: {one.stage for one in jobs_before(config, Job("pretrain", "toy", model=model))}
        for model in models
    }
    assert before == {"m": {"splits", "rois"}, "t": {"splits", "tokens"}}


def test_confounds_come_from_the_table_where_no_run_tells_its_motion(made: Layout):
    runs = good_runs(make_config(), "toy")
    table = confounds_of(make_config(), "toy", "sex", runs)
    assert list(table) == ["site", "mean_fd", "n_volumes"]
    assert table.loc["sub-11", "mean_fd"] == 0.3
    assert set(table["n_volumes"]) == {30}


@pytest.mark.parametrize(
    ("sections", "stages"),
    [
        ({"volumes": {"voxel_size": 3.0}}, []),
        ({"rois": {"cube": 12.0}}, []),
        ({"datasets": {"toy": {**DATASET, "atlas": "packaged:100"}}}, []),
        ({"volumes": {"min_volumes": 10}}, ["rois", "excluded", "overview", "baselines"]),
        ({"rois": {"fisher_z": True}}, ["rois", "excluded", "overview", "baselines"]),
        (
            {"datasets": {"toy": {**DATASET, "series": {}}}},
            ["index", "rois", "excluded", "overview", "baselines"],
        ),
    ],
)
def test_a_changed_setting_makes_stale_what_depends_on_it(
    made: Layout, sections: dict[str, Any], stages: list[str]
):
    assert stale(**sections) == stages


def test_a_changed_table_or_sidecar_makes_its_runs_stale_and_others_stay(made: Layout):
    used = read_split(made.split)["train"][0]
    table = Path(f"data/toy/{used}/func/{used}_task-rest_seg-Toy_stat-mean_timeseries.tsv")
    sidecar = table.with_suffix(".json")
    for path, old, new in ((table, "region-0", "region-A"), (sidecar, "2.0", "2.5")):
        text = path.read_text()
        path.write_text(text.replace(old, new))
        assert stale() == ["index", "rois", "excluded", "overview", "baselines"]
        path.write_text(text)
        assert stale() == []
    changed = made.array("rois", f"{used}_task-rest")
    other = next(path for path in changed.parent.glob("*.zarr") if path != changed)
    before, kept = changed.stat().st_ino, other.stat().st_ino
    sidecar.write_text('{"SamplingFrequency": 0.25}')
    for stage in ("index", "rois"):
        assert command(stage, make_config()) == 0
    with xarray.open_zarr(changed) as store:
        assert store.attrs["repetition_time"] == 4.0
    assert changed.stat().st_ino != before
    assert other.stat().st_ino == kept


def test_a_subject_that_is_added_trains_nothing(made: Layout):
    add_series(Path("data/toy"), "sub-30_task-rest_seg-Toy", make_series(30))
    assert stale() == ["index", "rois", "excluded", "overview"]


def test_tables_that_are_elsewhere_make_nothing_stale(made: Layout):
    Path("data/toy").rename("data/archive")
    assert stale() == []


def test_too_many_unusable_runs_stop_the_stage(made: Layout, capsys: pytest.CaptureFixture[str]):
    assert command("rois", make_config(volumes={"min_volumes": 40})) == 2
    assert "more than compute.max_excluded = 0.2 allows" in capsys.readouterr().err


@pytest.mark.parametrize("stage", ["volumes", "tokens", "qc", "anat"])
def test_stages_of_images_say_that_there_are_none(
    tmp_path: Path,
    stage: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.chdir(tmp_path)
    assert command(stage, make_config()) == 2
    assert "toy has ROI series" in capsys.readouterr().err


def test_verify_checks_stores_and_tables(made: Layout):
    config = make_config()
    said = run_verify(config, "toy", sources=True)
    assert [line.split(":")[0] for line in said.splitlines()] == ["rois", "sources"]
    table = next(Path("data/toy/sub-00/func").glob("*.tsv"))
    table.write_text(table.read_text().replace("region-0", "region-9"))
    with pytest.raises(InputError, match=f"{table.name}: is not the file the rois were made from"):
        run_verify(config, "toy", sources=True)


def test_check_tells_beforehand_what_the_index_will(made: Layout):
    check = check_dataset(make_config(), "toy")
    assert check.ok
    assert check.how == "ROI series, Toy"
    left_out = [run for run in check.runs if run.status == "left out"]
    assert [run.run for run in left_out] == ["sub-20_task-rest"]
    some = {**DATASET, "exclude": ["sub-00"]}
    check = check_dataset(make_config(datasets={"toy": some}), "toy")
    assert [run.run for run in check.runs if run.status == "not selected"] == ["sub-00_task-rest"]


def test_the_report_is_written_without_images(made: Layout):
    config = make_config()
    run_report(config)
    assert "toy" in Path("results/report/index.html").read_text()
    methods = Path("results/report/methods.md").read_text()
    assert "Of toy the series of the regions of Toy were used as they were given." in methods
    assert "grid of" not in methods
    assert "patches of" not in methods

"""What raw scans, their preprocessing and the rules of quality make stale."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from fake_bids import add_run
from test_keys import MODEL, TRAININGS, config_of

from neuromamba.bids import run_index
from neuromamba.config import Config
from neuromamba.files import write_json, write_text
from neuromamba.keys import Keys
from neuromamba.layout import Layout
from neuromamba.raw_listing import limits_of
from neuromamba.recording import recorded
from neuromamba.stages import Job, all_jobs, output_of
from neuromamba.tables import read_table, write_table

SUBJECTS = [f"sub-{k:02d}" for k in range(12)]
DATA = {"index", "volumes", "tokens", "rois", "qc", "excluded", "overview"}


def add_raw(root: Path, subject: str, content: bytes = b"raw") -> None:
    folder = root / subject / "func"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{subject}_task-rest_bold.nii.gz").write_bytes(content)
    (folder / f"{subject}_task-rest_bold.json").write_text('{"RepetitionTime": 2.0}')


@pytest.fixture
def settings(tmp_path: Path) -> dict[str, Any]:
    people = pd.DataFrame({"participant_id": SUBJECTS, "sex": ["F", "M"] * 6})
    write_table(tmp_path / "participants.tsv", people)
    for name in SUBJECTS:
        add_raw(tmp_path / "raw", name)
    sex = {"kind": "classification", "column": "sex", "classes": {"female": "F", "male": "M"}}
    dataset = {
        "bids": str(tmp_path / "raw"),
        "participants": {"file": str(tmp_path / "participants.tsv")},
        "targets": {"sex": sex},
    }
    return {
        "results": str(tmp_path / "results"),
        "datasets": {"d": dataset},
        "models": {"m": MODEL},
        "compute": {"batches": 2},
    }


def preprocess(config: Config, subject: str) -> None:
    """What an engine leaves: all runs, or none of a subject whose raw scan says `bad`.

    A `bad broken` one lies among the derivatives nevertheless, as with those that others made.
    """
    root = Path(config.datasets["d"].bids or "")
    derivatives = Path(config.datasets["d"].derivatives)
    run = f"{subject}_task-rest"
    content = (root / subject / "func" / f"{run}_bold.nii.gz").read_bytes()
    bad = b"bad" in content
    if not bad or b"broken" in content:
        add_run(derivatives, run)
    status = {
        "subject": subject,
        "engine": "ants",
        "generated_by": "an engine 1.0",
        "seconds": 60.0,
        "runs": [] if bad else [run],
        "left_out": {run: "the scanner fell over"} if bad else {},
        "reason": None,
        "limits": limits_of(config.preprocess),
    }
    write_json(Layout.of(config, "d").preprocess(subject), status)


def make(config: Config, job: Job) -> None:
    with recorded(config, job):
        if job.stage == "preprocess":
            preprocess(config, job.subject)
        elif job.stage == "index":
            run_index(config, "d")
        elif job.stage == "splits":
            parts = ["train"] * 8 + ["validation"] * 2 + ["test"] * 2
            table = pd.DataFrame({"subject": SUBJECTS, "part": parts})
            write_table(output_of(config, job), table)
        elif job.stage == "qc":
            index = read_table(Layout.of(config, "d").manifest("index", job.batch or 0), dtype=str)
            fd = index["subject"].map(lambda name: 0.1 * (int(name[4:]) + 1))
            write_table(output_of(config, job), index[["run"]].assign(reason=None, mean_fd=fd))
        else:
            write_text(output_of(config, job), "made")


@pytest.fixture
def config(settings: dict[str, Any]) -> Config:
    config = config_of(settings)
    for job in all_jobs(config):
        make(config, job)
    return config


def stale_jobs(config: Config) -> list[Job]:
    found = Keys(config)
    return [job for job in all_jobs(config) if found.is_stale(job)]


def stale(config: Config) -> set[str]:
    return {job.stage for job in stale_jobs(config)}


def test_each_raw_subject_is_a_job_before_the_index(settings: dict[str, Any]):
    jobs = all_jobs(config_of(settings))
    assert [job.subject for job in jobs if job.stage == "preprocess"] == SUBJECTS
    assert jobs[len(SUBJECTS)] == Job("index", "d")


def test_what_has_been_made_is_current(config: Config, settings: dict[str, Any]):
    assert stale(config) == set()
    for change in ("preprocess.threads=7", "preprocess.memory_mb=7", "preprocess.time_limit=7"):
        assert stale(config_of(settings, change)) == set()
    how = read_table(Layout.of(config, "d").root / "preprocess" / "subjects.tsv")
    assert list(how["subject"]) == SUBJECTS
    assert set(how["generated_by"]) == {"an engine 1.0"}


def test_a_new_raw_subject_is_processed_and_changes_no_training(config: Config, tmp_path: Path):
    add_raw(tmp_path / "raw", "sub-12")
    found = stale_jobs(config)
    assert [job.subject for job in found if job.stage == "preprocess"] == ["sub-12"]
    assert len([job for job in found if job.stage == "tokens"]) == 1
    assert {job.stage for job in found} == {"preprocess", *DATA, "scores", "report"}
    for job in found:
        make(config, job)
    assert stale(config) == set()
    assert "sub-12" in set(read_table(Layout.of(config, "d").index)["subject"])


def test_a_changed_raw_scan_of_the_split_trains_anew(config: Config, tmp_path: Path):
    add_raw(tmp_path / "raw", "sub-03", b"other")
    found = stale_jobs(config)
    assert [job.subject for job in found if job.stage == "preprocess"] == ["sub-03"]
    assert len([job for job in found if job.stage == "volumes"]) == 1
    assert {job.stage for job in found} == {"preprocess", *DATA, "baselines", *TRAININGS}


def test_other_settings_of_the_engine_make_everything_again_but_the_split(
    config: Config, settings: dict[str, Any]
):
    changed = config_of(settings, "preprocess.ants={voxel_size: 3}")
    assert stale(changed) == {"preprocess", *DATA, "baselines", *TRAININGS}
    # Those of an engine that is not used change nothing.
    assert stale(config_of(settings, "preprocess.fmriprep={freesurfer: true}")) == set()


def test_another_template_of_the_same_name_makes_everything_again(
    settings: dict[str, Any], tmp_path: Path
):
    for name in ("t1w", "mask"):
        (tmp_path / f"{name}.nii.gz").write_bytes(b"old")
    files = {name: str(tmp_path / f"{name}.nii.gz") for name in ("t1w", "mask")}
    settings |= {"preprocess": {"ants": {"template": files}}}
    config = config_of(settings)
    for job in all_jobs(config):
        make(config, job)
    assert stale(config) == set()
    (tmp_path / "t1w.nii.gz").write_bytes(b"new")
    assert stale(config) == {"preprocess", *DATA, "baselines", *TRAININGS}
    # Where the template is not at hand, what was made with it stays.
    (tmp_path / "t1w.nii.gz").write_bytes(b"old")
    (tmp_path / "mask.nii.gz").unlink()
    assert stale(config) == set()


def test_a_subject_that_cannot_be_preprocessed_is_in_the_index_with_the_reason(
    settings: dict[str, Any], tmp_path: Path
):
    add_raw(tmp_path / "raw", "sub-05", b"bad")
    config = config_of(settings)
    for job in all_jobs(config):
        make(config, job)
    index = read_table(Layout.of(config, "d").index, dtype=str).set_index("run")
    assert index.loc["sub-05_task-rest", "reason"] == "preprocessing: the scanner fell over"
    assert index["reason"].notna().sum() == 1
    assert stale(config) == set()
    # With more memory, it alone is tried again.
    more = config_of(settings, "preprocess.memory_mb=64000")
    found = stale_jobs(more)
    assert [job.subject for job in found if job.stage == "preprocess"] == ["sub-05"]
    assert "limits" in Keys(more).why(Job("preprocess", "d", subject="sub-05"))
    for job in found:
        make(more, job)
    assert stale(more) == set()


def test_derivatives_that_are_gone_or_of_other_settings_are_made_again(config: Config):
    derivatives = Path(config.datasets["d"].derivatives)
    key = derivatives / ".neuromamba" / "sub-04.key.json"
    write_json(key, {"key": "of another checkout"})
    shutil.rmtree(derivatives / "sub-02")
    found = [job.subject for job in stale_jobs(config) if job.stage == "preprocess"]
    assert found == ["sub-02", "sub-04"]


def test_a_broken_run_among_the_derivatives_is_left_out_and_not_used_as_well(
    settings: dict[str, Any], tmp_path: Path
):
    add_raw(tmp_path / "raw", "sub-05", b"bad broken")
    config = config_of(settings)
    for job in all_jobs(config):
        make(config, job)
    index = read_table(Layout.of(config, "d").index, dtype=str)
    assert index["run"].is_unique
    reasons = index.set_index("run")["reason"].dropna()
    assert reasons.to_dict() == {"sub-05_task-rest": "preprocessing: the scanner fell over"}
    assert stale(config) == set()


def test_results_stay_current_where_the_derivatives_have_been_removed(
    config: Config, tmp_path: Path
):
    """To save space, or because DVC does not hold them."""
    shutil.rmtree(config.datasets["d"].derivatives)
    assert stale(config) == set()
    add_raw(tmp_path / "raw", "sub-12")
    found = stale_jobs(config)
    assert [job.subject for job in found if job.stage == "preprocess"] == ["sub-12"]
    assert not TRAININGS - {"scores", "report"} & {job.stage for job in found}


def test_results_stay_current_where_no_raw_scans_are(config: Config, tmp_path: Path):
    (tmp_path / "raw").rename(tmp_path / "elsewhere")
    assert stale(config) == set()
    assert len([job for job in all_jobs(config) if job.stage == "preprocess"]) == 12


def test_a_rule_of_quality_makes_trainings_stale_only_when_it_leaves_runs_out(
    config: Config, settings: dict[str, Any]
):
    assert stale(config_of(settings, "qc.max_mean_fd=3")) == {
        "excluded",
        "overview",
        "scores",
        "report",
    }
    strict = config_of(settings, "qc.max_mean_fd=1.15")
    assert stale(strict) == {"excluded", "overview", "baselines", *TRAININGS}
    for job in stale_jobs(strict):
        make(strict, job)
    assert stale(strict) == set()
    # Nor does how good the runs are, as long as the same are good enough.
    manifest = Layout.of(strict, "d").manifest("qc", 0)
    table = read_table(manifest)
    write_table(manifest, table.assign(mean_fd=table["mean_fd"] * 0.99))
    assert stale(strict) == set()
    assert json.loads(json.dumps(strict.model_dump(mode="json")["qc"]))["max_mean_fd"] == 1.15

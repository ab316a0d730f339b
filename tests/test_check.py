"""What `neuromamba check` says of whole and of broken datasets, before anything is computed."""

from __future__ import annotations

import gzip
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from fake_bids import add_run
from fake_raw import GOOD, add_raw_run, add_subject, add_t1w, sidecar_of

from neuromamba.check import Check, check_dataset, run_check
from neuromamba.config import Config, build_config
from neuromamba.files import InputError
from neuromamba.findings import Finding, explain, group_findings

SPACE = "MNI152NLin2009aSym"
SEX = {"kind": "classification", "column": "sex", "classes": {"female": "F", "male": "M"}}


def config_of(dataset: dict[str, Any], **settings: Any) -> Config:
    raw = {"datasets": {"d": dataset}, "models": {"m": {"family": "neuromamba"}}, **settings}
    return build_config(raw, ".", "test")


def check_raw(
    root: Path, settings: dict[str, Any] | None = None, space: str = SPACE, **dataset: Any
) -> Check:
    return check_dataset(
        config_of({"bids": str(root), "space": space, **dataset}, **(settings or {})), "d"
    )


def messages(check: Check, level: str) -> list[str]:
    return [finding.message for finding in check.findings if finding.level == level]


def kinds(check: Check, level: str) -> set[str]:
    return {finding.kind for finding in check.findings if finding.level == level}


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    """Four subjects of whom nothing is to be said; the tests break the first."""
    root = tmp_path / "raw"
    for number in range(4):
        add_subject(root, f"sub-0{number}")
    return root


BOLD = "sub-00/func/sub-00_task-rest_bold.nii.gz"
T1W = "sub-00/anat/sub-00_T1w.nii.gz"
ONE_RUN_LESS = {"used": 3, "left out": 1}


def statuses(check: Check) -> dict[str, int]:
    return dict(pd.Series([run.status for run in check.runs]).value_counts())


# --- Runs of raw datasets -----------------------------------------------------------------------


def test_a_good_dataset_is_ready(raw: Path):
    check = check_raw(raw)
    assert check.ok
    assert statuses(check) == {"used": 4}
    assert [(run.n_volumes, run.repetition_time) for run in check.runs] == [(30, 2.0)] * 4
    assert kinds(check, "warning") == kinds(check, "left out") == set()
    assert kinds(check, "note") == {"no table of subjects"}


def write_sidecar(content: Any) -> Callable[[Path], None]:
    def write(root: Path) -> None:
        text = content if isinstance(content, str) else json.dumps(content)
        sidecar_of(root / BOLD).write_text(text)

    return write


def write_image(content: bytes) -> Callable[[Path], None]:
    return lambda root: (root / BOLD).write_bytes(content) and None


def add(entities: str, **settings: Any) -> Callable[[Path], None]:
    return lambda root: add_raw_run(root, entities, **settings) and None


def break_link(name: str) -> Callable[[Path], None]:
    def relink(root: Path) -> None:
        (root / name).unlink()
        (root / name).symlink_to(root / "annex" / "object")

    return relink


def change_header(place: int, value: bytes) -> Callable[[Path], None]:
    def change(root: Path) -> None:
        content = bytearray(gzip.decompress((root / BOLD).read_bytes()))
        content[place : place + len(value)] = value
        (root / BOLD).write_bytes(gzip.compress(bytes(content)))

    return change


def truncate_plain(root: Path) -> None:
    content = gzip.decompress((root / BOLD).read_bytes())
    (root / BOLD).unlink()
    (root / BOLD.removesuffix(".gz")).write_bytes(content[:-100])


@pytest.mark.parametrize(
    ("damage", "kind", "details"),
    [
        (write_sidecar({}), "missing RepetitionTime", "(the NIfTI header says 2 s)"),
        (
            write_sidecar({"RepetitionTime": 2000}),
            "RepetitionTime must be seconds, above 0",
            "2000",
        ),
        (write_sidecar({"RepetitionTime": "2"}), "RepetitionTime must be seconds, above 0", "'2'"),
        (write_sidecar({"RepetitionTime": True}), "RepetitionTime must be seconds", "True"),
        (write_sidecar("{"), "is not valid JSON", "sub-00_task-rest_bold.json"),
        (write_sidecar("[]"), "must hold a JSON object", "sub-00_task-rest_bold.json"),
        (write_sidecar({**GOOD, "SliceTiming": [0, 1]}), "bad SliceTiming", "2 times for 4 slices"),
        (write_sidecar({**GOOD, "SliceTiming": "0"}), "bad SliceTiming", "not a list of numbers"),
        (
            write_sidecar({**GOOD, "SliceTiming": [0, 500, 1000, 1500]}),
            "bad SliceTiming",
            "from 0 to 1500 s (milliseconds?), TR 2",
        ),
        (
            write_sidecar({**GOOD, "SliceTiming": [0, 1, 1, 2]}),
            "bad SliceTiming",
            "to 2 s, TR 2",
        ),
        (write_sidecar({**GOOD, "SliceTiming": [-1, 0, 1, 1]}), "bad SliceTiming", "from -1"),
        (
            write_sidecar({**GOOD, "SliceEncodingDirection": "z"}),
            "bad SliceTiming",
            "'z' is none of i, j, k",
        ),
        (
            add("sub-00_task-rest", shape=(4, 4, 4, 19)),
            "too few volumes",
            "19, volumes.min_volumes",
        ),
        (add("sub-00_task-rest", shape=(4, 4, 4)), "is 3D", "(4, 4, 4)"),
        (write_image(b""), "has no readable NIfTI header", "0 bytes could be read"),
        (write_image(b"no gzip" * 99), "cannot be read", "damaged or not gzip"),
        (write_image(gzip.compress(bytes(999))), "has no readable NIfTI header", "544 bytes"),
        (change_header(48, b"\xff\xff"), "has no readable NIfTI header", "generate it again"),
        (change_header(108, b"\0\0\xc0\x7f"), "has no readable NIfTI header", "again"),
        (change_header(344, b"abcd"), "has no readable NIfTI header", "again"),
        (truncate_plain, "is truncated", "shorter than its header says"),
        (break_link(BOLD), "is a link to content that is not here", "datalad get"),
        (break_link(T1W), "is a link to content that is not here", "T1w"),
        (
            break_link("sub-00/func/sub-00_task-rest_bold.json"),
            "is a link to content that is not here",
            "_bold.json",
        ),
        (add("sub-00_task-rest", suffix="bold.nii"), "duplicate run", "keep one"),
    ],
)
def test_a_broken_run_is_left_out_with_its_reason(
    raw: Path, damage: Callable[[Path], None], kind: str, details: str
):
    damage(raw)
    check = check_raw(raw)
    assert statuses(check) == ONE_RUN_LESS
    (run,) = [run for run in check.runs if run.status == "left out"]
    assert run.run == "sub-00_task-rest"
    (finding,) = [one for one in check.findings if one.level == "left out"]
    assert finding.kind.startswith(kind)
    assert details in finding.message
    assert str(raw / "sub-00") in finding.message
    assert run.reason == finding.message
    assert check.ok


def test_a_sidecar_at_the_top_serves_all_runs(raw: Path):
    for bold in raw.rglob("*_bold.nii.gz"):
        sidecar_of(bold).unlink()
    check = check_raw(raw)
    assert not check.ok
    assert kinds(check, "blocked") == {"no usable run"}
    assert "task-rest_bold.json beside dataset_description.json" in messages(check, "left out")[0]
    (raw / "task-rest_bold.json").write_text(json.dumps(GOOD))
    assert statuses(check_raw(raw)) == {"used": 4}


@pytest.mark.parametrize(
    ("damage", "level", "kind", "details"),
    [
        (add("sub-00_task-rest", step=1.0), "warning", "repetition times disagree", "says 1 s"),
        (write_sidecar({"RepetitionTime": 2}), "note", "no SliceTiming", BOLD),
        (lambda root: (root / T1W).unlink(), "note", "no T1w image", "sub-00 is registered"),
        (
            lambda root: (root / BOLD).write_bytes((root / BOLD).read_bytes()[:-5]) and None,
            "warning",
            "may be truncated",
            "gzip -t",
        ),
        (lambda root: (root / "sub-99").mkdir(), "note", "no BOLD run", "sub-99"),
    ],
)
def test_what_is_odd_is_told_and_used(
    raw: Path, damage: Callable[[Path], None], level: str, kind: str, details: str
):
    damage(raw)
    check = check_raw(raw)
    assert statuses(check) == {"used": 4}
    (finding,) = [
        one for one in check.findings if one.level == level and "table" not in one.message
    ]
    assert finding.kind == kind
    assert details in finding.message


def test_slices_may_lie_along_another_axis_and_the_correction_may_be_off(raw: Path):
    sidecar = {"RepetitionTime": 2, "SliceTiming": [0.0] * 5, "SliceEncodingDirection": "j-"}
    add_raw_run(raw, "sub-00_task-rest", shape=(4, 5, 4, 30), sidecar=sidecar)
    assert statuses(check_raw(raw)) == {"used": 4}
    write_sidecar({"RepetitionTime": 2, "SliceTiming": "wrong"})(raw)
    off = check_raw(raw, {"preprocess": {"ants": {"slice_timing": False}}})
    assert statuses(off) == {"used": 4}


def test_ants_needs_a_t1w_image_only_when_told_to(raw: Path):
    (raw / T1W).unlink()
    check = check_raw(raw, {"preprocess": {"ants": {"registration": "t1w"}}})
    assert statuses(check) == ONE_RUN_LESS
    assert kinds(check, "left out") == {"no T1w image"}


def test_ants_looks_at_the_first_t1w_image_and_fmriprep_at_all(raw: Path, licence: None):
    add_t1w(raw, "sub-00", (4, 4, 4, 5))
    add_t1w(raw, "sub-01_run-2", (4, 4, 4, 5))
    broken = {"sub-00_task-rest"}
    assert {run.run for run in check_raw(raw).runs if run.reason} == broken
    assert kinds(check_raw(raw), "left out") == {"is no T1w volume"}
    by_epi = {"preprocess": {"ants": {"registration": "epi"}}}
    assert statuses(check_raw(raw, by_epi)) == {"used": 4}
    fmriprep = {"preprocess": {"engine": "docker"}}
    assert statuses(check_raw(raw, fmriprep)) == {"used": 2, "left out": 2}


def test_echoes(raw: Path, licence: None):
    (raw / BOLD).unlink()
    for number in (1, 2, 3):
        sidecar = {**GOOD, "EchoTime": number / 100}
        add_raw_run(raw, f"sub-00_task-rest_echo-{number}", sidecar=sidecar)
    assert kinds(check_raw(raw), "left out") == {"multi-echo"}
    fmriprep = {"preprocess": {"engine": "docker"}}
    assert statuses(check_raw(raw, fmriprep)) == {"used": 4}
    add_raw_run(raw, "sub-00_task-rest_echo-3", sidecar={**GOOD, "EchoTime": 0.02})
    assert kinds(check_raw(raw, fmriprep), "left out") == {"echo times"}
    add_raw_run(raw, "sub-00_task-rest_echo-3", shape=(4, 4, 4, 29))
    assert kinds(check_raw(raw, fmriprep), "left out") == {"echoes of different shapes"}


def test_what_the_settings_do_not_select_is_counted(raw: Path):
    add_raw_run(raw, "sub-00_task-nback")
    check = check_raw(raw, entities={"task": ["rest"]}, exclude=["sub-03", "sub-77"])
    assert statuses(check) == {"used": 3, "not selected": 2}
    assert {run.run for run in check.runs if run.status == "not selected"} == {
        "sub-00_task-nback",
        "sub-03_task-rest",
    }
    assert "exclude names sub-77" in messages(check, "warning")[0]


def test_no_folder_and_too_few_subjects(tmp_path: Path):
    check = check_raw(tmp_path / "nowhere")
    assert not check.ok
    assert "set bids in the dataset YAML" in messages(check, "blocked")[0]
    add_subject(tmp_path / "raw", "sub-01")
    check = check_raw(tmp_path / "raw")
    assert not check.ok
    assert kinds(check, "blocked") == {"too few subjects"}


# --- Engines ------------------------------------------------------------------------------------


@pytest.fixture
def licence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with both containers' programs and a licence."""
    for name in ("docker", "apptainer"):
        program = tmp_path / "bin" / name
        program.parent.mkdir(exist_ok=True)
        program.write_text("#!/bin/sh\nexit 1\n")
        program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    (tmp_path / "license.txt").write_text("licence")
    monkeypatch.setenv("FS_LICENSE", str(tmp_path / "license.txt"))
    monkeypatch.delenv("TEMPLATEFLOW_HOME", raising=False)
    if (tmp_path / "raw").is_dir():
        description = {"Name": "raw", "BIDSVersion": "1.10.0"}
        (tmp_path / "raw" / "dataset_description.json").write_text(json.dumps(description))


def test_the_packaged_template_has_one_space(raw: Path):
    check = check_raw(raw, space="MNI152NLin2009cAsym")
    assert not check.ok
    assert f"set space: {SPACE}" in messages(check, "blocked")[0]


def test_the_files_of_a_template_must_exist(raw: Path, tmp_path: Path):
    (tmp_path / "t1w.nii.gz").touch()
    template = {"t1w": str(tmp_path / "t1w.nii.gz"), "mask": str(tmp_path / "mask.nii.gz")}
    settings = {"preprocess": {"ants": {"template": template}}}
    check = check_raw(raw, settings, space="MNI152NLin6Asym")
    (message,) = messages(check, "blocked")
    assert f"template.mask is {tmp_path / 'mask.nii.gz'}, which does not exist" in message
    settings = {"preprocess": {"ants": {"template": {"mask": template["t1w"]}}}}
    assert "has neither t1w nor epi" in messages(check_raw(raw, settings), "blocked")[0]


def test_ants_must_be_installed(raw: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("neuromamba.check_engine.find_spec", lambda name: None)
    assert "antspyx is not installed" in messages(check_raw(raw), "blocked")[0]


@pytest.mark.parametrize("engine", ["docker", "apptainer"])
def test_fmriprep_needs_its_container_a_licence_and_a_description(
    raw: Path, tmp_path: Path, licence: None, engine: str, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "fmriprep.sif").touch()
    own = {"image": str(tmp_path / "fmriprep.sif")} if engine == "apptainer" else {}
    settings = {"preprocess": {"engine": engine, "fmriprep": own}}
    space = "MNI152NLin2009cAsym"
    assert check_raw(raw, settings, space).ok
    (raw / "dataset_description.json").write_text('{"Name": "raw"}')
    (message,) = messages(check_raw(raw, settings, space), "blocked")
    assert "lacks BIDSVersion" in message
    (raw / "dataset_description.json").unlink()
    (message,) = messages(check_raw(raw, settings, space), "blocked")
    assert "dataset_description.json does not exist" in message
    monkeypatch.delenv("FS_LICENSE")
    monkeypatch.delenv("FREESURFER_HOME", raising=False)
    assert "licence" in messages(check_raw(raw, settings, space), "blocked")[0]
    monkeypatch.setenv("PATH", "")
    assert "PATH" in messages(check_raw(raw, settings, space), "blocked")[0]


def test_fmriprep_needs_t1w_images_unless_there_are_derivatives(raw: Path, licence: None):
    (raw / T1W).unlink()
    check = check_raw(raw, {"preprocess": {"engine": "docker"}})
    assert kinds(check, "left out") == {"no T1w image"}
    own = {"flags": ["--derivatives", "anat=/somewhere"]}
    check = check_raw(raw, {"preprocess": {"engine": "docker", "fmriprep": own}})
    assert statuses(check) == {"used": 4}


# --- Labels -------------------------------------------------------------------------------------


def with_table(raw: Path, rows: list[str], header: str = "participant_id\tsex\tsite") -> Check:
    (raw / "participants.tsv").write_text("\n".join([header, *rows]) + "\n")
    participants = {"file": str(raw / "participants.tsv"), "site_column": "site"}
    return check_raw(raw, participants=participants, targets={"sex": SEX})


def test_labels_are_counted_by_class_and_site(raw: Path):
    rows = ["sub-00\tF\ta", "sub-01\tM\ta", "sub-02\tM\tb", "sub-03\tn/a\tb", "sub-09\tF\tb"]
    check = with_table(raw, rows)
    counts = check.labels.counts.set_index(["site", "value"])["subjects"].to_dict()
    assert counts == {
        ("all", "female"): 1,
        ("all", "male"): 2,
        ("all", "n/a"): 1,
        ("a", "female"): 1,
        ("a", "male"): 1,
        ("a", "n/a"): 0,
        ("b", "female"): 0,
        ("b", "male"): 1,
        ("b", "n/a"): 1,
    }
    notes = {finding.kind: finding.name for finding in check.findings if finding.level == "note"}
    assert notes == {"no label of target sex": "sub-03", "no scans": "sub-09"}
    assert kinds(check, "warning") == {"few subjects in a part of the split"}
    assert any("class female of target sex has" in text for text in messages(check, "warning"))


def test_subjects_without_a_row_and_cells_of_no_class(raw: Path):
    check = with_table(raw, ["sub-00\tF\ta", "sub-01\tM\ta", "sub-02\tX\ta"])
    assert "no row in the table of subjects" in kinds(check, "warning")
    assert any("'X' (1 x)" in text for text in messages(check, "warning"))
    assert check.ok


@pytest.mark.parametrize(
    ("rows", "header", "details"),
    [
        (["sub-0000\tF\ta"], "participant_id\tsex\tsite", "make the labels agree (leading zeros?)"),
        (["sub-00\tF\ta"], "id\tsex\tsite", "has no column 'participant_id'"),
        (["sub-00\tF\ta"], "participant_id\tgender\tsite", "has no column 'sex'"),
        (["sub-00\tF\ta"] * 2, "participant_id\tsex\tsite", "more than one row for sub-00"),
        ([], "participant_id\tsex\tsite", "has no rows"),
    ],
)
def test_a_table_that_cannot_be_used_blocks(raw: Path, rows: list[str], header: str, details: str):
    check = with_table(raw, rows, header)
    assert not check.ok
    assert any(details in text for text in messages(check, "blocked"))


def test_enough_subjects_of_each_class_give_no_warning(tmp_path: Path):
    for number in range(40):
        add_raw_run(tmp_path, f"sub-{number:02}_task-rest")
    rows = [f"sub-{number:02}\t{'FM'[number % 2]}\ta" for number in range(40)]
    check = with_table(tmp_path, rows)
    assert kinds(check, "warning") == set()
    without = with_table(tmp_path, [f"sub-{number:02}\tn/a\ta" for number in range(40)])
    assert kinds(without, "warning") == {"target sex has no values"}
    assert without.ok


# --- Derivatives --------------------------------------------------------------------------------


def check_derivatives(root: Path, settings: dict[str, Any] | None = None, **own: Any) -> Check:
    return check_dataset(config_of({"derivatives": str(root), **own}, **(settings or {})), "d")


def test_derivatives_are_judged_as_the_index_will(tmp_path: Path):
    for number in range(5):
        add_run(tmp_path, f"sub-0{number}_task-rest")
    add_run(tmp_path, "sub-04_task-nback")
    next(tmp_path.rglob("sub-00*brain_mask.nii.gz")).unlink()
    add_run(tmp_path, "sub-01_task-rest", shape=(4, 4, 4, 10))
    next(tmp_path.rglob("sub-02*confounds_timeseries.tsv")).unlink()
    check = check_derivatives(tmp_path, entities={"task": ["rest"]})
    assert check.ok
    assert statuses(check) == {"used": 3, "left out": 2, "not selected": 1}
    assert kinds(check, "left out") == {"no brain mask", "too few volumes"}
    assert "no confounds table" in kinds(check, "note")
    denoise = {"volumes": {"denoise": {"strategy": ["motion"]}}}
    check = check_derivatives(tmp_path, denoise, entities={"task": ["rest"]})
    assert "no confounds table" in kinds(check, "left out")


def test_a_truncated_scan_of_derivatives_is_told(tmp_path: Path):
    for number in range(3):
        bold = add_run(tmp_path, f"sub-0{number}_task-rest")
    bold.write_bytes(bold.read_bytes()[:-30])
    assert kinds(check_derivatives(tmp_path), "warning") == {"may be truncated"}


def test_a_raw_dataset_that_was_preprocessed_elsewhere(raw: Path, tmp_path: Path):
    for number in range(3):
        add_run(tmp_path / "made", f"sub-0{number}_task-rest", f"space-{SPACE}")
    own = {"bids": str(raw), "derivatives": str(tmp_path / "made"), "space": SPACE}
    check = check_dataset(config_of(own, preprocess={"engine": "none"}), "d")
    assert (check.folder, statuses(check)) == (str(tmp_path / "made"), {"used": 3})
    assert check_dataset(config_of(own), "d").folder == str(raw)
    shutil.rmtree(raw)
    assert check_dataset(config_of(own), "d").folder == str(tmp_path / "made")


# --- Effort -------------------------------------------------------------------------------------


def test_effort_grows_with_the_runs_that_are_used(raw: Path, licence: None):
    settings = {"preprocess": {"engine": "docker"}}
    rows = {row["stage"]: row for row in check_raw(raw, settings).effort.rows}
    assert list(rows) == ["preprocess (docker)", "volumes", "tokens", "rois"]
    assert rows["preprocess (docker)"]["core_hours"] == pytest.approx(4 * 8)
    assert rows["preprocess (docker)"]["hours_per_job"] == pytest.approx(8 / 2)
    (raw / BOLD).write_bytes(b"")
    fewer = {row["stage"]: row for row in check_raw(raw, settings).effort.rows}
    for stage, row in rows.items():
        assert fewer[stage]["bytes"] == pytest.approx(0.75 * row["bytes"], rel=1e-3)
    notes = " ".join(check_raw(raw, settings).effort.notes)
    assert "rule of thumb of its documentation" in notes
    assert "measured" in " ".join(check_raw(raw).effort.notes)


def test_other_settings_than_the_measured_ones_give_no_estimate(raw: Path):
    check = check_raw(raw, {"volumes": {"voxel_size": 3.0}})
    assert [row["stage"] for row in check.effort.rows] == ["preprocess (ants)"]
    assert "cannot be estimated" in " ".join(check.effort.notes)


def test_a_disk_that_is_too_small(raw: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("neuromamba.check_effort._free", lambda path: (Path("/disk"), 1000))
    assert "/disk has 0 GB left" in messages(check_raw(raw), "warning")[0]


# --- Formats ------------------------------------------------------------------------------------


@pytest.fixture
def broken(raw: Path) -> Config:
    write_sidecar({})(raw)
    add_raw_run(raw, "sub-01_task-rest", sidecar={"RepetitionTime": 2})
    add_raw_run(raw, "sub-02_task-rest", sidecar={"RepetitionTime": 2})
    return config_of({"bids": str(raw), "space": SPACE})


def test_the_text_begins_with_the_summary(broken: Config):
    checked = run_check(broken, "d")
    lines = checked.text.splitlines()
    assert "used: 3 runs of 3 subjects" in lines[1]
    assert "left out: 1; not selected: 0; warnings: 0; notes: 3" in lines[1]
    assert "  2 x no SliceTiming: sub-01_task-rest, sub-02_task-rest" in lines
    assert lines[-1] == "ready"
    assert checked.ok


def test_tsv_has_a_row_a_run_and_json_has_everything(broken: Config):
    table = pd.read_csv(io.StringIO(run_check(broken, "d", "tsv").text), sep="\t").set_index("run")
    assert list(table["status"]) == ["left out", "used", "used", "used"]
    assert "missing RepetitionTime" in table.loc["sub-00_task-rest", "reason"]
    assert table.loc["sub-01_task-rest", "notes"] == "no SliceTiming"
    whole = json.loads(run_check(broken, "d", "json").text)
    assert whole["ok"] is True
    assert whole["summary"]["runs"] == {"used": 3, "left out": 1, "not selected": 0}
    assert [row["run"] for row in whole["runs"]] == list(table.index)
    assert {group["kind"] for group in whole["findings"]} >= {"missing RepetitionTime"}
    with pytest.raises(InputError, match="must be one of table, tsv, json"):
        run_check(broken, "d", "xml")


def test_findings_are_counted_by_kind_whatever_their_files():
    findings = [
        Finding("note", f"run-{n}", f"/some/where/{n}.nii.gz is 3D (shape {n}); remove it")
        for n in range(7)
    ]
    findings.append(Finding("blocked", "", "no docker: install it"))
    blocked, noted = group_findings(findings)
    assert (blocked.level, noted.kind, len(noted.names)) == ("blocked", "is 3D", 7)
    text = explain([blocked, noted])
    assert "  7 x is 3D: run-0, run-1, run-2, run-3 and 3 more" in text
    assert "    for example: /some/where/0.nii.gz is 3D (shape 0); remove it" in text


def test_the_real_scan(real_data: Path):
    check = check_raw(real_data / "studyforrest_sub02_bids")
    (run,) = check.runs
    assert (run.status, run.n_volumes, run.repetition_time) == ("used", 156, 2.0)
    assert kinds(check, "note") >= {"no SliceTiming"}
    assert kinds(check, "blocked") == {"too few subjects"}

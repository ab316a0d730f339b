"""What `neuromamba check` says of the events of targets that are states."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
from fake_bids import add_run
from test_check import check_raw, config_of, kinds, messages

from neuromamba.check import Check, check_dataset, run_check

STATE = {"kind": "state", "classes": {"places": "house", "faces": "face"}, "lag": 4}
RUNS = [f"sub-0{number}_task-view" for number in range(5)]


@pytest.fixture
def made(tmp_path: Path) -> Path:
    """Five runs of 30 volumes and 60 s, each with its events."""
    for run in RUNS:
        add_run(tmp_path / "made", run)
        write_events(tmp_path, run, [(0, 24, "house"), (24, 30, "face"), (54, "n/a", "n/a")])
    return tmp_path


def write_events(folder: Path, run: str, rows: list[tuple]) -> Path:
    path = folder / "raw" / run.split("_")[0] / "func" / f"{run}_events.tsv"
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pd.DataFrame(rows, columns=["onset", "duration", "trial_type"])
    table.to_csv(path, sep="\t", index=False)
    return path


def check(folder: Path, **state: object) -> Check:
    dataset = {
        "derivatives": str(folder / "made"),
        "events": str(folder / "raw"),
        "targets": {"view": {**STATE, **state}},
    }
    return check_dataset(config_of(dataset), "d")


def counts(found: Check) -> dict[str, int]:
    return found.labels.counts.set_index("value")["subjects"].to_dict()


def test_subjects_are_counted_by_state(made: Path):
    found = check(made)
    assert found.ok
    assert counts(found) == {"places": 5, "faces": 5, "n/a": 0}
    assert kinds(found, "warning") == set()
    assert "so no targets but states" in " ".join(messages(found, "note"))


def test_a_state_that_few_subjects_have_is_warned_of(made: Path):
    write_events(made, RUNS[0], [(0, 24, "house"), (24, 18, "face")])  # 9 volumes
    found = check(made)
    assert counts(found) == {"places": 5, "faces": 4, "n/a": 0}
    assert kinds(found, "warning") == {"few subjects in a state"}
    assert "faces of target view lasts 10 volumes in 4 of 5" in messages(found, "warning")[0]


def test_a_run_without_events_is_noted(made: Path):
    write_events(made, RUNS[1], []).unlink()
    found = check(made)
    assert found.ok
    assert counts(found) == {"places": 4, "faces": 4, "n/a": 1}
    assert any(RUNS[1] in one for one in messages(found, "note") if "no events" in one)


def test_no_events_at_all_stop_the_dataset(made: Path):
    for run in RUNS:
        write_events(made, run, []).unlink()
    found = check(made)
    assert not found.ok
    assert "no events at all of target view" in messages(found, "blocked")[0]
    gone = check_dataset(
        config_of(
            {
                "derivatives": str(made / "made"),
                "events": str(made / "nowhere"),
                "targets": {"view": STATE},
            }
        ),
        "d",
    )
    assert "nowhere is not a folder" in messages(gone, "blocked")[0]


def test_broken_events_stop_the_dataset_with_file_and_line(made: Path):
    path = write_events(made, RUNS[2], [(0, 24, "house"), ("later", 30, "face")])
    found = check(made)
    assert not found.ok
    assert f"{path}, line 3: onset is 'later'" in messages(found, "blocked")[0]
    assert "no column 'kind'" in messages(check(made, column="kind"), "blocked")[0]


def test_the_text_has_a_table_of_states(made: Path):
    dataset = {
        "derivatives": str(made / "made"),
        "events": str(made / "raw"),
        "targets": {"view": STATE},
    }
    text = run_check(config_of(dataset), "d").text
    assert "view  places  faces  n/a" in text


def test_events_of_raw_scans_are_beside_them(tmp_path: Path):
    from fake_raw import add_subject

    for number in range(4):
        add_subject(tmp_path, f"sub-0{number}")
        path = tmp_path / f"sub-0{number}/func/sub-0{number}_task-rest_events.tsv"
        path.write_text("onset\tduration\ttrial_type\n0\t24\thouse\n24\t30\tface\n")
    found = check_raw(tmp_path, targets={"view": STATE})
    assert counts(found) == {"places": 4, "faces": 4, "n/a": 0}

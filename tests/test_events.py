"""Events of task runs: which table, which events, which volumes and windows."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from pydantic import ValidationError

from neuromamba.config import Dataset, State
from neuromamba.events import (
    NONE,
    EventFiles,
    label_volumes,
    label_windows,
    read_events,
    sample_name,
    state_of,
    subject_of,
)
from neuromamba.files import InputError

CLASSES = {"places": ["house", "scene"], "faces": "face"}


def state(**changes: object) -> State:
    return State.model_validate({"kind": "state", "classes": CLASSES, **changes})


def write(path: Path, *rows: str, header: str = "onset duration trial_type") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [header, *rows]
    path.write_text("".join("\t".join(line.split()) + "\n" for line in lines))
    return path


def test_the_nearest_table_applies_and_asks_for_no_entity_that_the_run_lacks(tmp_path: Path):
    everyone = write(tmp_path / "task-view_events.tsv")
    session = write(tmp_path / "sub-01/ses-a/sub-01_ses-a_task-view_events.tsv")
    own = write(tmp_path / "sub-01/ses-a/func/sub-01_ses-a_task-view_run-02_events.tsv")
    write(tmp_path / "sub-01/ses-a/func/sub-01_ses-a_task-view_run-02_acq-x_events.tsv")
    write(tmp_path / "sub-01/ses-a/func/sub-01_ses-a_task-view_run-02_eventsbeh.tsv")
    files = EventFiles(tmp_path)
    assert files.find("sub-01_ses-a_task-view_run-02") == own
    assert files.find("sub-01_ses-a_task-view_run-2") == own  # leading zeros mean nothing
    assert files.find("sub-01_ses-a_task-view_run-1") == session
    assert files.find("sub-02_task-view") == everyone
    assert files.find("sub-02_task-rest") is None


def test_two_tables_that_apply_alike_are_refused(tmp_path: Path):
    write(tmp_path / "sub-01/func/sub-01_task-view_events.tsv")
    write(tmp_path / "sub-01/func/sub-01_run-1_events.tsv")
    with pytest.raises(InputError, match="both apply to sub-01_task-view_run-1; keep one"):
        EventFiles(tmp_path).find("sub-01_task-view_run-1")


def test_only_events_of_the_classes_count(tmp_path: Path):
    path = write(
        tmp_path / "events.tsv", "10 4 scene", "0 5 face", "n/a n/a press", "2 n/a n/a", "7 1 house"
    )
    events = read_events(path, state())
    assert events.onset.tolist() == [0, 7, 10]
    assert events.end.tolist() == [5, 8, 14]
    assert events.state.tolist() == [1, 0, 0]


def test_cells_that_are_numbers_are_compared_as_numbers(tmp_path: Path):
    path = write(tmp_path / "events.tsv", "0 5 1.0", "5 5 02", header="onset duration load")
    events = read_events(path, state(column="load", classes={"low": 1, "high": [2, 3]}))
    assert events.state.tolist() == [0, 1]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("n/a 5 face", "line 3: onset is n/a, not a number of seconds"),
        ("1 n/a face", "line 3: duration is n/a"),
        ("1 long face", "line 3: duration is 'long'"),
        ("1 -2 face", "line 3: duration is below 0"),
    ],
)
def test_an_event_without_a_time_is_named(tmp_path: Path, row: str, message: str):
    path = write(tmp_path / "events.tsv", "0 1 house", row)
    with pytest.raises(InputError, match=message) as caught:
        read_events(path, state())
    assert str(path) in str(caught.value)


def test_a_missing_column_is_named_with_those_there_are(tmp_path: Path):
    path = write(tmp_path / "events.tsv", "0 1 face", header="onset duration stimulus")
    with pytest.raises(InputError, match="no column 'trial_type'; it has: onset, duration, stim"):
        read_events(path, state())


def test_a_volume_is_of_what_happened_in_its_middle_before_the_lag(tmp_path: Path):
    path = write(tmp_path / "events.tsv", "4 4 face", "8 2 house")
    events = read_events(path, state())
    times = np.arange(10) * 2.0
    # Middles are 1, 3, 5, ...; without a lag those in [4, 8) see a face, those in [8, 10) a house.
    assert label_volumes(times, 2.0, events, 0.0).tolist() == [-1, -1, 1, 1, 0, *[-1] * 5]
    assert label_volumes(times, 2.0, events, 4.0).tolist() == [*[-1] * 4, 1, 1, 0, -1, -1, -1]
    # A middle on the edge is the later event's, whatever the rounding.
    assert label_volumes(times, 2.0, events, 5.0).tolist() == [*[-1] * 4, 1, 1, 0, -1, -1, -1]
    # Times are those of the volumes that are left.
    assert label_volumes(times[[2, 7]], 2.0, events, 0.0).tolist() == [1, -1]


def test_where_events_overlap_the_one_that_began_last_counts(tmp_path: Path):
    path = write(tmp_path / "events.tsv", "4 2 house", "0 20 face", "4 1 face", "10 0 house")
    labels = label_volumes(np.arange(10) * 2.0, 2.0, read_events(path, state()), 0.0)
    assert labels.tolist() == [1, 1, 0, *[1] * 7]
    path = write(tmp_path / "events.tsv", "0 4 house", "0 4 face")
    labels = label_volumes(np.arange(2) * 2.0, 2.0, read_events(path, state()), 0.0)
    assert labels.tolist() == [1, 1]


@pytest.mark.parametrize("share", [0.3, 0.5, 0.75, 1.0])
@pytest.mark.parametrize(("window", "step"), [(4, 2), (6, 3), (4, 1)])
def test_windows_are_of_the_state_that_most_volumes_have(share: float, window: int, step: int):
    rng = np.random.default_rng(0)
    labels = rng.integers(-1, 3, size=60).repeat(rng.integers(1, 5, size=60))[:101]
    expected = []
    for start in range(0, len(labels) // step * step - window + 1, step):
        inside = labels[start : start + window].tolist()
        counts = sorted(((inside.count(k), k) for k in range(3)), reverse=True)
        (most, best), (second, _) = counts[:2]
        expected.append(best if most > second and most >= share * window else NONE)
    found = label_windows(labels, window, step, share, 3)
    assert found.tolist() == expected
    assert len(set(expected)) > 2 or share == 1


def test_a_run_shorter_than_a_window_has_none():
    assert label_windows(np.zeros(5, np.int64), 6, 2, 0.5, 2).shape == (0,)


def test_a_sample_is_a_subject_in_a_state():
    assert sample_name("sub-01", "a:b") == "sub-01:a:b"
    assert (subject_of("sub-01:a:b"), state_of("sub-01:a:b")) == ("sub-01", "a:b")
    assert (subject_of("sub-01"), state_of("sub-01")) == ("sub-01", "")


def test_the_settings_of_a_state():
    assert state().classes == {"places": ["house", "scene"], "faces": ["face"]}
    assert state().class_names == ["places", "faces"]
    with pytest.raises(ValidationError, match="'a' and 'b' have the same cell 'x'"):
        state(classes={"a": "x", "b": ["y", "x"]})
    with pytest.raises(ValidationError, match="at least 2"):
        state(classes={"a": "x"})
    with pytest.raises(ValidationError, match="at least 1"):
        state(classes={"a": "x", "b": []})


def test_a_cell_that_two_classes_have_in_two_ways_is_refused(tmp_path: Path):
    path = write(tmp_path / "events.tsv", "0 5 1", header="onset duration load")
    target = state(column="load", classes={"low": "1", "high": ["2", "1.0"]})
    with pytest.raises(InputError, match=r"'low' and 'high' have the same cell '1\.0'"):
        read_events(path, target)
    same = state(column="load", classes={"low": ["1", "1.0"], "high": "2"})
    assert read_events(path, same).state.tolist() == [0]


def test_events_lie_with_the_raw_scans_unless_told_otherwise():
    assert Dataset(derivatives="made").events_folder == "made"
    assert Dataset(derivatives="made", bids="raw").events_folder == "raw"
    assert Dataset(derivatives="made", bids="raw", events="apart").events_folder == "apart"


def test_events_of_real_runs(real_data: Path):
    """Blocks of 22.5 s of eight kinds of pictures, one run a file, in one folder."""
    kinds = ("face", "house", "cat", "bottle", "scissors", "shoe", "chair", "scrambledpix")
    target = state(classes={name: name for name in kinds})
    files = EventFiles(real_data / "haxby_25mm")
    path = files.find("sub-001_task-objectviewing_run-3")
    assert path is not None
    assert "run-03" in path.name
    labels = label_volumes(np.arange(121) * 2.5, 2.5, read_events(path, target), 5.0)
    assert np.bincount(labels[labels >= 0]).tolist() == [9] * 8

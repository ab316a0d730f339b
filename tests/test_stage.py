"""A batch of runs: the bad are left out with a reason, the good go on."""

from __future__ import annotations

import errno
from collections import Counter
from pathlib import Path

import pytest

from neuromamba.files import InputError
from neuromamba.stage import batch_of, process_runs, usable_runs
from neuromamba.tables import read_table


def test_batches_are_of_like_size_and_a_subject_stays_in_its_own():
    subjects = [f"sub-{k:05d}" for k in range(2000)]
    sizes = Counter(batch_of(subject, 8) for subject in subjects)
    assert sorted(sizes) == list(range(8))
    assert 200 < min(sizes.values()) <= max(sizes.values()) < 300
    assert batch_of("sub-00007", 8) == 2  # for good, or finished datasets would be cut anew


def make(run: str) -> dict[str, object]:
    if run == "bad":
        raise InputError("bad.nii.gz: is\n truncated\tsomewhere; fetch it again")
    return {"n_volumes": 10}


def test_a_bad_run_is_listed_and_the_others_go_on(tmp_path: Path):
    manifest = tmp_path / "batch-0.tsv"
    process_runs("volumes", ["a", "bad", "b"], make, manifest, max_excluded=0.5)
    table = read_table(manifest).set_index("run")
    assert table.loc["bad", "reason"] == "bad.nii.gz: is truncated somewhere; fetch it again"
    assert table.loc[["a", "b"], "n_volumes"].tolist() == [10, 10]
    assert usable_runs([manifest]) == ["a", "b"]


def test_too_many_bad_runs_fail_the_stage_with_the_reasons(tmp_path: Path):
    manifest = tmp_path / "batch-0.tsv"
    with pytest.raises(InputError, match=r"1 of 3 runs cannot be used(.|\n)*bad: bad\.nii\.gz"):
        process_runs("volumes", ["a", "bad", "b"], make, manifest, max_excluded=0.2)
    assert not manifest.exists()


def test_no_usable_run_fails_whatever_the_share(tmp_path: Path):
    with pytest.raises(InputError, match="1 of 1 runs"):
        process_runs("volumes", ["bad"], make, tmp_path / "batch-0.tsv", max_excluded=1.0)


def test_a_full_disk_fails_the_stage_and_says_so(tmp_path: Path):
    def fill(run: str) -> dict[str, object]:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(InputError, match="disk is full while writing a; free some space"):
        process_runs("volumes", ["a"], fill, tmp_path / "batch-0.tsv", max_excluded=1.0)
    assert not (tmp_path / "batch-0.tsv").exists()


def test_an_error_that_is_not_the_datas_is_not_hidden(tmp_path: Path):
    def fail(run: str) -> dict[str, object]:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        process_runs("volumes", ["a"], fail, tmp_path / "batch-0.tsv", max_excluded=1.0)

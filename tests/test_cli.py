"""The command line: help for each stage, and errors a person can act on."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from neuromamba.cli import main

STAGES = ["demo-data", "index", "volumes", "tokens", "rois", "splits"]
STAGES += ["pretrain", "finetune", "evaluate", "report", "summary"]
STAGES += ["forecast", "embed", "export", "verify", "estimate"]


@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_explains_itself(stage: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as caught:
        main([stage, "--help"])
    assert caught.value.code == 0
    assert "usage: neuromamba " + stage in capsys.readouterr().out


def test_the_package_runs_as_a_module():
    command = [sys.executable, "-m", "neuromamba", "--help"]
    told = subprocess.run(command, capture_output=True, text=True, check=True)
    assert told.stdout.startswith("usage: neuromamba ")


@pytest.fixture
def config(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.chdir(tmp_path)
    files = [str(root / "config" / name) for name in ("config.yaml", "demo.yaml")]
    return ["--config", *files]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["index"], "data/demo"),
        (["index", "--dataset", "other"], "the config has demo; 'other' is none of them"),
        (["volumes"], "index/batch-0.tsv does not exist"),
        (["volumes", "--batch", "7"], "compute.batches allows 0 to 1"),
        (["pretrain", "--model", "other"], "the config has neuromamba-tiny"),
        (["finetune", "--target", "height"], "the config has sex, age"),
        (["finetune", "--fold", "fold-0"], "holdout, which has no folds"),
        (
            ["finetune", "--fold", "fold-9", "--set", "splits={protocol: k-fold}"],
            "'fold-9' is none of them",
        ),
        (
            ["explain", "--set", "splits={protocol: k-fold}"],
            "--fold: the config has fold-0, fold-1",
        ),
        (["evaluate", "--pool"], "--pool puts all folds"),
        (
            ["evaluate", "--pool", "--fold", "fold-0", "--set", "splits={protocol: k-fold}"],
            "--pool puts all folds",
        ),
        (
            [
                "pretrain",
                "--fraction",
                "0.5",
                "--fold",
                "fold-0",
                "--set",
                "splits={protocol: k-fold}",
            ],
            "always of the first fold",
        ),
        (["explain", "--steps", "4"], "--output is missing"),
        (["index", "--set", "volumes.size=3"], "unknown key 'volumes.size'"),
    ],
)
def test_mistakes_end_with_one_message(
    config: list[str], capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
):
    assert main([*arguments, *config]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"neuromamba {arguments[0]}: error: ")
    assert words in error

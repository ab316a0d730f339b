"""Snakemake, as the tests of whole workflows call it."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path


def run_snakemake(
    folder: Path, root: Path, configfile: str, *arguments: str
) -> subprocess.CompletedProcess[str]:
    """Run the repository's workflow in a working folder, on two cores."""
    command = [sys.executable, "-m", "snakemake", *arguments]
    command += ["--snakefile", str(root / "Snakefile"), "--directory", str(folder)]
    command += ["--cores", "2", "--configfile", configfile]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


def printed(done: subprocess.CompletedProcess[str]) -> str:
    """What Snakemake printed, after it has done all that was asked of it."""
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def announced_jobs(text: str) -> dict[str, int]:
    """How many jobs of each rule a dry run announces."""
    if "Nothing to be done" in text:
        return {}
    table = text.split("Job stats:")[1].split("total")[0]
    return {rule: int(n) for rule, n in re.findall(r"^(\w+) +(\d+)$", table, re.MULTILINE)}

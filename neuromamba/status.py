"""Which results are not those of the config, and recording them in DVC when all are."""

from __future__ import annotations

import subprocess
from pathlib import Path

from neuromamba.config import Config
from neuromamba.data_manifest import write_manifest
from neuromamba.files import InputError
from neuromamba.keys import Keys
from neuromamba.stages import all_jobs

SHOWN = 20


def what_is_stale(config: Config) -> list[str]:
    """One line for each job of the config that has to run, with the reason, in order."""
    keys = Keys(config)
    return [f"{job}: {keys.why(job)}" for job in all_jobs(config) if keys.is_stale(job)]


def accept_code(config: Config) -> list[str]:
    """Take results for those of the present code where nothing but code has changed.

    For code that was rewritten and is known to give the same. Results whose settings or data have
    changed stay out of date, and so do all below them.

    Returns
    -------
    list of str
        The jobs whose results were accepted.
    """
    keys = Keys(config)
    return [str(job) for job in all_jobs(config) if keys.is_stale(job) and keys.accept(job)]


def record_in_dvc(config: Config) -> None:
    """Record in `dvc.lock` what Snakemake made, as if `dvc repro` had made it.

    Raises
    ------
    InputError
        When a result is missing or not that of the config, so that nothing is recorded; or when
        DVC fails.
    """
    stale = what_is_stale(config)
    if stale:
        more = [f"... and {len(stale) - SHOWN} more"] if len(stale) > SHOWN else []
        lines = "\n  ".join([*stale[:SHOWN], *more])
        raise InputError(
            "nothing is recorded, because the results are not those of the config:\n  "
            f"{lines}\nrun `snakemake all` to its end first"
        )
    for name, dataset in config.datasets.items():
        if Path("data", name, "manifest.tsv").exists():
            write_manifest(dataset, name)
    done = subprocess.run(["dvc", "commit", "--force"], check=False)
    if done.returncode:
        raise InputError(f"`dvc commit` ended with status {done.returncode}; see its message above")

"""Run a job and leave the record of what it found on disk."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pandas as pd

from neuromamba.config import Config
from neuromamba.key_inputs import read_listing
from neuromamba.keys import Keys
from neuromamba.layout import Layout
from neuromamba.records import read_record, remove_record, write_record
from neuromamba.stages import Job


@contextmanager
def recorded(config: Config, job: Job) -> Iterator[None]:
    """Run a job in this block: its old record goes before, the new one is written on success.

    The record is of what the block finds on disk, whatever the config says of the jobs before it.
    Of the processes of a distributed job, the first writes.
    """
    if os.environ.get("RANK", "0") != "0":
        yield
        return
    keys = Keys(config) if job.stage == "index" else _OnDisk(config)
    record = keys.record(job)
    remove_record(config, job)
    yield
    write_record(config, job, record)


class _OnDisk(Keys):
    """The same for a job that starts: the jobs before it are what their records say."""

    def _recipe_before(self, job: Job, code: bool) -> str:
        return str(read_record(self.config, job).get("recipe" if code else "plan"))

    def _key_before(self, job: Job, code: bool) -> str:
        return str(read_record(self.config, job).get("key" if code else "origin"))

    def _outside_before(self, job: Job) -> str | None:
        name = "atlas" if job.stage == "rois" else "tokenizer"
        return read_record(self.config, job).get("outside", {}).get(name)

    def _data(self, job: Job) -> Any:
        # What a split is made of is checked later, against the subjects that it then has.
        names = self.config.splits.names
        return [True, len(names)] if job.stage == "splits" else super()._data(job)

    def _list_runs(self, dataset: str) -> pd.DataFrame:
        index = Layout.of(self.config, dataset).index
        return read_listing(index) if index.exists() else super()._list_runs(dataset)

"""Keys: whether what lies on disk is what the settings, the code and the data of now would give.

Every job writes a small record beside its result: the settings and the code it ran with, and a
key, which is a digest of these, of the recipes of the jobs before it, and of the data it worked on.
A result is current when its record has the key that the job would have now. Records travel with
the results (copied, or by DVC), so neither dates nor a history are needed to tell.

Two things are deliberately not in a key. A split, once written, stays until its settings change
or it is removed, so that subjects added later are processed but change no training. And nothing of
`compute` counts, on which no result depends but by rounding.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd

import neuromamba
from neuromamba.anat_scan import find_anatomicals
from neuromamba.atlases import atlas_digest, is_named
from neuromamba.config import Config
from neuromamba.files import InputError, digest_file, digest_json, read_json, write_json
from neuromamba.layout import Layout
from neuromamba.listing import LISTING_COLUMNS, list_runs_of
from neuromamba.participants import read_participants
from neuromamba.qc_rules import left_out
from neuromamba.raw_bids import fingerprint_subject
from neuromamba.raw_listing import failed_runs, raw_subjects
from neuromamba.records import Record, explain, read_record, write_record
from neuromamba.source_code import code_of
from neuromamba.splits import read_split
from neuromamba.stage import batch_of
from neuromamba.stages import (
    BY_BATCH,
    Job,
    jobs_before,
    model_of,
    modules_of,
    output_of,
    settings_of,
)
from neuromamba.tables import read_table

NOT_MADE = "not made yet"
FOLLOWS = "what comes before it has to run"
UNKNOWN = "to be preprocessed"
"""Stands for the fingerprint of runs that are still to be made of raw scans."""
DECIDING = ("splits", "qc")
"""Stages whose outcome, which no recipe holds, decides what the jobs after them work on."""
LISTING = ("excluded", "overview")
"""Stages that only list what others found."""


class Keys:
    """The keys that results would have under a config, and which results have them.

    Listings and labels are read once, when they are first asked for.

    A key has a twin, the `origin`, in which no code counts: it tells whether only code has changed.
    """

    def __init__(self, config: Config):
        self.config = config
        self._recipes: dict[tuple[Job, bool], str] = {}
        self._keys: dict[tuple[Job, bool], str | None] = {}
        self._stale: dict[Job, bool] = {}
        self._below_stale: dict[Job, bool] = {}
        self._listings: dict[str, pd.DataFrame] = {}
        self._trained_on: dict[str, list[str]] = {}
        self._labels: dict[str, pd.DataFrame] = {}
        self._outside: dict[Job, dict[str, str]] = {}

    def record(self, job: Job) -> Record:
        """What the record of a job's result would hold."""
        key = self.key(job)
        return {
            "job": str(job),
            "key": key,
            "origin": self.key(job, code=False),
            "outside": self._outside.get(job, {}),
            "recipe": self.recipe(job),
            "plan": self.recipe(job, code=False),
            "settings": settings_of(self.config, job),
            "code": code_of(*modules_of(self.config, job)),
            "neuromamba": neuromamba.__version__,
        }

    def key(self, job: Job, code: bool = True) -> str | None:
        """Digest of a job's recipe and data (without `code`: origin); `None` while it has none."""
        if (job, code) not in self._keys:
            try:
                parts = [self.recipe(job, code), self._data(job), self._chained(job, code)]
                self._keys[job, code] = digest_json(parts)
            except (InputError, OSError):  # the stage itself tells what is wrong
                self._keys[job, code] = None
        return self._keys[job, code]

    def recipe(self, job: Job, code: bool = True) -> str:
        """Digest of settings and code of a job and of all before it (without `code`: plan)."""
        any_batch = replace(job, batch=0) if job.stage in BY_BATCH else replace(job, subject="")
        if (any_batch, code) not in self._recipes:
            own = [job.stage, settings_of(self.config, job)]
            if code:
                own.append(code_of(*modules_of(self.config, job)))
            # A split stays when what lies before it changes; its data tell whether it still serves.
            # So do the runs that are good enough, of which only the outcome counts.
            before = [] if job.stage == "splits" else jobs_before(self.config, job)
            earlier = [one for one in before if job.stage in LISTING or one.stage != "qc"]
            recipes = sorted({self._recipe_before(one, code) for one in earlier})
            self._recipes[any_batch, code] = digest_json([*own, recipes])
        return self._recipes[any_batch, code]

    def _recipe_before(self, job: Job, code: bool) -> str:
        return self.recipe(job, code)

    def _key_before(self, job: Job, code: bool) -> str:
        return str(self.key(job, code))

    def is_stale(self, job: Job) -> bool:
        """Whether a job has to run: its result is missing, or is not that of now."""
        if job not in self._stale:
            key = read_record(self.config, job).get("key")
            # A split that is made again may be another one; how it turns out is not known before.
            # Nor is which runs are good enough, while their quality has not been measured.
            before = [] if job.stage in LISTING else jobs_before(self.config, job)
            again = any(self.is_stale(one) for one in before if one.stage in DECIDING)
            self._stale[job] = again or key is None or key != self.key(job)
        return self._stale[job]

    def is_below_stale(self, job: Job) -> bool:
        """Whether any job before this one, at whatever distance, has to run."""
        if job not in self._below_stale:
            before = jobs_before(self.config, job)
            found = any(self.is_stale(one) or self.is_below_stale(one) for one in before)
            self._below_stale[job] = found
        return self._below_stale[job]

    def accept(self, job: Job) -> bool:
        """Give a result the record of now, if it is whole and nothing but code has changed."""
        old, new = read_record(self.config, job), self.record(job)
        before = jobs_before(self.config, job)
        if not old or old.get("origin") != new["origin"] or any(map(self.is_stale, before)):
            return False
        output = output_of(self.config, job)
        if output.name == "model.json":  # which a training asks whether it is done
            write_json(output, read_json(output) | {"code": new["code"]})
        write_record(self.config, job, new)
        self._stale[job] = False
        return True

    def why(self, job: Job) -> str:
        """In words, why a job has to run."""
        old = read_record(self.config, job)
        changes = explain(old, self.record(job)) if old else [NOT_MADE]
        if changes:
            return "; ".join(changes)
        if self.is_below_stale(job):
            return FOLLOWS
        return "what it works on has changed: runs, labels, atlas, batches or weights to start from"

    def came_later(self, dataset: str) -> list[str]:
        """Subjects with data that are in no part of the dataset's split, which is older."""
        layout = Layout.of(self.config, dataset)
        if not (layout.split.exists() and layout.excluded.exists()):
            return []
        left_out = read_table(layout.excluded, dtype=str)["run"]
        try:
            runs, known = self._listing(dataset), self._subjects(dataset)
        except InputError:  # the stage itself tells what is wrong
            return []
        return sorted(set(runs.loc[~runs["run"].isin(left_out), "subject"]) - set(known))

    # --- Data -----------------------------------------------------------------------------------

    def _data(self, job: Job) -> Any:
        """What a job works on beside the results of those before it, JSON-able."""
        match job.stage:
            case "preprocess":
                return self._raw_digest(job)
            case "index":
                keys = {"derivatives", "entities", "files", "exclude", "resolution"}
                where = self.config.datasets[job.dataset].model_dump(mode="json", include=keys)
                return [where, self.config.compute.batches, self._rows(job.dataset)]
            case "volumes" | "tokens" | "qc":
                return self._rows(job.dataset, job.batch)
            case "anat":
                return [self._rows(job.dataset, job.batch), self._anatomicals(job)]
            case "rois":
                return [self._rows(job.dataset, job.batch), self._atlas(job)]
            case "splits":
                return self._frozen(job.dataset)
            case "excluded":
                return self._rows(job.dataset)
            case "overview":
                return [self._rows(job.dataset), self._left_out(job.dataset)]
            case "scaling" | "scores" | "report":
                return []
        data: list[Any] = []
        for name in self.config.members(job.dataset):
            data += self._subjects_and_runs(name)
            if job.stage not in ("pretrain", "forecast"):
                data.append(self._labels_digest(job, name))
        if job.stage in ("pretrain", "cell"):
            start = model_of(self.config, job).pretrain.init_from
            data.append(self._digest(job, "init_from", start and f"{start}/model.json"))
        return data

    def _chained(self, job: Job, code: bool) -> list[str]:
        """What the key depends on of the data of the jobs before, as recipes hold none.

        Labels, weights to start from or another member of a mixture stand in the keys of trainings.
        """
        before = jobs_before(self.config, job)
        match job.stage:
            case "scaling" | "scores" | "report":
                return [self._key_before(one, code) for one in before]
            case "finetune" | "evaluate" | "forecast":
                trained = [one for one in before if one.stage in ("pretrain", "finetune")]
                atlases = {str(self._atlas_before(one)) for one in before if one.stage == "rois"}
                return [self._key_before(one, code) for one in trained] + sorted(atlases)
        return []

    def _left_out(self, dataset: str) -> list[str]:
        """The runs that the rules of quality leave out, by what has been measured."""
        return sorted(left_out(self.config, dataset))

    def _raw_digest(self, job: Job) -> str | None:
        """Digest of a subject's raw files."""
        root = self.config.datasets[job.dataset].bids
        subject = raw_subjects(self.config, job.dataset).get(job.subject)
        file = None if root is None else f"{root}/{job.subject}"
        assert root is not None
        return self._digest(
            job, "raw", file, lambda: fingerprint_subject(Path(root), subject) if subject else ""
        )

    def _anatomicals(self, job: Job) -> list[list[str]]:
        """Fingerprints of the T1w images of a batch's subjects."""
        batches = self.config.compute.batches
        found = find_anatomicals(self.config.datasets[job.dataset])
        mine = [one for one in found if batch_of(one.subject, batches) == job.batch]
        return [[one.subject, one.fingerprint] for one in mine]

    def _atlas(self, job: Job) -> str | None:
        atlas = self.config.datasets[job.dataset].atlas
        if atlas is not None and is_named(atlas):
            return self._outside.setdefault(job, {}).setdefault("atlas", atlas_digest(atlas))
        return self._digest(job, "atlas", atlas, lambda: atlas_digest(str(atlas)))

    def _atlas_before(self, job: Job) -> str | None:
        return self._atlas(job)

    def _digest(
        self, job: Job, name: str, file: str | None, digest: Callable[[], str] | None = None
    ) -> str | None:
        """Digest of a file outside the results; the recorded one where it is not at hand."""
        if file is None:
            return None
        if Path(file).exists():
            value = digest() if digest else digest_file(file)
        else:
            value = read_record(self.config, job).get("outside", {}).get(name)
        self._outside.setdefault(job, {})[name] = value
        return value

    def _subjects_and_runs(self, dataset: str) -> list[str]:
        """Digests of a dataset's split, and of the runs of its subjects."""
        if dataset not in self._trained_on:
            runs = self._listing(dataset)
            of_split = runs["subject"].isin(set(self._subjects(dataset)))
            good = ~runs["run"].isin(self._left_out(dataset))
            rows = runs.loc[of_split & good, ["run", "fingerprint"]].to_numpy().tolist()
            self._trained_on[dataset] = [self._split(dataset), digest_json(rows)]
        return self._trained_on[dataset]

    def _labels_digest(self, job: Job, dataset: str) -> str | None:
        """Digest of the labels of the split's subjects: of one target, or all and the site."""

        def digest() -> str:
            people = self._people(dataset).reindex(self._subjects(dataset))
            columns = [job.target] if job.target else list(people)
            return digest_json(people[columns].astype(str).to_numpy().tolist())

        participants = self.config.datasets[dataset].participants
        file = participants.file if participants else None
        return self._digest(job, f"labels of {dataset}", file, digest)

    def _subjects(self, dataset: str) -> list[str]:
        split = read_split(Layout.of(self.config, dataset).split)
        return sorted(name for part in split.values() for name in part)

    def _split(self, dataset: str) -> str:
        return digest_file(Layout.of(self.config, dataset).split)

    def _frozen(self, dataset: str) -> bool:
        """Whether all subjects of the split, if there is one, still have runs."""
        if not Layout.of(self.config, dataset).split.exists():
            return True
        return set(self._subjects(dataset)) <= set(self._listing(dataset)["subject"])

    def _rows(self, dataset: str, batch: int | None = None) -> list[list[str]]:
        rows = self._listing(dataset)
        if batch is not None:
            rows = rows[rows["batch"] == batch]
        return rows[["run", "fingerprint"]].to_numpy().tolist()

    def _listing(self, dataset: str) -> pd.DataFrame:
        if dataset not in self._listings:
            table = self._list_runs(dataset)
            batches = self.config.compute.batches
            numbers = {name: batch_of(name, batches) for name in table["subject"].unique()}
            self._listings[dataset] = table.assign(batch=table["subject"].map(numbers))
        return self._listings[dataset]

    def _list_runs(self, dataset: str) -> pd.DataFrame:
        """The runs as they are now, or as the index has them where the scans are elsewhere."""
        settings = self.config.datasets[dataset]
        index = Layout.of(self.config, dataset).index
        folder = Path(settings.bids or settings.derivatives)
        if index.exists() and not (folder.is_dir() and any(folder.iterdir())):
            return read_listing(index)
        waiting = self._waiting(dataset)
        try:
            with warnings.catch_warnings(action="ignore"):  # the stage itself warns
                made = list_runs_of(settings)
        except InputError:
            if not settings.bids:
                raise
            made = pd.DataFrame(columns=LISTING_COLUMNS, dtype="string")
        if not settings.bids:
            return made
        failed = failed_runs(self.config, dataset)[LISTING_COLUMNS]
        known = pd.concat([made, failed], ignore_index=True)
        known = known[~known["subject"].isin(waiting)]
        rows = [(name, name, UNKNOWN) for name in waiting]
        to_come = pd.DataFrame(rows, columns=LISTING_COLUMNS, dtype="string")
        return pd.concat([known, to_come], ignore_index=True).sort_values("run", kind="stable")

    def _waiting(self, dataset: str) -> list[str]:
        """The subjects whose raw scans are to be preprocessed."""
        jobs = jobs_before(self.config, Job("index", dataset))
        return [job.subject for job in jobs if self.is_stale(job)]

    def _people(self, dataset: str) -> pd.DataFrame:
        if dataset not in self._labels:
            with warnings.catch_warnings(action="ignore"):
                self._labels[dataset] = read_participants(self.config.datasets[dataset])
        return self._labels[dataset]


def read_listing(index: Path) -> pd.DataFrame:
    """The listing that an `index.tsv` holds; `InputError` when it is of an older version."""
    table = read_table(index, dtype="string")
    if missing := set(LISTING_COLUMNS) - set(table):
        raise InputError(f"{index} has no column {', '.join(missing)}; make the index again")
    return table[LISTING_COLUMNS]

"""What the jobs of a config work on beside the results of the jobs before them, as digests."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd

from neuromamba.anat_scan import Anatomical, find_anatomicals
from neuromamba.atlases import atlas_digest, is_named
from neuromamba.config import Config
from neuromamba.events import EventFiles
from neuromamba.files import InputError, digest_file, digest_folder, digest_json
from neuromamba.layout import Layout
from neuromamba.listing import LISTING_COLUMNS, list_runs_of
from neuromamba.participants import read_participants, read_rows
from neuromamba.preprocess_key import template_files
from neuromamba.qc_rules import left_out
from neuromamba.raw_bids import fingerprint_subject
from neuromamba.raw_listing import failed_runs, raw_subjects
from neuromamba.records import read_record
from neuromamba.splits import read_split
from neuromamba.stage import batch_of
from neuromamba.stages import Job, extra_jobs, jobs_before, model_of
from neuromamba.tables import read_table

UNKNOWN = "to be preprocessed"
"""Stands for the fingerprint of runs that are still to be made of raw scans."""


class Inputs(ABC):
    """Scans, labels, atlases, splits and weights, each read once, when it is first asked for."""

    def __init__(self, config: Config):
        self.config = config
        self._listings: dict[str, pd.DataFrame] = {}
        self._trained_on: dict[tuple[str, str], list[str]] = {}
        self._labels: dict[str, pd.DataFrame] = {}
        self._events: dict[str, str] = {}
        self._outside: dict[Job, dict[str, str]] = {}
        self._images: dict[str, list[Anatomical]] = {}
        self._digests: dict[str, str] = {}

    @abstractmethod
    def is_stale(self, job: Job) -> bool:
        """Whether a job has to run; of the preprocessing, on which the list of runs depends."""

    def _data(self, job: Job) -> Any:
        """What a job works on beside the results of those before it, JSON-able."""
        match job.stage:
            case "preprocess":
                return [self._raw_digest(job), self._templates(job)]
            case "index":
                keys = {"derivatives", "entities", "files", "exclude", "resolution"}
                where = self.config.datasets[job.dataset].model_dump(mode="json", include=keys)
                return [where, self.config.compute.batches, self._rows(job.dataset)]
            case "volumes" | "tokens" | "qc":
                return self._rows(job.dataset, job.batch)
            case "codes":
                return [self._rows(job.dataset, job.batch), self._tokenizer_weights(job)]
            case "anat":
                folder = self.config.datasets[job.dataset].derivatives
                found = self._digest(job, "T1w images", folder, lambda: self._anatomicals(job))
                return [self._rows(job.dataset, job.batch), found]
            case "rois" if self.config.datasets[job.dataset].series is not None:
                # Which regions the tables must have is told by all of them.
                return self._rows(job.dataset)
            case "rois":
                return [self._rows(job.dataset, job.batch), self._atlas(job)]
            case "splits":
                return [self._frozen(job.dataset), len(self.config.splits.names)]
            case "excluded":
                return self._rows(job.dataset)
            case "overview":
                return self._rows(job.dataset)
            case "report":
                return [read_record(self.config, one).get("key") for one in extra_jobs(self.config)]
            case "scaling" | "ablations" | "scores":
                return []
        data: list[Any] = []
        for name in self.config.members(job.dataset):
            data += self._subjects_and_runs(name, job.fold)
            if job.model and "anat" in model_of(self.config, job).arrays:
                data.append(self._images_digest(job, name))
            if job.target in self.config.datasets[name].state_targets:
                data.append(self._events_digest(job, name))
            elif job.stage not in ("tokenizer", "pretrain", "forecast", "identify"):
                data.append(self._labels_digest(job, name))
            if job.stage == "baselines":
                data.append(self._facts_digest(job, name))
        if job.stage in ("pretrain", "cell"):
            start = model_of(self.config, job).pretrain.init_from
            data.append(self._digest(job, "init_from", start and f"{start}/model.json"))
            if weights := getattr(model_of(self.config, job), "image_weights", None):
                data.append(self._digest(job, "image_weights", weights))
        return data

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

    def _templates(self, job: Job) -> dict[str, str | None]:
        """Digests of the files that subjects are registered to."""
        return {
            name: self._digest(job, f"template {name}", file, partial(self._template, file))
            for name, file in template_files(self.config.preprocess).items()
        }

    def _template(self, file: str) -> str:
        if file not in self._digests:
            self._digests[file] = digest_file(file)
        return self._digests[file]

    def _anatomicals(self, job: Job) -> str:
        """Digest of the T1w images of a batch's subjects."""
        batches = self.config.compute.batches
        found = self._found_images(job.dataset)
        mine = [one for one in found if batch_of(one.subject, batches) == job.batch]
        return digest_json([[one.subject, one.fingerprint] for one in mine])

    def _images_digest(self, job: Job, dataset: str) -> str | None:
        """Digest of the T1w images of the split's subjects."""

        def digest() -> str:
            subjects = set(self._subjects(dataset))
            found = [one for one in self._found_images(dataset) if one.subject in subjects]
            return digest_json([[one.subject, one.fingerprint] for one in found])

        folder = self.config.datasets[dataset].derivatives
        return self._digest(job, f"T1w images of {dataset}", folder, digest)

    def _found_images(self, dataset: str) -> list[Anatomical]:
        if dataset not in self._images:
            self._images[dataset] = find_anatomicals(self.config.datasets[dataset])
        return self._images[dataset]

    def _atlas(self, job: Job) -> str | None:
        settings = self.config.datasets[job.dataset]
        # Series have their regions already; an atlas only shows where these are.
        atlas = settings.atlas if settings.series is None else None
        if atlas is not None and is_named(atlas):
            return self._outside.setdefault(job, {}).setdefault("atlas", atlas_digest(atlas))
        return self._digest(job, "atlas", atlas, lambda: atlas_digest(str(atlas)))

    def _tokenizer_weights(self, job: Job) -> str | None:
        """Digest of the folder of weights that codes are made by; those on the hub stay."""
        codes = self.config.codes
        folder = None if codes.trained or codes.on_hub else codes.weights

        def digest() -> str:
            name = str(folder)
            if name not in self._digests:  # a gigabyte, and as many jobs as batches
                self._digests[name] = digest_folder(Path(name))
            return self._digests[name]

        return self._digest(job, "tokenizer", folder, digest)

    def _outside_before(self, job: Job) -> str | None:
        """Digest of what one of the jobs before works on that lies outside the results."""
        return self._atlas(job) if job.stage == "rois" else self._tokenizer_weights(job)

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

    def _subjects_and_runs(self, dataset: str, fold: str) -> list[str]:
        """Digests of a dataset's split (of a fold, or all folds), and of its subjects' runs."""
        if (dataset, fold) not in self._trained_on:
            runs = self._listing(dataset)
            of_split = runs["subject"].isin(set(self._subjects(dataset)))
            good = ~runs["run"].isin(self._left_out(dataset))
            rows = runs.loc[of_split & good, ["run", "fingerprint"]].to_numpy().tolist()
            self._trained_on[dataset, fold] = [self._split(dataset, fold), digest_json(rows)]
        return self._trained_on[dataset, fold]

    def _labels_digest(self, job: Job, dataset: str) -> str | None:
        """Digest of the labels of the split's subjects: of one target, or all and the site."""

        def digest() -> str:
            people = self._people(dataset).reindex(self._subjects(dataset))
            columns = [job.target] if job.target else list(people)
            return digest_json(people[columns].astype(str).to_numpy().tolist())

        participants = self.config.datasets[dataset].participants
        file = participants.file if participants else None
        return self._digest(job, f"labels of {dataset}", file, digest)

    def _events_digest(self, job: Job, dataset: str) -> str | None:
        """Digest of the events of the split's subjects' runs."""
        folder = self.config.datasets[dataset].events_folder

        def digest() -> str:
            if dataset not in self._events:
                runs, files = self._listing(dataset), EventFiles(folder)
                known = runs.loc[runs["subject"].isin(set(self._subjects(dataset))), "run"]
                found = {run: files.find(run) for run in known}
                content = {run: path and digest_file(path) for run, path in found.items()}
                self._events[dataset] = digest_json(content)
            return self._events[dataset]

        return self._digest(job, f"events of {dataset}", folder, digest)

    def _facts_digest(self, job: Job, dataset: str) -> str | None:
        """Digest of all that the table tells of the split's subjects, which confounds come from."""
        participants = self.config.datasets[dataset].participants
        if participants is None:
            return None

        def digest() -> str:
            rows = read_rows(participants).reindex(self._subjects(dataset))
            return digest_json([list(rows), rows.astype(str).to_numpy().tolist()])

        return self._digest(job, f"facts of {dataset}", participants.file, digest)

    def _subjects(self, dataset: str) -> list[str]:
        split = read_split(self._first_split(dataset))
        return sorted(name for part in split.values() for name in part)

    def _first_split(self, dataset: str) -> Path:
        """The split, or one of the folds, which all are of the same subjects."""
        return Layout.of(self.config.in_fold(self.config.splits.names[0]), dataset).split

    def _split(self, dataset: str, fold: str) -> str:
        layout = Layout.of(self.config.in_fold(fold), dataset)
        all_folds = not fold and self.config.splits.protocol != "holdout"
        return digest_file(layout.folds if all_folds else layout.split)

    def _frozen(self, dataset: str) -> bool:
        """Whether all subjects of the split, if there is one, still have runs."""
        if not self._first_split(dataset).exists():
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
        if index.exists() and not _has_scans(settings.derivatives):
            known = read_listing(index)
        else:
            known = self._list_made(dataset)
        waiting = self._waiting(dataset)
        if not waiting:
            return known
        known = known[~known["subject"].isin(waiting)]
        rows = [(name, name, UNKNOWN) for name in waiting]
        to_come = pd.DataFrame(rows, columns=LISTING_COLUMNS, dtype="string")
        return pd.concat([known, to_come], ignore_index=True).sort_values("run", kind="stable")

    def _list_made(self, dataset: str) -> pd.DataFrame:
        """The runs of the derivatives, and those that could not be made of raw scans."""
        settings = self.config.datasets[dataset]
        if not settings.bids:
            with warnings.catch_warnings(action="ignore"):  # the stage itself warns
                return list_runs_of(settings)
        failed = failed_runs(self.config, dataset)[LISTING_COLUMNS]
        try:
            with warnings.catch_warnings(action="ignore"):
                made = list_runs_of(settings)
        except InputError:
            return failed
        made = made[~made["run"].isin(failed["run"])]
        both = pd.concat([made, failed], ignore_index=True)
        return both.sort_values("run", kind="stable", ignore_index=True)

    def _waiting(self, dataset: str) -> list[str]:
        """The subjects whose raw scans are to be preprocessed."""
        jobs = jobs_before(self.config, Job("index", dataset))
        return [job.subject for job in jobs if self.is_stale(job)]

    def _people(self, dataset: str) -> pd.DataFrame:
        if dataset not in self._labels:
            with warnings.catch_warnings(action="ignore"):
                self._labels[dataset] = read_participants(self.config.datasets[dataset])
        return self._labels[dataset]


def _has_scans(folder: str) -> bool:
    """Whether there is anything in a folder of derivatives but hidden files."""
    path = Path(folder)
    return path.is_dir() and any(not entry.name.startswith(".") for entry in path.iterdir())


def read_listing(index: Path) -> pd.DataFrame:
    """The listing that an `index.tsv` holds; `InputError` when it is of an older version."""
    table = read_table(index, dtype="string")
    if missing := set(LISTING_COLUMNS) - set(table):
        raise InputError(f"{index} has no column {', '.join(missing)}; make the index again")
    return table[LISTING_COLUMNS]

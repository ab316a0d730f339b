"""Keys: whether what lies on disk is what the settings, the code and the data of now would give.

Every job writes a small record beside its result: the settings and the code it ran with, and a
key, which is a digest of these, of the recipes of the jobs before it, and of the data it worked on.
A result is current when its record has the key that the job would have now. Records travel with
the results (copied, or by DVC), so neither dates nor a history are needed to tell.

Two things are deliberately not in a key. A split, once written, stays until its settings change
or it is removed, so that subjects added later are processed but change no training; more repeats of
its folds are added to those that there are. And nothing of `compute` counts, on which no result
depends but by rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import neuromamba
from neuromamba.config import Config
from neuromamba.files import InputError, digest_json, read_json, write_json
from neuromamba.key_inputs import Inputs
from neuromamba.layout import Layout
from neuromamba.raw_listing import got_less
from neuromamba.records import Record, explain, read_record, write_record
from neuromamba.source_code import code_of
from neuromamba.stage_settings import settings_of, settings_of_recipe
from neuromamba.stages import (
    BY_BATCH,
    Job,
    jobs_before,
    modules_of,
    output_of,
)
from neuromamba.tables import read_table

NOT_MADE = "not made yet"
FOLLOWS = "what comes before it has to run"
DECIDING = ("splits", "qc")
"""Stages whose outcome, which no recipe holds, decides what the jobs after them work on."""
RESULTS = ("pretrain", "finetune", "baselines", "evaluate")
"""Stages whose results depend on data, and which others work on."""
LISTING = ("excluded", "overview")
"""Stages that only list what others found."""


class Keys(Inputs):
    """The keys that results would have under a config, and which results have them.

    Listings and labels are read once, when they are first asked for.

    A key has a twin, the `origin`, in which no code counts: it tells whether only code has changed.
    """

    def __init__(self, config: Config):
        super().__init__(config)
        self._recipes: dict[tuple[Job, bool], str] = {}
        self._keys: dict[tuple[Job, bool], str | None] = {}
        self._stale: dict[Job, bool] = {}
        self._kept: dict[str, int] = {}
        self._below_stale: dict[Job, bool] = {}

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
            own = [job.stage, settings_of_recipe(self.config, job)]
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
            again = any(self._may_decide(one, job) for one in before if one.stage in DECIDING)
            again = again or self._got_less(job)
            self._stale[job] = again or key is None or key != self.key(job)
        return self._stale[job]

    def _may_decide(self, deciding: Job, job: Job) -> bool:
        """Whether a job has to run whose outcome may be another one for a job after it."""
        if not self.is_stale(deciding):
            return False
        if deciding.stage == "splits" and job.fold:
            number = self.config.splits.names.index(job.fold)
            return number >= self.kept_repeats(job.dataset) * self.config.splits.folds
        return True

    def kept_repeats(self, dataset: str) -> int:
        """How many repeats of a dataset's folds stay as they are when it is split again.

        All of those asked for that there are, where their number has changed and nothing else;
        none where it has not, for then somebody wants another split.
        """
        if dataset not in self._kept:
            self._kept[dataset] = self._count_kept(dataset)
        return self._kept[dataset]

    def _count_kept(self, dataset: str) -> int:
        splits = Job("splits", dataset)
        record = read_record(self.config, splits)
        if record.get("recipe") != self.recipe(splits):
            return 0
        made: int = record["settings"]["splits"].get("repeats", 0)
        if made == self.config.splits.repeats:
            return 0
        kept = min(made, self.config.splits.repeats)
        names = self.config.splits.names[: kept * self.config.splits.folds]
        files = [Layout.of(self.config.in_fold(name), dataset).split for name in names]
        try:
            whole = all(file.exists() for file in files) and self._frozen(dataset)
        except InputError:  # the stage itself tells what is wrong
            return 0
        return kept if whole else 0

    def _got_less(self, job: Job) -> bool:
        return job.stage == "preprocess" and got_less(self.config, job.dataset, job.subject)

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
        if self._got_less(job):
            return "it failed, and other limits of memory or time are set now"
        if self.is_below_stale(job):
            return FOLLOWS
        return (
            "what it works on has changed: runs, labels, events, atlas, batches or initial weights"
        )

    def came_later(self, dataset: str) -> list[str]:
        """Subjects with data that are in no part of the dataset's split, which is older."""
        layout = Layout.of(self.config, dataset)
        if not (self._first_split(dataset).exists() and layout.excluded.exists()):
            return []
        left_out = read_table(layout.excluded, dtype=str)["run"]
        try:
            runs, known = self._listing(dataset), self._subjects(dataset)
        except InputError:  # the stage itself tells what is wrong
            return []
        return sorted(set(runs.loc[~runs["run"].isin(left_out), "subject"]) - set(known))

    def _chained(self, job: Job, code: bool) -> list[str]:
        """What the key depends on of the data of the jobs before, as recipes hold none.

        Labels, weights to start from or another member of a mixture stand in the keys of trainings.
        """
        before = jobs_before(self.config, job)
        match job.stage:
            case "scaling" | "ablations" | "scores" | "report":
                return [self._key_before(one, code) for one in before]
            case "overview":
                listed = [one for one in before if one.stage == "excluded"]
                return [self._key_before(one, code) for one in listed]
            case "codes":
                trained = [one for one in before if one.stage == "tokenizer"]
                return [self._key_before(one, code) for one in trained]
            case "excluded" | "baselines" | "pretrain" | "cell":
                return self._outsides(before)
            case "finetune" | "evaluate" | "forecast" | "identify" | "retrieve" | "explain":
                made = [one for one in before if one.stage in RESULTS]
                return [self._key_before(one, code) for one in made] + self._outsides(before)
        return []

    def _outsides(self, before: Sequence[Job]) -> list[str]:
        """Digests of the atlas and of the weights of a tokenizer, which no recipe holds."""
        read = [one for one in before if one.stage in ("rois", "codes")]
        return sorted({str(self._outside_before(one)) for one in read})

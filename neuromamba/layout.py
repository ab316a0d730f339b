"""Where every result lies. The workflow's rules name the same paths with wildcards."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from neuromamba.config import Config


@dataclass(frozen=True)
class Layout:
    """Paths of one dataset's results under `results/{dataset}`.

    `arrays` is where the Zarr stores lie; `None` puts them beside their manifests. `fold` is the
    fold of a cross-validation, of which the split and what is trained on it are; `of_fold` are the
    data stages whose results are a fold's too.
    """

    results: Path
    dataset: str
    arrays: Path | None = None
    fold: str = ""
    of_fold: tuple[str, ...] = ()

    @classmethod
    def of(cls, config: Config, dataset: str) -> Layout:
        """The layout of a dataset (or mixture) by the config's `results`, `arrays` and fold."""
        arrays = None if config.arrays is None else Path(config.arrays)
        of_fold = ("codes",) if config.codes.trained else ()
        return cls(Path(config.results), dataset, arrays, config.fold, of_fold)

    @property
    def root(self) -> Path:
        return self.results / self.dataset

    def preprocess(self, subject: str) -> Path:
        """What became of a raw subject."""
        return self.root / "preprocess" / f"{subject}.json"

    @property
    def index(self) -> Path:
        return self.root / "index.tsv"

    @property
    def overview(self) -> Path:
        """The page that compares the quality of all runs."""
        return self.root / "overview.html"

    def qc(self, run: str) -> Path:
        """The page of one run's quality."""
        return self.root / "qc" / f"{run}.html"

    @property
    def excluded(self) -> Path:
        return self.root / "excluded.tsv"

    @property
    def config(self) -> Path:
        return self.root / "config.yaml"

    @property
    def split(self) -> Path:
        return self.root / "splits" / f"{self.fold or 'holdout'}.tsv"

    @property
    def folds(self) -> Path:
        """Which fold each subject is tested in, in each repeat of a cross-validation."""
        return self.root / "splits" / "folds.tsv"

    def manifest(self, stage: str, batch: int) -> Path:
        """The list of the runs that a batch job of `stage` made or left out."""
        return self.root / self._folder(stage) / f"batch-{batch}.tsv"

    def array(self, stage: str, run: str) -> Path:
        """The Zarr store of one run (`volumes`, `tokens`, `rois`, `codes`) or subject (`anat`).

        A run of another dataset is named `{dataset}/{run}`.
        """
        dataset, _, name = run.rpartition("/")
        root = (self.arrays or self.results) / (dataset or self.dataset)
        return root / self._folder(stage) / f"{name}.zarr"

    def digests(self, stage: str, batch: int) -> Path:
        """What is remembered of the stores of a batch; see `neuromamba.contents`.

        It holds dates, so it lies outside of the folders that DVC versions.
        """
        root = (self.arrays or self.results) / ".digests" / self.dataset
        return root / self._folder(stage) / f"batch-{batch}.jsonl"

    def _folder(self, stage: str) -> Path:
        return Path(stage, self.fold) if stage in self.of_fold else Path(stage)

    @property
    def atlas_lock(self) -> Path:
        """Held by the job that fetches an atlas, of whichever dataset."""
        return (self.arrays or self.results) / ".digests" / "atlas.lock"

    @property
    def tokenizer(self) -> Path:
        """The autoencoder of slices that is trained on the training subjects."""
        return self.root / "tokenizer" / self.fold

    @property
    def scaling(self) -> Path:
        return self.root / "scaling"

    @property
    def ablations(self) -> Path:
        """The table that compares models with their ablations."""
        return self.root / "ablations"

    def cell(self, model: str, fraction: float, seed: int) -> Path:
        """One pretraining of the scaling study."""
        return self.scaling / model / f"fraction-{fraction:g}" / f"seed-{seed}"

    def seed(self, model: str, seed: int) -> Path:
        """All results of a model under one seed."""
        return self.root / model / f"seed-{seed}"

    def pretrain(self, model: str, seed: int) -> Path:
        return self.seed(model, seed) / "pretrain" / self.fold

    def finetune(self, model: str, seed: int, target: str) -> Path:
        return self.seed(model, seed) / "finetune" / target / self.fold

    def baselines(self, target: str) -> Path:
        return self.root / "baselines" / target / self.fold

    def evaluate(self, model: str, seed: int, target: str) -> Path:
        return self.seed(model, seed) / "evaluate" / target / self.fold

    def scores(self, model: str, seed: int) -> Path:
        return self.results / "scores" / self.dataset / model / f"seed-{seed}"

    def forecast(self, model: str, seed: int) -> Path:
        return self.seed(model, seed) / "forecast" / self.fold

    def identify(self, model: str, seed: int) -> Path:
        return self.seed(model, seed) / "identify" / self.fold

    def retrieve(self, model: str, seed: int) -> Path:
        return self.seed(model, seed) / "retrieve" / self.fold

    def explain(self, model: str, seed: int, target: str) -> Path:
        return self.seed(model, seed) / "explain" / target / self.fold

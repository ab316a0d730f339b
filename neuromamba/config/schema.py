"""The schema of a run: every key that may stand in the YAML files, with its type and its limits.

The YAML files under `config/` explain each key where it stands; here are the rules they obey.
Importing this module imports no numerical library, because the Snakefile reads it at every start.
"""

from __future__ import annotations

import os
from typing import Annotated, Any, Literal

from pydantic import Field, PositiveFloat, PositiveInt, PrivateAttr, model_validator

from neuromamba.config.checks import (
    refuse_states,
    refuse_what_needs_images,
    refuse_wrong_ablations,
    refuse_wrong_bases,
    refuse_wrong_codes,
)
from neuromamba.config.data import (
    Codes,
    Folder,
    Fraction,
    Name,
    Preprocess,
    Qc,
    Rois,
    Section,
    Splits,
    Tokens,
    Volumes,
)
from neuromamba.config.dataset import Dataset
from neuromamba.config.evaluation import Evaluate as Evaluate
from neuromamba.config.evaluation import Explain as Explain
from neuromamba.config.evaluation import Retrieve as Retrieve
from neuromamba.config.models import Cinp as Cinp
from neuromamba.config.models import Lmae as Lmae
from neuromamba.config.models import Model as Model
from neuromamba.config.models import NeuroMamba as NeuroMamba
from neuromamba.config.models import RoiTransformer as RoiTransformer
from neuromamba.config.models import Tablet as Tablet
from neuromamba.config.training import Forecast as Forecast
from neuromamba.config.training import Pretrain as Pretrain
from neuromamba.files import InputError

# --- Computing ----------------------------------------------------------------------------------


class Compute(Section):
    """How the work is cut into jobs and where it runs; results depend on it by rounding alone.

    `processes` (on each node, one for each of its GPUs) and `nodes` are those of a training;
    `container` is the image that jobs run in with Snakemake's `--sdm apptainer`.
    """

    batches: PositiveInt = 1
    max_excluded: Fraction = 0.2
    device: Literal["auto", "cpu", "cuda"] = "auto"
    kernels: Literal["auto", "torch", "mamba-ssm"] = "auto"
    compile: bool = False
    processes: PositiveInt = 1
    nodes: PositiveInt = 1
    container: str = "neuromamba.sif"


# --- The scaling study -----------------------------------------------------------------------


class Scaling(Section):
    """The scaling study: each model on each share of the training subjects, once per seed."""

    models: dict[Name, Model] | None = None
    fractions: list[Annotated[float, Field(gt=0, le=1)]] = Field(
        default=[0.01, 0.03, 0.1, 0.3, 1.0], min_length=1
    )
    seeds: list[Annotated[int, Field(ge=0)]] = Field(default=[0], min_length=1)
    steps: Literal["full", "proportional"] = "full"

    def training(self, settings: Pretrain, fraction: float) -> Pretrain:
        """The pretraining of a cell, whose length may follow the fraction."""
        if self.steps == "full":
            return settings
        steps = max(1, round(fraction * settings.steps))
        warmup = round(fraction * settings.warmup_steps)
        return settings.model_copy(update={"steps": steps, "warmup_steps": warmup})

    @model_validator(mode="after")
    def _every_cell_has_its_folder(self) -> Scaling:
        names = [f"{fraction:g}" for fraction in self.fractions]
        for key, values in (("fractions", names), ("seeds", self.seeds)):
            if len(set(values)) < len(values):
                raise ValueError(f"{key} must differ from each other (to six digits)")
        return self


# --- The whole run ------------------------------------------------------------------------------


class Config(Section):
    """A whole run: datasets x models x seeds, and the settings of every stage."""

    results: Folder = "results"
    arrays: Folder | None = None
    datasets: dict[Name, Dataset] = Field(min_length=1)
    models: dict[Name, Model] = Field(min_length=1)
    seeds: list[Annotated[int, Field(ge=0)]] = Field(default=[0], min_length=1)
    mixtures: dict[Name, dict[str, PositiveFloat]] = Field(default={})
    preprocess: Preprocess = Preprocess()
    volumes: Volumes = Volumes()
    tokens: Tokens = Tokens()
    codes: Codes = Codes()
    rois: Rois = Rois()
    qc: Qc = Qc()
    splits: Splits = Splits()
    evaluate: Evaluate = Evaluate()
    forecast: Forecast = Forecast()
    explain: Explain = Explain()
    retrieve: Retrieve = Retrieve()
    compute: Compute = Compute()
    scaling: Scaling = Scaling()
    _fold: str = PrivateAttr("")

    @property
    def fold(self) -> str:
        """The fold of the cross-validation that this is the config for; empty for none."""
        return self._fold

    def in_fold(self, name: str) -> Config:
        """This config for one fold: its split, and the folders of what is trained on that."""
        config = self.model_copy()
        config._fold = name
        return config

    @model_validator(mode="before")
    @classmethod
    def _place_derivatives(cls, raw: Any) -> Any:
        """What is made of a raw dataset goes to the results, if its YAML names no other place."""
        if not isinstance(raw, dict) or not isinstance(raw.get("datasets"), dict):
            return raw
        placed = {}
        for name, dataset in raw["datasets"].items():
            if isinstance(dataset, dict) and dataset.get("bids") and not dataset.get("derivatives"):
                place = f"{raw.get('results', 'results')}/{name}/derivatives"
                dataset = {**dataset, "derivatives": place}
            placed[name] = dataset
        return {**raw, "datasets": placed}

    def study(self) -> Config:
        """The config of the scaling study: its models and seeds in the place of the run's.

        Of a cross-validation, the study is of the first fold.

        Raises
        ------
        InputError
            When the losses of its models are of different things.
        """
        models = self.scaling.models or {
            name: model for name, model in self.whole_models.items() if model.base is None
        }
        alike = ("family", "volumes", "normalization", "order", "target", "objective", "mixture")
        for key in alike:
            found = {
                name: getattr(model.pretrain if key == "mixture" else model, key, None)
                for name, model in models.items()
            }
            if len(set(found.values())) > 1:
                raise InputError(
                    f"scaling: the losses of models that differ in {key!r} cannot be compared "
                    f"({', '.join(f'{name}: {value}' for name, value in found.items())})"
                )
        study = self.model_copy(update={"models": models, "seeds": self.scaling.seeds})
        return study.in_fold(self.splits.names[0])

    @property
    def pretrained_models(self) -> dict[str, Model]:
        """The models with a pretraining of their own, which those with a `base` share."""
        return {name: model for name, model in self.models.items() if model.base is None}

    @property
    def ablations(self) -> dict[str, Model]:
        """The models that are another without something: made and compared on request alone."""
        return {name: model for name, model in self.models.items() if model.ablation_of}

    @property
    def whole_models(self) -> dict[str, Model]:
        """The models that are no ablation of another."""
        return {name: model for name, model in self.models.items() if not model.ablation_of}

    def pretraining_of(self, dataset: str, model: str) -> tuple[str, str]:
        """The pretraining that a model of a dataset starts from: dataset or mixture, and model."""
        return self.models[model].pretrain.mixture or dataset, self.models[model].base or model

    def members(self, name: str) -> dict[str, float]:
        """The datasets of a mixture and their shares, which sum to 1; a dataset is its own."""
        weights = self.mixtures.get(name, {name: 1.0})
        return {dataset: weight / sum(weights.values()) for dataset, weight in weights.items()}

    def _every_model(self) -> list[tuple[str, Model]]:
        studied = self.scaling.models or {}
        models = [(f"models.{name}", model) for name, model in self.models.items()]
        return models + [(f"scaling.models.{name}", model) for name, model in studied.items()]

    @model_validator(mode="after")
    def _baselines_have_their_connectivity(self) -> Config:
        if "fc-partial" in self.evaluate.baselines and "partial" not in self.rois.connectivity:
            raise ValueError(
                "evaluate.baselines has fc-partial, which needs partial correlations: add partial "
                f"to rois.connectivity ({', '.join(self.rois.connectivity)})"
            )
        return self

    @model_validator(mode="after")
    def _datasets_serve_the_models(self) -> Config:
        sections = (self.qc, self.volumes, self.rois)
        refuse_what_needs_images(self.datasets, self._every_model(), *sections)
        refuse_states(self.datasets, self._every_model())
        refuse_wrong_codes(self.codes, self.volumes, self.mixtures, self._every_model())
        return self

    @model_validator(mode="after")
    def _raw_datasets_have_derivatives_of_their_own(self) -> Config:
        places: dict[str, str] = {}
        for name, dataset in self.datasets.items():
            if dataset.bids:
                other = places.setdefault(os.path.normpath(dataset.derivatives), name)
                if other != name:
                    raise ValueError(
                        f"datasets {other} and {name} both preprocess into {dataset.derivatives}, "
                        "where each would replace the other's subjects; give one another place"
                    )
        return self

    @model_validator(mode="after")
    def _mixtures_are_of_datasets(self) -> Config:
        for name, weights in self.mixtures.items():
            if name in self.datasets:
                raise ValueError(f"mixtures.{name} has the name of a dataset; give it another")
            if unknown := [dataset for dataset in weights if dataset not in self.datasets]:
                raise ValueError(
                    f"mixtures.{name}: {', '.join(unknown)} not among `datasets` "
                    f"({', '.join(self.datasets)})"
                )
            if not weights:
                raise ValueError(f"mixtures.{name} must name at least one dataset and its weight")
        for place, model in self._every_model():
            mixture = model.pretrain.mixture
            if mixture is not None and mixture not in self.mixtures:
                raise ValueError(
                    f"{place}.pretrain.mixture is {mixture!r}, which is not among `mixtures` "
                    f"({', '.join(self.mixtures) or 'none is defined'})"
                )
        return self

    @model_validator(mode="after")
    def _models_that_take_over_others_can(self) -> Config:
        refuse_wrong_bases(self.models, self.scaling.models or {})
        refuse_wrong_ablations(self.models)
        return self

    @model_validator(mode="after")
    def _mixtures_have_folds_in_common(self) -> Config:
        mixed = [name for name, model in self.models.items() if model.pretrain.mixture]
        if self.splits.protocol != "holdout" and mixed and len(self.datasets) > 1:
            raise ValueError(
                f"splits.protocol {self.splits.protocol} and a mixture (models.{mixed[0]}) do not "
                "go together: a fold of one dataset says nothing about another; use a holdout"
            )
        return self

    @model_validator(mode="after")
    def _processes_can_share_a_batch(self) -> Config:
        together = self.compute.processes * self.compute.nodes
        for place, model in self._every_model():
            for stage in ("pretrain", "finetune"):
                size = getattr(model, stage).batch_size
                if size % together:
                    raise ValueError(
                        f"{place}.{stage}.batch_size ({size}) must be a multiple of "
                        f"compute.processes x compute.nodes ({together}), which share each batch"
                    )
        return self

    @model_validator(mode="after")
    def _patches_fit(self) -> Config:
        if any(edge % self.tokens.patch for edge in self.volumes.shape):
            raise ValueError(
                f"tokens.patch ({self.tokens.patch}) must divide each edge of volumes.shape "
                f"{self.volumes.shape}"
            )
        if self.volumes.shard_volumes % self.tokens.time_patch:
            raise ValueError("tokens.time_patch must divide volumes.shard_volumes")
        for place, model in self._every_model():
            if isinstance(model, Cinp):
                continue  # it reads whole runs
            if model.volumes % self.tokens.time_patch:
                raise ValueError(
                    f"{place}.volumes ({model.volumes}) must be a multiple of "
                    f"tokens.time_patch ({self.tokens.time_patch})"
                )
            if model.volumes < 2 * self.tokens.time_patch:
                raise ValueError(
                    f"{place}.volumes ({model.volumes}) must hold at least two time patches "
                    f"of {self.tokens.time_patch} volumes, so that there is a next one to predict"
                )
        return self

"""The schema of a run: every key that may stand in the YAML files, with its type and its limits.

The YAML files under `config/` explain each key where it stands; here are the rules they obey.
Importing this module imports no numerical library, because the Snakefile reads it at every start.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, model_validator

Fraction = Annotated[float, Field(ge=0, le=1)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9.-]*$")]
"""A name that becomes a folder: letters, digits, dots and hyphens."""


class Section(BaseModel):
    """Settings that cannot change once read, and that refuse keys they do not know."""

    model_config = ConfigDict(frozen=True, extra="forbid")


# --- Datasets -----------------------------------------------------------------------------------


class Participants(Section):
    """The table of subjects."""

    file: str
    id_column: str = "participant_id"
    site_column: str | None = None


class Classification(Section):
    """A label to be predicted: class names and the cell values that mean them, positive last."""

    kind: Literal["classification"]
    column: str
    classes: dict[str, str] = Field(min_length=2)

    model_config = ConfigDict(coerce_numbers_to_str=True)


class Regression(Section):
    """A number to be predicted."""

    kind: Literal["regression"]
    column: str


Target = Annotated[Classification | Regression, Field(discriminator="kind")]


class FilePatterns(Section):
    """Where files lie when their names are not BIDS: paths with `{entity}` placeholders."""

    bold: str
    mask: str
    confounds: str | None = None


class Dataset(Section):
    """One dataset: what its files are and what is known of its subjects."""

    derivatives: str
    space: str = "MNI152NLin2009cAsym"
    resolution: str | None = None
    entities: dict[str, list[str]] = {}
    files: FilePatterns | None = None
    repetition_time: PositiveFloat | None = None
    participants: Participants | None = None
    targets: dict[Name, Target] = {}
    atlas: str | None = None
    exclude: list[str] = []


# --- Data stages --------------------------------------------------------------------------------


class Volumes(Section):
    """The grid that every run is resampled to, and how it is stored."""

    shape: tuple[PositiveInt, PositiveInt, PositiveInt] = (96, 96, 96)
    voxel_size: PositiveFloat = 2.0
    min_volumes: PositiveInt = 20
    shard_volumes: PositiveInt = 48
    compression_level: Annotated[int, Field(ge=1, le=22)] = 1


class Tokens(Section):
    """How a run is cut into patches and which of them count as brain."""

    patch: PositiveInt = 6
    time_patch: PositiveInt = 2
    brain_fraction: Fraction = 0.0


class Rois(Section):
    """ROI series without an atlas: cubes of this edge, in mm."""

    cube: PositiveFloat = 24.0


class Splits(Section):
    """The share of subjects held out for testing and for model selection."""

    test: Annotated[float, Field(gt=0, lt=1)] = 0.2
    validation: Annotated[float, Field(gt=0, lt=1)] = 0.1
    seed: int = 0

    @model_validator(mode="after")
    def _leave_some_for_training(self) -> Splits:
        if self.test + self.validation >= 1:
            raise ValueError("test + validation must leave subjects to train on (sum below 1)")
        return self


# --- Training and evaluation --------------------------------------------------------------------


class Optimiser(Section):
    """AdamW with linear warm-up and cosine decay, shared by pretraining and fine-tuning."""

    steps: PositiveInt
    batch_size: PositiveInt = 4
    accumulate: PositiveInt = 1
    learning_rate: PositiveFloat = 1e-3
    final_learning_rate: Annotated[float, Field(ge=0)] = 0.0
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    weight_decay: Annotated[float, Field(ge=0)] = 0.05
    betas: tuple[Fraction, Fraction] = (0.9, 0.95)
    clip_norm: PositiveFloat = 1.0
    precision: Literal["float32", "bfloat16"] = "float32"
    log_every: PositiveInt = 10
    validate_every: PositiveInt = 100
    validation_windows: PositiveInt = 1
    checkpoint_every: PositiveInt = 100


class Pretrain(Optimiser):
    """Self-supervised training on the subjects of the training part."""

    steps: PositiveInt = 10000


class Finetune(Optimiser):
    """Supervised training of a head, with or without the model below it."""

    steps: PositiveInt = 1000
    mode: Literal["full", "head"] = "full"
    head_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    evaluation_windows: PositiveInt = 8


class Evaluate(Section):
    """Intervals over subjects, and the baselines' inner cross-validation."""

    bootstrap: PositiveInt = 2000
    confidence: Annotated[float, Field(gt=0, lt=1)] = 0.95
    inner_folds: Annotated[int, Field(ge=2)] = 5
    allow_seen_subjects: bool = False


class Compute(Section):
    """How the work is cut into jobs and where it runs; no result depends on these."""

    batches: PositiveInt = 1
    max_excluded: Fraction = 0.2
    device: Literal["auto", "cpu", "cuda"] = "auto"


# --- Models -------------------------------------------------------------------------------------


class NeuroMamba(Section):
    """Next-patch prediction by Mamba-2 blocks over brain tokens."""

    family: Literal["neuromamba"]
    width: PositiveInt = 128
    depth: PositiveInt = 12
    state: PositiveInt = 32
    head_dim: PositiveInt = 64
    expand: PositiveInt = 2
    conv: PositiveInt = 4
    chunk: PositiveInt = 64
    bands: PositiveInt = 10
    volumes: PositiveInt = 20
    normalization: Literal["global", "voxel"] = "global"
    checkpoint_blocks: bool = False
    pretrain: Pretrain = Pretrain()
    finetune: Finetune = Finetune()

    @model_validator(mode="after")
    def _heads_fill_the_width(self) -> NeuroMamba:
        if self.width % 8:
            raise ValueError(f"width ({self.width}) must be a multiple of 8, the pooling's groups")
        if self.expand * self.width % self.head_dim:
            raise ValueError(
                f"expand * width ({self.expand * self.width}) must be a multiple of "
                f"head_dim ({self.head_dim})"
            )
        return self


Model = NeuroMamba


# --- The whole run ------------------------------------------------------------------------------


class Config(Section):
    """A whole run: datasets x models x seeds, and the settings of every stage."""

    results: Annotated[str, Field(pattern=r"^[A-Za-z0-9_./-]+$")] = "results"
    datasets: dict[Name, Dataset] = Field(min_length=1)
    models: dict[Name, Model] = Field(min_length=1)
    seeds: list[Annotated[int, Field(ge=0)]] = Field(default=[0], min_length=1)
    volumes: Volumes = Volumes()
    tokens: Tokens = Tokens()
    rois: Rois = Rois()
    splits: Splits = Splits()
    evaluate: Evaluate = Evaluate()
    compute: Compute = Compute()

    @model_validator(mode="after")
    def _patches_fit(self) -> Config:
        if any(edge % self.tokens.patch for edge in self.volumes.shape):
            raise ValueError(
                f"tokens.patch ({self.tokens.patch}) must divide each edge of volumes.shape "
                f"{self.volumes.shape}"
            )
        if self.volumes.shard_volumes % self.tokens.time_patch:
            raise ValueError("tokens.time_patch must divide volumes.shard_volumes")
        for name, model in self.models.items():
            if model.volumes % self.tokens.time_patch:
                raise ValueError(
                    f"models.{name}.volumes ({model.volumes}) must be a multiple of "
                    f"tokens.time_patch ({self.tokens.time_patch})"
                )
            if model.volumes < 2 * self.tokens.time_patch:
                raise ValueError(
                    f"models.{name}.volumes ({model.volumes}) must hold at least two time patches "
                    f"of {self.tokens.time_patch} volumes, so that there is a next one to predict"
                )
        return self

"""The schema of the data: what datasets are, and the stages that prepare them."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, model_validator

Fraction = Annotated[float, Field(ge=0, le=1)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9.-]*$")]
"""A name that becomes a folder: letters, digits, dots and hyphens."""
Folder = Annotated[str, Field(pattern=r"^[A-Za-z0-9_./-]+$")]
"""A path that becomes part of the jobs' commands, so without spaces and variables."""


class Section(BaseModel):
    """Settings that cannot change once read, and that refuse keys they do not know."""

    model_config = ConfigDict(frozen=True, extra="forbid")


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


class Volumes(Section):
    """The grid that every run is resampled to, and how it is stored."""

    shape: tuple[PositiveInt, PositiveInt, PositiveInt] = (96, 96, 96)
    voxel_size: PositiveFloat = 2.0
    min_volumes: PositiveInt = 20
    shard_volumes: PositiveInt = 480
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

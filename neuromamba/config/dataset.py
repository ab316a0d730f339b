"""The schema of a dataset: where its files are, and what is known of its subjects."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Field, PositiveFloat, model_validator

from neuromamba.config.data import Name, Section


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

    @property
    def class_names(self) -> list[str]:
        return list(self.classes)


class Regression(Section):
    """A number to be predicted."""

    kind: Literal["regression"]
    column: str

    @property
    def class_names(self) -> list[str]:
        return []


def _as_list(value: Any) -> Any:
    return value if isinstance(value, list) else [value]


class State(Section):
    """What somebody did in a part of a run, told by its events: one label a window, not a subject.

    `classes` are names and the cells of the events' `column` that mean them, one or several, the
    positive class last. `lag` is from an event to its BOLD response, in s. A window is of a state
    when at least `share` of its volumes are, and of no other state are more.
    """

    kind: Literal["state"]
    column: str = "trial_type"
    classes: dict[str, Annotated[list[str], BeforeValidator(_as_list), Field(min_length=1)]] = (
        Field(min_length=2)
    )
    lag: Annotated[float, Field(ge=0, le=30)] = 5.0
    share: Annotated[float, Field(gt=0, le=1)] = 0.5

    model_config = ConfigDict(coerce_numbers_to_str=True)

    @property
    def class_names(self) -> list[str]:
        return list(self.classes)

    @model_validator(mode="after")
    def _mean_one_class_by_a_cell(self) -> State:
        of_cell: dict[str, str] = {}
        for name, cells in self.classes.items():
            for cell in cells:
                other = of_cell.setdefault(cell.strip(), name)
                if other != name:
                    raise ValueError(f"classes {other!r} and {name!r} have the same cell {cell!r}")
        return self


Target = Annotated[Classification | Regression | State, Field(discriminator="kind")]


class FilePatterns(Section):
    """Where files lie when their names are not BIDS: paths with `{entity}` placeholders."""

    bold: str
    mask: str
    confounds: str | None = None


class Series(Section):
    """Tables of ROI series (BIDS-Derivatives), which a dataset consists of in the place of images.

    `segmentation` is the `seg-` (or older `atlas-`) label in their names; it may be left out where
    there is only one.
    """

    segmentation: str | None = None

    model_config = ConfigDict(coerce_numbers_to_str=True)


class Dataset(Section):
    """One dataset: what its files are and what is known of its subjects.

    With `series`, `derivatives` holds tables of ROI series, and `space` is that of `atlas` alone.
    `bids` is a raw dataset that the `preprocess` stage works on; what it makes goes to
    `derivatives` (left out: `{results}/{dataset}/derivatives`, which `Config` sets). `events` is
    where the `*_events.tsv` of a state's target are (left out: `bids`, or else `derivatives`).
    """

    bids: str | None = None
    derivatives: str = ""
    space: str = "MNI152NLin2009cAsym"
    resolution: str | None = None
    entities: dict[str, list[str]] = Field(default={})
    files: FilePatterns | None = None
    series: Series | None = None
    repetition_time: PositiveFloat | None = None
    participants: Participants | None = None
    targets: dict[Name, Target] = Field(default={})
    events: str | None = None
    atlas: str | None = None
    exclude: list[str] = Field(default=[])

    @property
    def arrays(self) -> tuple[str, ...]:
        """The arrays that are made of each run, in the order in which they are."""
        return ("volumes", "tokens", "rois") if self.series is None else ("rois",)

    @property
    def readable(self) -> tuple[str, ...]:
        """The arrays that a model can read: those, each subject's T1w image, each run's codes."""
        return self.arrays if self.series is not None else (*self.arrays, "anat", "codes")

    @property
    def subject_targets(self) -> dict[str, Classification | Regression]:
        """Targets with one label a subject, which the table of subjects tells."""
        return {n: one for n, one in self.targets.items() if not isinstance(one, State)}

    @property
    def state_targets(self) -> dict[str, State]:
        """Targets that the events of runs tell."""
        return {n: one for n, one in self.targets.items() if isinstance(one, State)}

    @property
    def events_folder(self) -> str:
        """Where the events of runs are."""
        return self.events or self.bids or self.derivatives

    @model_validator(mode="after")
    def _has_data_in_standard_space(self) -> Dataset:
        if not self.derivatives:
            raise ValueError("needs `derivatives` (preprocessed scans) or `bids` (raw ones)")
        if self.series is not None:
            return self._has_nothing_but_series()
        if not self.space.startswith("MNI"):
            raise ValueError(
                f"space ({self.space!r}) is not a standard one: voxels of different people are "
                "compared, so scans must lie in an MNI space, such as MNI152NLin2009cAsym; choose "
                "one of the derivatives' MNI outputs, or run fMRIPrep with one"
            )
        return self

    def _has_nothing_but_series(self) -> Dataset:
        for name in ("bids", "files", "resolution"):
            if getattr(self, name) is not None:
                raise ValueError(
                    f"{name} is about images, and `series` says that the dataset has tables of ROI "
                    f"series instead; leave {name} or series out"
                )
        return self

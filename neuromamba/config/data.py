"""The schema of the stages that prepare the data, and what all sections have in common."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

Fraction = Annotated[float, Field(ge=0, le=1)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9.-]*$")]
"""A name that becomes a folder: letters, digits, dots and hyphens."""
Folder = Annotated[str, Field(pattern=r"^[A-Za-z0-9_./-]+$")]
"""A path that becomes part of the jobs' commands, so without spaces and variables."""
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_COMMIT = re.compile(r"[0-9a-f]{40}")


class Section(BaseModel):
    """Settings that cannot change once read, and that refuse keys they do not know."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Fmriprep(Section):
    """How fMRIPrep is called; `image` and `version` by the engine that calls it."""

    version: str | None = None
    image: str | None = None
    output_spaces: list[str] = []
    freesurfer: bool = False
    license: str | None = None
    templateflow: str | None = None
    flags: list[str] = []


class Template(Section):
    """Files of a template for the `ants` engine, where the packaged one is not wanted.

    `t1w` or `epi` is needed, and `mask`; the tissue maps are probabilities, 0 to 1.
    """

    t1w: str | None = None
    epi: str | None = None
    mask: str
    gray_matter: str | None = None
    white_matter: str | None = None


class Ants(Section):
    """The engine without a container. It is not fMRIPrep (see `neuromamba.ants_engine`)."""

    template: Template | None = None
    registration: Literal["auto", "t1w", "epi"] = "auto"
    voxel_size: PositiveFloat = 2.0
    slice_timing: bool = True
    # Snakemake passes numbers inside braces on as text.
    motion_parameters: Annotated[
        Literal[6, 24], BeforeValidator(lambda value: int(value) if value in ("6", "24") else value)
    ] = 24
    interpolation: Literal["linear", "cubic"] = "cubic"


class Preprocess(Section):
    """From raw BIDS to MNI space: by whom, and with which means.

    `time_limit` is in minutes, of one subject; `scratch` is where work in progress lies (`null`: in
    the derivatives, hidden).
    """

    engine: Literal["none", "ants", "docker", "apptainer"] = "ants"
    threads: PositiveInt = 2
    memory_mb: PositiveInt = 8000
    time_limit: PositiveFloat = 1440.0
    scratch: Folder | None = None
    ants: Ants = Ants()
    fmriprep: Fmriprep = Fmriprep()


class Denoise(Section):
    """What is taken out of the signal, in the words of nilearn's `load_confounds`.

    Frequencies in Hz, `smoothing` as full width at half maximum in mm, `repetition_time` (to
    resample to) in s; `scrub` is the shortest segment in volumes that scrubbing leaves.
    """

    strategy: list[
        Literal[
            "motion",
            "wm_csf",
            "global_signal",
            "compcor",
            "high_pass",
            "scrub",
            "non_steady_state",
        ]
    ] = []
    motion: Literal["basic", "power2", "derivatives", "full"] = "full"
    wm_csf: Literal["basic", "power2", "derivatives", "full"] = "basic"
    global_signal: Literal["basic", "power2", "derivatives", "full"] = "basic"
    compcor: Literal["anat_combined", "anat_separated", "temporal"] = "anat_combined"
    n_compcor: PositiveInt | Literal["all"] = "all"
    fd_threshold: PositiveFloat = 0.5
    std_dvars_threshold: PositiveFloat = 1.5
    scrub: Annotated[int, Field(ge=0)] = 5
    detrend: bool = False
    low_pass: PositiveFloat | None = None
    high_pass: PositiveFloat | None = None
    repetition_time: PositiveFloat | None = None
    smoothing: PositiveFloat | None = None

    @model_validator(mode="after")
    def _make_sense_together(self) -> Denoise:
        if self.low_pass and self.high_pass and self.high_pass >= self.low_pass:
            raise ValueError(
                f"high_pass ({self.high_pass:g} Hz) must be below low_pass ({self.low_pass:g} Hz)"
            )
        if self.high_pass and "high_pass" in self.strategy:
            raise ValueError(
                "high_pass is given as a frequency and as a strategy (fMRIPrep's cosines); "
                "leave one out"
            )
        if "compcor" in self.strategy and "high_pass" not in self.strategy:
            raise ValueError(
                "compcor needs the high-pass filter that its components were made with: add "
                "high_pass to the strategy"
            )
        return self

    @property
    def in_time(self) -> bool:
        """Whether anything is asked for that needs a voxel's whole time course."""
        asked = (self.strategy, self.detrend, self.low_pass, self.high_pass, self.repetition_time)
        return any(asked)


class Volumes(Section):
    """The grid that every run is resampled to, what is taken out, and how it is stored."""

    denoise: Denoise = Denoise()

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


class Slices(Section):
    """Our own autoencoder of slices, and its training on the training subjects.

    `channels` are those of a code at each of 3 x 3 places, `width` those of the first layer, and
    `depth` the residual blocks at each resolution. `batch_size` is in slices.
    """

    channels: PositiveInt = 32
    width: PositiveInt = 32
    depth: Annotated[int, Field(ge=0)] = 1
    steps: PositiveInt = 3000
    batch_size: Annotated[int, Field(gt=0, multiple_of=8)] = 64
    learning_rate: PositiveFloat = 1e-3
    seed: Annotated[int, Field(ge=0)] = 0


class Codes(Section):
    """What turns volumes into 27 tokens of slice codes: whose autoencoder, and what it is shown.

    `weights` of `dc-ae` are a folder in diffusers' layout, or `owner/name` on the Hugging Face hub
    with the commit as `revision`. `batch_slices` is how many slices are encoded at a time.
    """

    tokenizer: Literal["dc-ae", "slices"] = "dc-ae"
    weights: str | None = None
    revision: str | None = None
    normalization: Literal["maximum", "voxel"] = "maximum"
    batch_slices: PositiveInt = 96
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    slices: Slices = Slices()

    @property
    def trained(self) -> bool:
        """Whether the tokenizer is trained here, on the training subjects of a split."""
        return self.tokenizer == "slices"

    @property
    def on_hub(self) -> bool:
        """Whether `weights` is a name on the hub; a folder of that form is `./owner/name`."""
        return bool(self.weights and _HUB_NAME.fullmatch(self.weights))

    @model_validator(mode="after")
    def _weights_cannot_change(self) -> Codes:
        if self.on_hub and not _COMMIT.fullmatch(self.revision or ""):
            raise ValueError(
                f"weights ({self.weights!r}) is a name on the hub, where weights can change: set "
                "`revision` to the commit, of 40 hexadecimal digits, that its page shows under "
                f"`Files`; if it is a folder, write ./{self.weights}"
            )
        if self.revision is not None and not self.on_hub:
            raise ValueError(
                f"revision ({self.revision!r}) is a commit on the hub, and weights "
                f"({self.weights!r}) is no name on it; leave revision out"
            )
        return self


class Rois(Section):
    """Regions where a dataset names no atlas, and how their connectivity is measured.

    `cube` is the edge of the cubes in mm, `min_coverage` the share of a region's voxels that must
    lie in a run's brain mask. The FC baseline takes the first kind of `connectivity`.
    """

    cube: PositiveFloat = 24.0
    min_coverage: Fraction = 0.0
    connectivity: list[Literal["pearson", "partial"]] = Field(default=["pearson"], min_length=1)
    fisher_z: bool = False

    @model_validator(mode="after")
    def _name_each_kind_once(self) -> Rois:
        if len(set(self.connectivity)) < len(self.connectivity):
            raise ValueError(f"connectivity {self.connectivity} names a kind twice")
        return self


class Qc(Section):
    """Which runs are left out for their quality; without a value, a rule does not apply.

    `max_mean_fd` and `fd_threshold` are in mm, `max_high_motion` is the share of volumes over
    `fd_threshold`, `min_minutes` what remains without them, `min_coverage` the share of the
    template's brain, `min_correlation` that of the mean volume with the template (0 to 1, see
    `neuromamba.qc_template`). `outlier` is in robust SDs from the dataset's median: such runs are
    flagged, and not left out. `pages` writes a page for each run.
    """

    max_mean_fd: PositiveFloat | None = None
    fd_threshold: PositiveFloat = 0.5
    max_high_motion: Fraction | None = None
    min_minutes: PositiveFloat | None = None
    min_coverage: Fraction | None = None
    min_correlation: Fraction | None = None
    min_tsnr: PositiveFloat | None = None
    outlier: PositiveFloat = 3.5
    pages: bool = True


class Splits(Section):
    """How the subjects are split: what is held out for testing, and for model selection.

    With `k-fold` every subject is tested once in each repeat, with `leave-site-out` whole sites
    are; `test` is the share of a `holdout` only.
    """

    protocol: Literal["holdout", "k-fold", "leave-site-out"] = "holdout"
    folds: Annotated[int, Field(ge=2)] = 5
    repeats: PositiveInt = 1
    test: Annotated[float, Field(gt=0, lt=1)] = 0.2
    validation: Annotated[float, Field(gt=0, lt=1)] = 0.1
    seed: int = 0

    @property
    def names(self) -> list[str]:
        """The folds; a holdout is a single one without a name."""
        if self.protocol == "holdout":
            return [""]
        return [f"fold-{number}" for number in range(self.folds * self.repeats)]

    @model_validator(mode="after")
    def _leave_some_for_training(self) -> Splits:
        if self.test + self.validation >= 1:
            raise ValueError("test + validation must leave subjects to train on (sum below 1)")
        if self.protocol == "leave-site-out" and self.repeats > 1:
            raise ValueError("leave-site-out has no repeats: each site is left out once")
        return self

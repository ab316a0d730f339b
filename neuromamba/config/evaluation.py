"""The schema of the evaluation: intervals, tests, and the baselines that models must beat."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveInt, model_validator

from neuromamba.config.data import Section

Baseline = Literal[
    "fc",
    "fc-regress",
    "fc-combat",
    "fc-partial",
    "fc-tangent",
    "fc-svm",
    "fc-kernel-ridge",
    "roi-mean",
    "confounds",
]
Confound = Literal["age", "sex", "site", "mean_fd", "tsnr", "n_volumes", "n_voxels"]


class Explain(Section):
    """Attribution maps of fine-tuned models.

    `steps` is how many gradients a window takes; `None`: as many as it takes to be complete.
    """

    subjects: PositiveInt = 100
    windows: PositiveInt = 2
    steps: PositiveInt | None = None


class Retrieve(Section):
    """Retrieval and prompting by models that bring two kinds of data together.

    `recall_at` are the k's of recall; `share` is how many of a class's training subjects prompt it,
    in `groups` equal groups.
    """

    recall_at: list[PositiveInt] = Field(default=[1, 5, 10], min_length=1)
    share: Annotated[float, Field(gt=0, le=1)] = 0.1
    groups: PositiveInt = 5


class Evaluate(Section):
    """Intervals over subjects, tests by permutation, and the baselines.

    `baselines` are those of `neuromamba.baselines`; `confounds` is what the confound model sees,
    and what `fc-regress` takes out of the FC. The column the target is told by, and the confound of
    the target's name, are never among them. Another column that says the same is: leave it out. Of
    states, they are only the head motion during the state (framewise displacement, and std_dvars
    beside it), where they name `mean_fd`.
    """

    bootstrap: PositiveInt = 2000
    permutations: PositiveInt = 5000
    confidence: Annotated[float, Field(gt=0, lt=1)] = 0.95
    baselines: list[Baseline] = Field(default=["fc", "confounds"])
    confounds: list[Confound] = Field(
        default=["age", "sex", "site", "mean_fd", "tsnr", "n_volumes", "n_voxels"], min_length=1
    )
    inner_folds: Annotated[int, Field(ge=2)] = 5
    allow_seen_subjects: bool = False

    @model_validator(mode="after")
    def _every_table_has_the_fc_baseline(self) -> Evaluate:
        if "fc" not in self.baselines:
            raise ValueError(f"baselines {self.baselines} must have fc among them")
        for key in ("baselines", "confounds"):
            if len(set(getattr(self, key))) < len(getattr(self, key)):
                raise ValueError(f"{key} {getattr(self, key)} names one twice")
        return self

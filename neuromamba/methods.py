"""A methods section to copy into a paper: what was done in this run, and what to cite for it.

What was done follows from records: the stores' attributes, `model.json`, the notes of the
evaluation, what there is in the results. The grid, patches, splits and numbers of resamples that it
was done with are those of the settings. What was configured and has not run is not told. Citations
are in Pandoc's form, `[@key]`; the bibliography holds what is cited and nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from neuromamba import __version__, methods_models, methods_results
from neuromamba.ants_outputs import NAME as ANTS
from neuromamba.collect import Data, Evaluation, Training
from neuromamba.config import Config, Dataset, Denoise
from neuromamba.files import write_text
from neuromamba.references import bibliography, cited_keys

HEAD = """# Methods

Written by neuromamba {version} from the records and settings of this run. Citations are keys of
`references.bib`: `pandoc --citeproc --bibliography references.bib methods.md -o methods.docx`.
"""
ANTS_TEXT = (
    "the {program} ({count}), which is not fMRIPrep: N4 bias correction [@tustison2010n4], rigid "
    "motion, slice timing where the sidecar has it, rigid registration of the run and SyN of the "
    "T1w image to the template by ANTs [@avants2008syn; @tustison2021antsx], and a single "
    "interpolation; susceptibility distortion was not corrected"
)
CONFOUNDS = {
    "motion": "head motion ({motion})",
    "wm_csf": "white matter and CSF signals ({wm_csf})",
    "global_signal": "the global signal ({global_signal})",
    "compcor": "CompCor components ({compcor}) [@behzadi2007compcor]",
    "high_pass": "cosines of a high-pass filter",
    "scrub": "volumes of high motion (scrubbing: framewise displacement above {fd_threshold:g} mm "
    "or standardised DVARS above {std_dvars_threshold:g}) [@power2012motion]",
    "non_steady_state": "volumes before the steady state",
}


@dataclass(frozen=True)
class Facts:
    """What a run has left, as far as its methods go.

    Attributes
    ----------
    data
        Of each dataset.
    attributes
        By dataset, the attributes of an example's volumes; none where there are no volumes.
    trainings, evaluations
        All that have finished.
    maps
        What was recorded beside each map of attributions.
    forecasts, identified, retrieved, scaled
        Whether there are any.
    by_snakemake
        Whether the workflow ran the jobs.
    """

    data: Sequence[Data]
    attributes: dict[str, dict[str, Any]] = field(default_factory=dict)
    trainings: Sequence[Training] = ()
    evaluations: Sequence[Evaluation] = ()
    maps: Sequence[dict[str, Any]] = ()
    forecasts: bool = False
    identified: bool = False
    retrieved: bool = False
    scaled: bool = False
    by_snakemake: bool = False


@dataclass(frozen=True)
class Methods:
    """Paragraphs by title, and the BibTeX entries of what they cite."""

    paragraphs: dict[str, str]
    bibtex: str

    @property
    def markdown(self) -> str:
        parts = [f"## {title}\n\n{text}\n" for title, text in self.paragraphs.items()]
        return "\n".join([HEAD.format(version=__version__), *parts])


def describe_methods(config: Config, facts: Facts) -> Methods:
    """The methods of a run; parts that were not done are not in it."""
    parts = {
        "Data": [_data(config.datasets[data.name], data) for data in facts.data],
        "Preprocessing": _preprocessing(config, facts),
        "Models": methods_models.describe_models(facts.trainings),
        "Baselines": methods_results.describe_references(facts.evaluations),
        "Evaluation": methods_results.describe_statistics(config, facts.evaluations),
        "Further analyses": methods_results.describe_analyses(
            facts.maps, facts.forecasts, facts.identified, facts.scaled, facts.retrieved
        ),
        "Software": _software(facts),
    }
    paragraphs = {title: " ".join(filter(None, text)) for title, text in parts.items()}
    paragraphs = {title: text for title, text in paragraphs.items() if text}
    return Methods(paragraphs, bibliography(cited_keys(" ".join(paragraphs.values()))))


def write_methods(folder: Path, methods: Methods) -> None:
    """Write `references.bib` and `methods.md`."""
    write_text(folder / "references.bib", methods.bibtex)
    write_text(folder / "methods.md", methods.markdown)


def _data(settings: Dataset, data: Data) -> str:
    n_subjects, n_runs = data.index["subject"].nunique(), len(data.index)
    if not n_runs:
        return ""
    bids = "" if settings.files else ", named as in BIDS [@gorgolewski2016bids]"
    used = f"{data.runs['subject'].nunique()} of {n_subjects} subjects"
    text = f"{data.name}: {len(data.runs)} of {n_runs} runs{bids}, of {used}, were used."
    stages = data.excluded.drop_duplicates("run")["stage"].value_counts()
    if len(stages):
        listed = ", ".join(f"{count} at the stage {stage}" for stage, count in stages.items())
        text += f" Runs were left out for recorded reasons: {listed}."
    return text


def _preprocessing(config: Config, facts: Facts) -> list[str]:
    sentences = []
    for data in facts.data:
        sentences += [_preprocessed(data), _given(config.datasets[data.name], data)]
        if data.name in facts.attributes:
            known = facts.attributes[data.name]
            sentences += [_resampled(config, data, known), _denoised(data, known)]
    return sentences + ([_tokens(config)] if facts.attributes else [])


def _preprocessed(data: Data) -> str:
    if not data.preprocessed_by:
        return ""
    parts = []
    for program, count in data.preprocessed_by.items():
        subjects = f"{count} subjects"
        if program.startswith(ANTS):
            parts.append(ANTS_TEXT.format(count=subjects, program=program))
        else:
            cite = " [@esteban2019fmriprep]" if "fmriprep" in program.lower() else ""
            parts.append(f"{program}{cite} ({subjects})")
    return f"Scans of {data.name} were preprocessed by {'; '.join(parts)}."


def _given(settings: Dataset, data: Data) -> str:
    """What is known of series that were not averaged here."""
    if settings.series is None:
        return ""
    name = settings.series.segmentation
    regions = "regions" if name is None else f"the regions of {name}"
    return f"Of {data.name} the series of {regions} were used as they were given."


def _resampled(config: Config, data: Data, known: dict[str, Any]) -> str:
    how = f"{known['interpolation']} " if "interpolation" in known else ""
    grid, edge = " x ".join(map(str, config.volumes.shape)), config.volumes.voxel_size
    space = known.get("space", config.datasets[data.name].space)
    cite = " [@fonov2011mni]" if str(space).startswith("MNI152NLin2009") else ""
    return (
        f"Runs of {data.name} were brought to a grid of {grid} voxels of {edge:g} mm in "
        f"{space}{cite} by {how}interpolation."
    )


def _denoised(data: Data, known: dict[str, Any]) -> str:
    """What was taken out of the signal, by the attributes of an example's volumes."""
    record = known.get("denoise", {})
    settings = Denoise.model_validate(
        {k: v for k, v in record.items() if k in Denoise.model_fields}
    )
    values = settings.model_dump(mode="json")
    parts = [text.format(**values) for name, text in CONFOUNDS.items() if name in settings.strategy]
    if settings.detrend:
        parts.append("linear trends")
    bounds = {"below": settings.high_pass, "above": settings.low_pass}
    parts += [f"frequencies {side} {hz:g} Hz" for side, hz in bounds.items() if hz]
    text = f"Nothing further was taken out of the signal of {data.name}."
    if parts:
        text = (
            f"Taken out of each voxel's signal of {data.name} by nilearn [@abraham2014nilearn; "
            f"@wang2024denoising], confounds and filter jointly [@lindquist2019filters]: "
            f"{'; '.join(parts)}."
        )
    if settings.repetition_time:
        text += f" Runs were resampled to a repetition time of {settings.repetition_time:g} s."
    if known.get("smoothing"):
        text += f" Volumes were smoothed by a Gaussian of {known['smoothing']:g} mm (FWHM)."
    return text


def _tokens(config: Config) -> str:
    tokens = config.tokens
    brain = (
        f"at least {tokens.brain_fraction:g} of it is" if tokens.brain_fraction else "a voxel is"
    )
    return (
        f"Runs were cut into patches of {tokens.patch} x {tokens.patch} x {tokens.patch} voxels by "
        f"{tokens.time_patch} volumes, of which those where {brain} brain became tokens."
    )


def _software(facts: Facts) -> list[str]:
    text = f"All was done by neuromamba {__version__}"
    if facts.by_snakemake:
        text += ", its jobs run by Snakemake [@molder2021snakemake]"
    if facts.trainings:
        versions = {str(t.info.get("versions", {}).get("torch", "")) for t in facts.trainings} - {
            ""
        }
        text += f". Models were trained in PyTorch {', '.join(sorted(versions))}".rstrip()
        text += " [@paszke2019pytorch]"
    return [f"{text}."]

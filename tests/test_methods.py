"""The methods section tells what was done and cites it, and nothing else."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from confound_tables import REPETITION_TIME, header_of, make_table, write_confounds
from fabricate import make_config
from pydantic import TypeAdapter
from reports import of_subjects

from neuromamba.collect import Data, Training
from neuromamba.config import Denoise, Model, NeuroMamba
from neuromamba.denoise import Denoiser
from neuromamba.methods import Facts, describe_methods, write_methods
from neuromamba.references import REFERENCES, bibliography, cited_keys

PROGRAMS = {
    "fMRIPrep 25.2.3": "esteban2019fmriprep",
    "NeuroMamba ants engine 0.1.0": "avants2008syn",
}


def data(program: str = "fMRIPrep 25.2.3", left_out: int = 0) -> Data:
    runs = pd.DataFrame({"run": ["r1", "r2"], "subject": ["s1", "s2"]})
    excluded = pd.DataFrame({"run": [f"x{k}" for k in range(left_out)], "stage": "volumes"})
    return Data("toy", runs, runs, excluded, {}, pd.DataFrame(), {program: 2})


def training(stage: str = "pretrain", **settings: Any) -> Training:
    model = NeuroMamba(family="neuromamba").model_dump(mode="json")
    part = model["pretrain" if stage == "pretrain" else "finetune"] | settings
    info = {
        "settings": {"model": model, "pretrain" if stage == "pretrain" else "finetune": part},
        "step": 77,
        "parameters": 1234,
        "subjects": {"train": ["a", "b"], "validation": ["c"]},
        "versions": {"torch": "2.13.0"},
    }
    return Training("toy", "small", 0, stage, info, pd.DataFrame())


def recorded(folder: Path) -> dict[str, Any]:
    """What the volumes of a run say of its denoising."""
    strategy = ["motion", "high_pass", "compcor"]
    settings = Denoise(strategy=strategy, motion="power2", repetition_time=3.0, smoothing=5.0)
    confounds = write_confounds(folder, make_table(90))
    denoiser = Denoiser(header_of(90), "r1", REPETITION_TIME, confounds, settings, 20)
    return {"interpolation": "linear", "smoothing": 5.0, **denoiser.attributes}


def text_of(config: Any, facts: Facts) -> str:
    return describe_methods(config, facts).markdown


def test_nothing_that_was_not_done_is_told(tmp_path: Path) -> None:
    found = describe_methods(make_config(tmp_path), Facts(data=[]))
    assert list(found.paragraphs) == ["Software"]
    assert found.bibtex == ""
    assert "fMRIPrep" not in found.markdown
    assert "Snakemake" not in found.markdown


@pytest.mark.parametrize("program", PROGRAMS)
def test_what_preprocessed_is_named_and_cited(tmp_path: Path, program: str) -> None:
    found = describe_methods(make_config(tmp_path), Facts(data=[data(program)]))
    assert program in found.paragraphs["Preprocessing"]
    for other, key in PROGRAMS.items():
        assert (key in found.bibtex) == (other == program)


def test_denoising_is_told_as_the_volumes_record_it(tmp_path: Path) -> None:
    cleaned = {"toy": recorded(tmp_path)}
    now = {"denoise": {"strategy": ["wm_csf"], "smoothing": 3.0}, "shape": (12, 12, 12)}
    config = make_config(tmp_path, volumes=now)  # what was configured since is not told
    text = text_of(config, Facts(data=[data()], attributes=cleaned))
    assert "head motion (power2)" in text
    assert "[@behzadi2007compcor]" in text
    assert "by linear interpolation" in text
    assert "repetition time of 3 s" in text
    assert "a Gaussian of 5 mm" in text
    assert "white matter" not in text
    text = text_of(config, Facts(data=[data()], attributes={"toy": {"interpolation": "linear"}}))
    assert "Nothing further was taken out of the signal of toy." in text
    assert "Gaussian" not in text


def test_each_dataset_is_told_as_it_was_denoised(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    config = config.model_copy(update={"datasets": dict.fromkeys("ab", config.datasets["toy"])})
    of_both = [replace(data(), name=name) for name in "ab"]
    known = {"a": recorded(tmp_path), "b": {"interpolation": "linear"}}
    text = text_of(config, Facts(data=of_both, attributes=known))
    assert "Taken out of each voxel's signal of a by nilearn" in text
    assert "Nothing further was taken out of the signal of b." in text


def test_models_are_told_from_their_records(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    facts = Facts(data=[data()], trainings=[training(), training("sex", mode="adapters")])
    found = describe_methods(config, facts)
    text = found.paragraphs["Models"]
    assert "77 steps of 4 windows" in text  # as was done; 10000 are configured
    assert "1,234 parameters" in text
    assert "to predict sex: low-rank adapters" in text
    for key in ("dao2024mamba2", "mildenhall2020nerf", "hu2022lora", "yang2022mup"):
        assert key in found.bibtex
    assert "PyTorch 2.13.0" in found.paragraphs["Software"]
    probe = describe_methods(config, Facts(data=[], trainings=[training("sex", mode="probe")]))
    assert "a linear probe was fitted" in probe.paragraphs["Models"]
    assert (
        "2 subjects, whose inner folds chose the penalty; 1 others had no part in it"
        in probe.paragraphs["Models"]
    )
    assert "to choose the step" not in probe.paragraphs["Models"]
    assert "hu2022lora" not in probe.bibtex
    unrecorded = Training("toy", "small", 0, "sex", {"subjects": {}}, pd.DataFrame())
    assert (
        "Models" not in describe_methods(config, Facts(data=[], trainings=[unrecorded])).paragraphs
    )


@pytest.mark.parametrize(
    ("family", "words", "key"),
    [
        ("lmae", "2 experts over random walks", "cao2025bridging"),
        ("roi_transformer", "75% of the patches were hidden", "ortegacaro2024brainlm"),
    ],
)
def test_models_of_series_are_told_with_their_regions(
    tmp_path: Path, family: str, words: str, key: str
) -> None:
    own = {"experts": 2} if family == "lmae" else {}
    model = TypeAdapter(Model).validate_python({"family": family, **own})
    regions = {"atlas": "twelve", "atlas_sha256": "a", "n_rois": 12}
    given = {"model": model.model_dump(mode="json"), "regions": regions}
    trainings = [
        replace(one, info=one.info | {"settings": one.info["settings"] | given})
        for one in (training(), training("sex", start="fresh"))
    ]
    facts = Facts(data=[], trainings=trainings)
    found = describe_methods(make_config(tmp_path), facts)
    text = found.paragraphs["Models"]
    assert words in text
    assert "the series of the 12 regions of twelve" in text
    assert "at a repetition time of 2 s" in text
    assert "all weights learnt, from random weights" in text
    assert key in found.bibtex


def test_a_model_of_images_and_networks_is_told_with_its_losses_and_weights(tmp_path: Path) -> None:
    regions = {"atlas": "twelve", "atlas_sha256": "a", "n_rois": 12}
    texts = []
    for own, weights in (({}, None), ({"mim": 0.0, "inm": 0.0}, {"loaded": ["a", "b"]})):
        model = TypeAdapter(Model).validate_python({"family": "cinp", **own})
        given = {"model": model.model_dump(mode="json"), "regions": regions}
        one = training()
        info = one.info | {"settings": one.info["settings"] | given, "image_weights": weights}
        facts = Facts(data=[], trainings=[replace(one, info=info)], retrieved=True)
        found = describe_methods(make_config(tmp_path), facts)
        texts.append(found.markdown)
        assert {"hu2025cinp", "tang2022swin", "kan2022bnt"} <= set(cited_keys(texts[-1]))
        assert "the 12 regions of twelve" in texts[-1]
        assert "each window a subject's image and the network of a whole run" in texts[-1]
        assert "Networks of test subjects were retrieved by their images" in texts[-1]
    whole, contrast = texts
    assert (
        "a symmetric contrast of both [@radford2021clip], masked image modelling (L1, 30%" in whole
    )
    assert "and the matching of pairs against hard negatives" in whole
    assert "began with published weights" not in whole
    assert "learnt by a symmetric contrast of both [@radford2021clip]." in contrast
    assert "began with published weights (2 tensors fitted)" in contrast


@pytest.mark.parametrize(
    ("kind", "own", "told"),
    [
        ("dc-ae", {}, "50% of the tokens of a volume, the same at all times, each minus its mean"),
        ("slices", {"mask": "time", "position": "none"}, "50% of the volumes each minus its mean"),
    ],
)
def test_a_model_of_codes_is_told_with_its_tokenizer(
    tmp_path: Path, kind: str, own: dict[str, str], told: str
) -> None:
    codes = {"n_tokens": 27, "code_width": 3072, "voxel_size": 2.0, "normalization": "maximum"}
    codes["tokenizer"] = {"kind": kind, "sha256": "a", "channels": 32}
    model = TypeAdapter(Model).validate_python({"family": "tablet", **own})
    one = training()
    given = {"model": model.model_dump(mode="json"), "codes": codes}
    info = one.info | {"settings": one.info["settings"] | given}
    facts = Facts(data=[], trainings=[replace(one, info=info)])
    found = describe_methods(make_config(tmp_path), facts)
    cited = set(cited_keys(found.markdown))
    assert {"kim2026tablet", "ainslie2023gqa"} <= cited
    assert ("chen2025dcae" in cited) == (kind == "dc-ae")
    assert ("su2024roformer" in cited) == (not own)
    assert told in found.markdown
    assert "27 a volume of 3072 values each" in found.markdown
    assert "absolute error, windows of 256 volumes" in found.markdown


def test_statistics_follow_from_the_predictions(tmp_path: Path) -> None:
    config = make_config(tmp_path, splits={"protocol": "k-fold", "folds": 3, "repeats": 2})
    plain = describe_methods(make_config(tmp_path), Facts(data=[], evaluations=[of_subjects()]))
    assert "split once" in plain.paragraphs["Evaluation"]
    assert "No model was tested on a subject that it was trained" in plain.paragraphs["Evaluation"]
    for key in ("nadeau2003inference", "bandos2005auc", "guo2017calibration"):
        assert key not in plain.bibtex
    folds = of_subjects(classes=True, folds=3)
    found = describe_methods(config, Facts(data=[], evaluations=[folds]))
    assert "3-fold cross-validation over subjects, repeated 2 times" in found.markdown
    for key in ("nadeau2003inference", "bandos2005auc", "guo2017calibration", "holm1979"):
        assert key in found.bibtex
    seen = {**folds.notes, "seen_subjects": ["sub-001"]}
    facts = Facts(data=[], evaluations=[of_subjects().__class__(**{**vars(folds), "notes": seen})])
    assert "1 test subjects had been used to train a model" in text_of(config, facts)


def test_every_citation_has_an_entry_and_every_entry_is_cited(tmp_path: Path) -> None:
    facts = Facts(
        data=[data(left_out=1)],
        trainings=[training(), training("sex")],
        evaluations=[of_subjects(classes=True)],
        maps=[{"subjects": 9}],
        forecasts=True,
        identified=True,
        retrieved=True,
        scaled=True,
        by_snakemake=True,
    )
    found = describe_methods(make_config(tmp_path), facts)
    write_methods(tmp_path, found)
    text, entries = (tmp_path / name for name in ("methods.md", "references.bib"))
    keys = re.findall(r"@\w+\{(\w+),", entries.read_text())
    assert keys == cited_keys(text.read_text())
    assert {"molder2021snakemake", "finn2015fingerprint", "kaplan2020scaling"} <= set(keys)
    with pytest.raises(KeyError):
        bibliography(["nobody1900"])


def test_the_references_are_whole() -> None:
    for key, entry in REFERENCES.items():
        fields = dict(re.findall(r"(\w+)=\{((?:[^{}]|\{[^{}]*\})*)\}", entry))
        assert {"author", "title", "year"} <= set(fields), key
        assert re.fullmatch(r"10\.\d{4,9}/\S+", fields["doi"]) if "doi" in fields else fields["url"]
        assert entry.count("{") == entry.count("}"), key
        assert fields["year"] in key, key

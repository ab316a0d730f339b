"""Write a synthetic BIDS-Derivatives dataset, named like fMRIPrep's, with effects that are known.

    folder/
        participants.tsv, participants.json    sex, age, site
        truth.json                             which networks carry which effect
        sub-*/anat/                            T1w image, brain mask, sidecars
        sub-*/func/                            BOLD, brain mask, confounds, sidecars
        tpl-MNI152NLin2009cAsym/anat/          the parcels and their networks

`neuromamba.demo_signal` says how the signal is made, `neuromamba.demo_anatomy` the T1w images.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from tqdm import tqdm

from neuromamba import __version__, demo_anatomy, demo_signal
from neuromamba.demo_brain import NETWORKS, PARCELS, Brain, load_brain
from neuromamba.demo_run import SPACE, TEMPLATE, open_nifti, paint, with_suffix, write_run
from neuromamba.demo_signal import Connectivity, Subject
from neuromamba.files import InputError, atomic_path, read_json, write_json, write_text
from neuromamba.tables import write_table

BIDS_VERSION = "1.11.1"
GENERATOR = "neuromamba demo-data"


def write_demo(
    folder: Path | str,
    subjects: int = 48,
    volumes: int = 120,
    seed: int = 0,
    voxel_size: float = 4.0,
    repetition_time: float = 2.0,
    runs: int = 1,
) -> None:
    """Write a synthetic dataset to `folder`, whole or not at all; same arguments, same bytes.

    Parameters
    ----------
    folder : Path
        A new or empty folder, or an earlier demo, which is replaced.
    subjects, volumes, runs : int
        Number of subjects, of volumes a run, and of runs a subject.
    seed : int
        Each subject has random numbers of its own, from the seed and its number.
    voxel_size, repetition_time : float
        Edge of the isotropic voxels in mm; seconds from volume to volume.

    Raises
    ------
    InputError
        When `folder` holds something other than a demo, or a number is out of range.
    """
    folder = Path(folder)
    _check(subjects, volumes, voxel_size, repetition_time, runs)
    _refuse_foreign(folder)
    people = demo_signal.draw_subjects(subjects, seed)
    brain = load_brain(float(voxel_size))
    truth: list[dict[str, Any]] = []
    with atomic_path(folder) as root:
        _write_top(root, people, volumes, seed)
        _write_atlas(root, brain)
        for i, person in enumerate(tqdm(people, desc="demo-data", unit="subject", mininterval=0.5)):
            rng = np.random.default_rng([seed, 1, i])
            connectivity = demo_signal.draw_connectivity(person, rng)
            anatomy = demo_signal.draw_anatomy(brain, rng)
            for number in range(runs):
                rng = np.random.default_rng([seed, 1, i, 1 + number])
                run = demo_signal.draw_run(
                    brain, person, connectivity, anatomy, volumes, repetition_time, rng
                )
                name = f"{person.name}_task-rest" + (f"_run-{number + 1}" if runs > 1 else "")
                write_run(root / person.name / "func", name, run, rng)
            rng = np.random.default_rng([seed, 2, i])
            image, tissue = demo_anatomy.draw_t1w(brain, person, connectivity, rng)
            demo_anatomy.write_t1w(root / person.name / "anat", person.name, brain, image)
            truth.append(_truth_of(person, connectivity, tissue))
        write_json(root / "truth.json", {**_effects(), "subjects": truth})


def _check(
    subjects: int, volumes: int, voxel_size: float, repetition_time: float, runs: int
) -> None:
    limits: list[tuple[str, float, float, float]] = [
        ("subjects", subjects, 1, 100_000),
        ("volumes", volumes, 8, 100_000),
        ("voxel_size", voxel_size, 2, 12),
        ("repetition_time", repetition_time, 0.2, 5),
        ("runs", runs, 1, 100),
    ]
    for name, value, low, high in limits:
        if not low <= value <= high:
            raise InputError(f"demo-data: {name} must be between {low:g} and {high:g}, not {value}")


def _refuse_foreign(folder: Path) -> None:
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    description = folder / "dataset_description.json"
    made_by = read_json(description).get("GeneratedBy") if description.exists() else None
    if not made_by or made_by[0].get("Name") != GENERATOR:
        raise InputError(
            f"{folder} exists and is not a demo dataset; name a new folder, or remove it yourself"
        )


# --- Files at the top ---------------------------------------------------------------------------


README = """# Synthetic resting-state fMRI

Made by `neuromamba demo-data`: no person was scanned, and no effect in it is a finding. The BOLD
signal has effects of sex and age on functional connectivity, and a nuisance of site; `truth.json`
lists them. The anatomy in the T1w images tells a known share of each subject's connectivity. The
brain's outline is the MNI ICBM152 template.
"""

BIDSIGNORE = """*_desc-confounds_timeseries.tsv
*_desc-confounds_timeseries.json
truth.json
"""
"""fMRIPrep ignores its confounds tables too: BIDS-Derivatives has no name for them yet."""


def _write_top(root: Path, people: list[Subject], volumes: int, seed: int) -> None:
    write_text(root / "README.md", f"{README}\nSeed {seed}, {volumes} volumes a run.\n")
    write_text(root / ".bidsignore", BIDSIGNORE)
    description = {
        "Name": "Synthetic resting-state fMRI with known effects",
        "BIDSVersion": BIDS_VERSION,
        "DatasetType": "derivative",
        "License": "CC0",
        "GeneratedBy": [{"Name": GENERATOR, "Version": __version__}],
    }
    write_json(root / "dataset_description.json", description)
    table = pd.DataFrame([vars(person) for person in people]).rename(
        columns={"name": "participant_id"}
    )
    write_table(root / "participants.tsv", table)
    columns = {
        "sex": {"Description": "Synthetic sex", "Levels": {"F": "female", "M": "male"}},
        "age": {"Description": "Synthetic age", "Units": "year"},
        "site": {
            "Description": "Synthetic scanner",
            "Levels": {
                name: f"global share {site.global_share:g}, white noise {site.white_noise:g}, "
                f"scale {site.scale:g}"
                for name, site in demo_signal.SITES.items()
            },
        },
    }
    write_json(root / "participants.json", columns)


def _effects() -> dict[str, Any]:
    """The constants of the signal model that say what there is to find."""
    return {
        "model": "see neuromamba/demo_signal.py",
        "networks": list(NETWORKS),
        "base_coherence": demo_signal.BASE_COHERENCE,
        "sex_on_logit_coherence": demo_signal.SEX,
        "age_on_logit_coherence_per_30_years": demo_signal.AGE,
        "sex_on_coupling_of_A_and_B": demo_signal.SEX_COUPLING,
        "subject_sd_of_logit_coherence": demo_signal.SUBJECT_SD,
        "share_of_anatomy_by_connectivity": demo_anatomy.SHARE,
        "sites": {name: vars(site) for name, site in demo_signal.SITES.items()},
    }


def _truth_of(
    person: Subject, connectivity: Connectivity, tissue: NDArray[np.float64]
) -> dict[str, Any]:
    return {
        "participant_id": person.name,
        "coherence": [round(float(c), 4) for c in connectivity.coherence],
        "coupling": round(connectivity.coupling, 4),
        "anatomy": [round(float(d), 4) for d in tissue],
    }


def _write_atlas(root: Path, brain: Brain) -> None:
    description = {
        "AtlasName": "Parcels of the synthetic dataset",
        "Description": "k-means cells of the MNI152 brain, mirrored between hemispheres",
        "License": "CC0",
    }
    write_json(root / "atlas-demo_description.json", description)
    stem = root / f"tpl-{SPACE}" / "anat" / f"tpl-{SPACE}_atlas-demo_dseg"
    with open_nifti(with_suffix(stem, ".nii.gz"), brain, np.uint8) as stream:
        stream.write(paint(brain, (brain.parcel + 1).astype(np.uint8)))
    index = np.arange(PARCELS)
    side = np.where(index < PARCELS // 2, "L", "R")
    network = np.array(NETWORKS)[brain.network]
    names = [
        f"{n}-{s}{i % (PARCELS // 2) + 1}" for n, s, i in zip(network, side, index, strict=True)
    ]
    table = pd.DataFrame({"index": index + 1, "name": names, "network": network})
    write_table(with_suffix(stem, ".tsv"), table)
    sidecar = {
        "Description": "Parcels that share a course in the synthetic BOLD",
        "SpatialReference": TEMPLATE,
        "network": {"Description": "Network whose course a parcel shares"},
    }
    write_json(with_suffix(stem, ".json"), sidecar)

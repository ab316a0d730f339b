"""How long does Snakemake take to plan the work on a very large dataset, and how much memory?

    python benchmarks/snakemake_scale.py                     # 50,870 subjects, some minutes, 1 GB
    python benchmarks/snakemake_scale.py --subjects 2000     # quicker

A tree of subjects in fMRIPrep's layout is made, one run each: BOLD file (of one voxel), brain mask,
confounds, sidecar, all of them hard links to four files. In a copy of this repository's workflow
and config, then:

- index: `neuromamba index` over the tree.
- first look: `snakemake -n all`, with nothing made but the index.
- second look: the same again.
- all data made: the data stages are recorded as finished, without arrays.
- one subject more: and then a subject is added, which has to give work for its batch alone.
- the alternative: `snakemake -n all` of a workflow with the same three data stages, a job for each
  subject and stage, which is the usual way to write it. It does not look at any data and has no
  training, so this is the least that such a workflow takes.

Each look is a process of its own. The jobs that it announces are checked. Goals: first look under
60 s and 4 GB, second look under 15 s.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import yaml
from common import RESULTS, head, machine, run_command, write_results

from neuromamba.config import load_config
from neuromamba.files import write_json
from neuromamba.keys import Keys
from neuromamba.layout import Layout
from neuromamba.records import record_path
from neuromamba.stage import batch_of
from neuromamba.stages import Job, output_of
from neuromamba.tables import read_table, write_table

ROOT = Path(__file__).resolve().parents[1]
SNAKEMAKE = [sys.executable, "-m", "snakemake", "--cores", "2"]
NEUROMAMBA = Path(sys.executable).with_name("neuromamba")
STAGES = ("volumes", "tokens", "rois")
LINKS = 30_000
"""Most links to one file; ext4 allows 65,000."""
RUN = "{subject}_task-rest"
VERSION = "space-MNI152NLin2009cAsym_res-2"
NAMES = {
    "bold.nii.gz": f"{RUN}_{VERSION}_desc-preproc_bold.nii.gz",
    "mask.nii.gz": f"{RUN}_{VERSION}_desc-brain_mask.nii.gz",
    "bold.json": f"{RUN}_{VERSION}_desc-preproc_bold.json",
    "confounds.tsv": f"{RUN}_desc-confounds_timeseries.tsv",
}
WANTED = {"first look": None, "second look": None, "all data made": 0, "one subject more": 1}
"""Jobs of each data stage that are to be announced; `None`: one for each batch."""
GOALS = {"first look": (60, 4096), "second look": (15, 4096)}
PER_SUBJECT = """
SUBJECTS = [line.split("\\t")[0] for line in open({table!r})][1:]
rule all:
    input: expand("done/{{stage}}/{{subject}}.zarr", stage=["tokens", "rois"], subject=SUBJECTS)
rule volumes:
    input: {bold!r}
    output: directory("done/volumes/{{subject}}.zarr")
    shell: "touch {{output}}"
rule tokens:
    input: "done/volumes/{{subject}}.zarr"
    output: directory("done/tokens/{{subject}}.zarr")
    shell: "touch {{output}}"
rule rois:
    input: "done/volumes/{{subject}}.zarr"
    output: directory("done/rois/{{subject}}.zarr")
    shell: "touch {{output}}"
"""


# --- The tree -------------------------------------------------------------------------------------


def make_tree(folder: Path, subjects: int) -> None:
    """Write the derivatives and a table of the subjects."""
    rows = ["participant_id\tsex"]
    for number in range(subjects):
        if number % LINKS == 0:
            templates = make_templates(folder / f"templates-{number}")
        rows.append(f"{add_subject(folder, number, templates)}\t{'FM'[number % 2]}")
    (folder / "derivatives" / "dataset_description.json").write_text('{"Name": "empty"}')
    (folder / "participants.tsv").write_text("\n".join(rows) + "\n")


def add_subject(folder: Path, number: int, templates: Path) -> str:
    subject = f"sub-{number:06}"
    func = folder / "derivatives" / subject / "func"
    func.mkdir(parents=True)
    for template, name in NAMES.items():
        (func / name.format(subject=subject)).hardlink_to(templates / template)
    return subject


def make_templates(folder: Path) -> Path:
    """The four files of a run: the scan has 490 volumes of one voxel."""
    folder.mkdir()
    for name, shape in (("bold.nii.gz", (1, 1, 1, 490)), ("mask.nii.gz", (1, 1, 1))):
        nibabel.save(nibabel.Nifti1Image(np.zeros(shape, np.int16), np.eye(4)), folder / name)
    (folder / "bold.json").write_text(json.dumps({"RepetitionTime": 0.735}))
    (folder / "confounds.tsv").write_text("framewise_displacement\n0\n")
    return folder


def make_project(folder: Path, subjects: int, per_batch: int) -> int:
    """Copy the workflow and write a config over the tree; return the number of batches."""
    for name in ("Snakefile", "workflow", "config", "profiles"):
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name)
        else:
            shutil.copy(ROOT / name, folder / name)
    batches = math.ceil(subjects / per_batch)
    sex = {"kind": "classification", "column": "sex", "classes": {"female": "F", "male": "M"}}
    dataset = {
        "derivatives": str(folder / "derivatives"),
        "participants": {"file": str(folder / "participants.tsv")},
        "targets": {"sex": sex},
    }
    config: dict[str, Any] = {"results": str(folder / "results")}
    config |= {"datasets": {"large": dataset}, "compute": {"batches": batches}}
    (folder / "large.yaml").write_text(yaml.safe_dump(config))
    return batches


# --- Looks ----------------------------------------------------------------------------------------


def look(folder: Path, *options: str | Path) -> dict[str, Any]:
    """A dry run: what it took, and how many jobs of each rule it announces."""
    log = folder / "look.txt"
    took: dict[str, Any] = run_command([*SNAKEMAKE, "--dry-run", "all", *options], log, folder)
    text = log.read_text()
    jobs = {}
    if "Nothing to be done" not in text:
        table = text.split("Job stats:")[1].split("total")[0]
        jobs = {rule: int(n) for rule, n in re.findall(r"^(\w+) +(\d+)$", table, re.MULTILINE)}
    return {**took, "jobs": jobs}


def check_jobs(name: str, jobs: dict[str, int], batches: int) -> None:
    """Whether so many jobs of each data stage are announced."""
    found = {stage: jobs.get(f"{stage}_batch", 0) for stage in STAGES}
    if found != dict.fromkeys(STAGES, batches):
        raise SystemExit(f"{name}: the dry run announces {jobs}, not {batches} of each data stage")


def finish_data(folder: Path) -> None:
    """Leave the manifests and records that the data stages leave."""
    config = load_config([folder / "config" / "config.yaml", folder / "large.yaml"])
    keys, index = Keys(config), read_table(Layout.of(config, "large").index, dtype=str)
    number = index["subject"].map(lambda subject: batch_of(subject, config.compute.batches))
    for stage in STAGES:
        for batch in range(config.compute.batches):
            job = Job(stage, "large", batch=batch)
            rows = index.loc[number == batch, ["run"]].assign(reason=None)
            write_table(output_of(config, job), rows)
            write_json(record_path(output_of(config, job)), keys.record(job))


def write_alternative(folder: Path) -> Path:
    """A workflow of one job a subject and stage."""
    bold = folder / "derivatives" / "{subject}" / "func" / NAMES["bold.nii.gz"]
    table = folder / "participants.tsv"
    path = folder / "alternative" / "Snakefile"
    path.parent.mkdir()
    path.write_text(PER_SUBJECT.format(bold=str(bold), table=str(table)))
    return path


def measure(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    result: dict[str, Any] = {"machine": machine("neuromamba", "snakemake", "pandas")}
    start = time.perf_counter()
    make_tree(folder, options.subjects)
    batches = make_project(folder, options.subjects, options.per_batch)
    print(f"tree made in {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
    result |= {"subjects": options.subjects, "batches": batches, "looks": {}}
    config = ["--config", "config/config.yaml", "large.yaml"]
    looks = result["looks"]
    looks["index"] = run_command([NEUROMAMBA, "index", *config], folder / "index.txt", folder)
    for name, announced in WANTED.items():
        if name == "all data made":
            finish_data(folder)
        if name == "one subject more":
            add_subject(folder, options.subjects, folder / "templates-0")
        looks[name] = look(folder, "--configfile", "large.yaml")
        print(f"{name}: {looks[name]}", file=sys.stderr, flush=True)
        check_jobs(name, looks[name]["jobs"], batches if announced is None else announced)
    alternative = write_alternative(folder)
    name = "one job a subject and stage"
    looks[name] = look(folder, "--snakefile", alternative, "--directory", alternative.parent)
    wanted = {"all": 1, **dict.fromkeys(STAGES, options.subjects)}
    if looks[name]["jobs"] != wanted:
        raise SystemExit(f"{name}: the dry run announces {looks[name]['jobs']}, not {wanted}")
    return result


# --- What is written ------------------------------------------------------------------------------


def as_text(result: dict[str, Any]) -> str:
    looks = result["looks"]
    base = looks["second look"]
    lines = [
        head(result["machine"], ["neuromamba", "snakemake", "pandas"]),
        f"{result['subjects']:,} subjects with one run each, {result['batches']} batches.",
        "",
        "| what | seconds | of the processor | peak memory | jobs announced | beside second look |",
        "|" + "---|" * 6,
    ]
    for name, took in looks.items():
        jobs = f"{sum(took['jobs'].values()):,}" if "jobs" in took else ""
        lines.append(
            f"| {name} | {took['seconds']:.1f} | {took['cpu_seconds']:.1f} | "
            f"{took['peak_mb']:.0f} MiB | {jobs} | {took['seconds'] / base['seconds']:.1f}x, "
            f"{took['peak_mb'] / base['peak_mb']:.1f}x memory |"
        )
    lines.append("")
    for name, (seconds, memory) in GOALS.items():
        met = looks[name]["seconds"] < seconds and looks[name]["peak_mb"] < memory
        goal = f"under {seconds} s and {memory / 1024:.0f} GiB"
        lines.append(f"Goal of the {name} ({goal}): {'met' if met else '**not met**'}.")
    return "\n".join(lines)


def main() -> None:
    """Make the tree, look, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--subjects", type=int, default=50_870)
    parser.add_argument("--per-batch", type=int, default=256, help="subjects (default: 256)")
    parser.add_argument("--folder", type=Path, help="where the tree goes (default: as tempfile)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        result = measure(Path(name), options)
    text = as_text(result)
    print(text)
    write_results(RESULTS, "snakemake_scale", result, text, f"{options.subjects}-subjects")


if __name__ == "__main__":
    main()

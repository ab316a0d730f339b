"""What the rules share: the checked config, the names that wildcards may take, and what is stale.

The config is checked by the package's own schema, so a wrong key stops the workflow before any job.

Whether a job has to run is told by `neuromamba.keys`, from the records that lie beside the results:
by what they were made from, not by dates, which say nothing after a `git checkout`, `dvc pull` or
`rsync`. All inputs of a job that is current are therefore `ancient`; one that is stale has one more
input, a file that is new at every start. The default profile restricts Snakemake to this.
"""

import os
import re
import sys
from functools import cache
from pathlib import Path
from uuid import uuid4

from snakemake.logging import logger

from neuromamba.config import build_config, save_config
from neuromamba.files import InputError, write_text
from neuromamba.keys import FOLLOWS, NOT_MADE, Keys
from neuromamba.stages import Job, all_jobs, jobs_before, output_of

try:
    # What stands on the command line outranks the models' own files; the rest does not.
    CONFIG = build_config(
        config,
        "config",
        " + ".join(
            ["config/config.yaml", *map(str, workflow.config_settings.configfiles)]
        ),
        workflow.config_settings.config,
    )
except InputError as error:
    raise WorkflowError(str(error)) from None

if CONFIG.compute.nodes > 1 and "APPTAINER" in {
    method.name for method in workflow.deployment_settings.deployment_method
}:
    raise WorkflowError(
        f"compute.nodes is {CONFIG.compute.nodes}, and `--sdm apptainer` runs jobs where there is no "
        "srun to start the other nodes; leave --sdm out, or use `--sdm conda`"
    )

# `neuromamba` is found also where Snakemake was started from an environment that is not active.
# The second is for envs/neuromamba.post-deploy.sh, of which Snakemake runs a copy elsewhere.
os.environ.update(
    PATH=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}",
    NEUROMAMBA_SOURCE=str(
        Path(workflow.current_basedir.get_path_or_uri(secret_free=True)).parents[1]
    ),
)


# The image that jobs run in with `--sdm apptainer`; without it this says nothing.
container: CONFIG.compute.container


ROOT = f"{CONFIG.results}/{{dataset}}"
MODEL = f"{ROOT}/{{model}}/seed-{{seed}}"
RUN = f"--config {ROOT}/config.yaml --dataset {{dataset}}"
TRAINING = f"{RUN} --model {{model}} --seed {{seed}}"
# Of a cross-validation each fold has a folder and jobs of its own: `{fold}` is then like `/fold-0`.
FOLDS = [os.sep + name if name else "" for name in CONFIG.splits.names]
# Those with a pretraining of their own, which studies of pretrained models are of.
PRETRAINED = [name for name, one in CONFIG.whole_models.items() if one.base is None]
SCALING = sorted(CONFIG.scaling.models or PRETRAINED)
# The rule that runs the jobs of each stage of `neuromamba.stages`.
RULES = {
    "preprocess": "preprocess_subject",
    "index": "index_dataset",
    "volumes": "volumes_batch",
    "tokens": "tokens_batch",
    "rois": "rois_batch",
    "anat": "anat_batch",
    "qc": "qc_batch",
    "tokenizer": "train_tokenizer",
    "codes": "codes_batch",
    "excluded": "list_excluded",
    "overview": "overview_dataset",
    "splits": "split_dataset",
    "baselines": "predict_baselines",
    "pretrain": "pretrain_model",
    "finetune": "finetune_model",
    "evaluate": "evaluate_model",
    "scores": "score_model",
    "report": "report",
    "forecast": "forecast_model",
    "identify": "identify_subjects",
    "retrieve": "retrieve_pairs",
    "explain": "explain_model",
    "cell": "pretrain_cell",
    "scaling": "fit_scaling",
    "ablations": "compare_ablations",
}
# What a training prints goes to the screen, to its log, and to `<log>.all`: Snakemake removes the log
# before the next attempt, and that of one that failed is the first thing to read.
# All processes of a cluster's job are told to stop, and only the training needs time for it: with
# `exec` before it, it takes the place of the shell, for whose end Snakemake waits, and the `tee` that
# it writes to stays as long as it does.
LOGGED = (
    " > >(trap '' INT TERM USR1;"
    " echo \"--- $(date '+%F %T') on ${{SLURMD_NODENAME-$HOSTNAME}}"
    '${{SLURM_JOB_ID+, SLURM job $SLURM_JOB_ID}}" >> {log}.all;'
    " exec tee -a {log} {log}.all) 2>&1"
)

# What a training gets on a cluster, which the cluster's profile may change. For several nodes it
# starts `srun` itself, of which Snakemake knows by `mpi`.
TOGETHER = {"gpu": CONFIG.compute.processes if CONFIG.compute.device != "cpu" else 0}
if CONFIG.compute.nodes > 1:
    TOGETHER = {
        "nodes": CONFIG.compute.nodes,
        "tasks": CONFIG.compute.nodes,
        "mpi": "srun",
    }
    if CONFIG.compute.device != "cpu":
        # Of each node. Without the second one, the plugin would start `tasks` for each GPU.
        TOGETHER |= {"gres": f"gpu:{CONFIG.compute.processes}", "tasks_per_gpu": 0}


wildcard_constraints:
    dataset="|".join(map(re.escape, [*CONFIG.datasets, *CONFIG.mixtures])),
    model="|".join(map(re.escape, CONFIG.models)),
    seed=r"\d+",
    target=r"[^/]+",
    fold=r"(/fold-\d+)?",
    batch=r"\d+",
    subject=r"sub-[A-Za-z0-9]+",


onstart:
    # The jobs read the merged config from here. It is no rule's input, because a new date on it
    # says nothing about which settings changed.
    for name in [*CONFIG.datasets, *CONFIG.mixtures]:
        save_config(f"{CONFIG.results}/{name}/config.yaml", CONFIG)


KEYS = Keys(CONFIG)
CHANGED = ".snakemake/changed"
TOLD = set()
if workflow.is_main_process:
    write_text(CHANGED, uuid4().hex)


def needs(stage):
    """An input function: the results that a job of a stage works on (see `neuromamba.stages`)."""

    def files(wildcards):
        kinds = {
            "batch": int,
            "seed": int,
            "fraction": float,
            "fold": lambda text: text.removeprefix("/"),
        }
        job = Job(
            stage,
            **{key: kinds.get(key, str)(wildcards[key]) for key in wildcards.keys()},
        )
        before = [str(output_of(CONFIG, one)) for one in jobs_before(CONFIG, job)]
        if not workflow.is_main_process:
            return before  # this process only runs the job
        if KEYS.is_stale(job):
            _tell(job)
            return [*before, CHANGED]
        if workflow.dag_settings.forceall or _is_below_forced(job):
            return before
        # The result would stay the same, so no job before it that has to run may make it run.
        return [] if KEYS.is_below_stale(job) else [ancient(file) for file in before]

    return files


@cache
def _is_below_forced(job):
    """Whether a job comes after one that `--forcerun` names by its rule or its file.

    A split stays, whatever is made again before it.
    """
    return job.stage != "splits" and any(
        RULES[one.stage] in workflow.dag_settings.forcerun
        or str(output_of(CONFIG, one)) in workflow.dag_settings.forcerun
        or _is_below_forced(one)
        for one in jobs_before(CONFIG, job)
    )


def option_of_fold(wildcards):
    """The command's option for the fold that a job is for; none for a holdout."""
    return f"--fold {wildcards.fold.removeprefix('/')}" if wildcards.fold else ""


def _tell(job):
    """Say once why jobs of a kind have to run; Snakemake itself would say `updated input files`."""
    reason = KEYS.why(job)
    if reason not in (FOLLOWS, NOT_MADE) and (job.stage, reason) not in TOLD:
        TOLD.add((job.stage, reason))
        logger.info(f"{job}: {reason}")


JOBS = all_jobs(CONFIG)


if workflow.is_main_process:
    for dataset in CONFIG.datasets:
        if new := KEYS.came_later(dataset):
            logger.warning(
                f"{dataset}: no training uses the subjects that came after the split was made: "
                f"{', '.join(new[:5])}{', ...' if len(new) > 5 else ''} ({len(new)} in all). To "
                f"split and train anew, remove {output_of(CONFIG, Job('splits', dataset))}"
            )


def all_of(stage):
    """The results of all jobs of a stage that the report rests on."""
    return [str(output_of(CONFIG, job)) for job in JOBS if job.stage == stage]


def out_of_date():
    """What `neuromamba status` tells, which nothing else may ask for: results that went missing."""
    jobs = [job for job in JOBS if workflow.is_main_process and KEYS.is_stale(job)]
    return [str(output_of(CONFIG, job)) for job in jobs]


def all_studies(wildcards):
    """The fit of every dataset, or of the mixture that the study's models are trained on."""
    study = CONFIG.study()
    where = {
        study.pretraining_of(dataset, model)[0]: None
        for dataset in study.datasets
        for model in study.models
    }
    return expand(f"{ROOT}/scaling/fit.json", dataset=where)

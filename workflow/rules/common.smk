"""What the rules share: the checked config, the names that wildcards may take, and parameters.

The config is checked by the package's own schema, so a wrong key stops the workflow before any job.
A rule's `params` hold exactly the settings that its result depends on: Snakemake reruns a rule when
its parameters change, so a key that is not among them cannot cause a rerun.
"""

import os
import re
import sys
from pathlib import Path

from neuromamba.config import build_config, save_config
from neuromamba.files import InputError

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

# `neuromamba` is found also where Snakemake was started from an environment that is not active.
os.environ["PATH"] = os.pathsep.join(
    [str(Path(sys.executable).parent), os.environ["PATH"]]
)

ROOT = f"{CONFIG.results}/{{dataset}}"
MODEL = f"{ROOT}/{{model}}/seed-{{seed}}"
RUN = f"--config {ROOT}/config.yaml --dataset {{dataset}}"
TRAINING = f"{RUN} --model {{model}} --seed {{seed}}"
BATCHES = range(CONFIG.compute.batches)
# What a training prints goes to the screen and to its log. All processes of a cluster's job are told
# to stop, and only the training needs time for it: with `exec` before it, it takes the place of the
# shell, for whose end Snakemake waits, and the `tee` that it writes to stays as long as it does.
LOGGED = " > >(trap '' INT TERM USR1; exec tee {log}) 2>&1"


wildcard_constraints:
    dataset="|".join(map(re.escape, [*CONFIG.datasets, *CONFIG.mixtures])),
    model="|".join(map(re.escape, CONFIG.models)),
    seed=r"\d+",
    target=r"[^/]+",
    batch=r"\d+",


onstart:
    # The jobs read the merged config from here. It is no rule's input, because a new date on it
    # says nothing about which settings changed; that is what `params` are for.
    for name in [*CONFIG.datasets, *CONFIG.mixtures]:
        save_config(f"{CONFIG.results}/{name}/config.yaml", CONFIG)


def of_dataset(*keys):
    """A parameter function: these keys of the wildcard's dataset section."""

    def values(wildcards):
        section = CONFIG.datasets[wildcards.dataset].model_dump(mode="json")
        return {key: section[key] for key in keys}

    return values


def of_model(*keys, drop=()):
    """A parameter function: these keys (or all but `drop`) of the wildcard's model section."""

    def values(wildcards):
        section = CONFIG.models[wildcards.model].model_dump(mode="json")
        return {key: section[key] for key in keys or section if key not in drop}

    return values


def existing(path):
    """The path, if it is set and exists; a missing one is reported by the stage, with the cure."""
    return [path] if path and Path(path).exists() else []


def starting_weights(model):
    """The record of the weights that a model's pretraining starts from, if it names some."""
    folder = CONFIG.models[model].pretrain.init_from
    return existing(folder and f"{folder}/model.json")


def participants_file(dataset):
    """The dataset's table of subjects, if it names one."""
    participants = CONFIG.datasets[dataset].participants
    return participants.file if participants else None


def all_batches(stage):
    """The manifests of all batch jobs of one dataset's stage."""
    return expand(
        f"{ROOT}/{stage}/batch-{{batch}}.tsv", batch=BATCHES, allow_missing=True
    )


def of_members(paths):
    """An input function: these paths of the wildcard's dataset, or of all members of a mixture."""
    return lambda wildcards: expand(paths, dataset=CONFIG.members(wildcards.dataset))


def all_datasets(paths):
    """Paths with a `dataset` wildcard, for every dataset."""
    return expand(paths, dataset=CONFIG.datasets)


def all_models(path):
    """One file of every dataset, model and seed, where pretraining puts it."""
    return [
        file
        for dataset in CONFIG.datasets
        for model in CONFIG.models
        for file in expand(
            f"{MODEL}/{path}",
            dataset=CONFIG.pretrained_on(dataset, model),
            model=model,
            seed=CONFIG.seeds,
        )
    ]


def pretrained(wildcards):
    """An input function: the pretraining that the models of the wildcard's dataset start from."""
    return expand(
        f"{MODEL}/pretrain/model.json",
        dataset=CONFIG.pretrained_on(wildcards.dataset, wildcards.model),
        model=wildcards.model,
        seed=wildcards.seed,
    )


def all_targets(path):
    """One file of every dataset, model, seed and target; `path` holds the wildcard `target`."""
    return [
        file
        for name, dataset in CONFIG.datasets.items()
        for file in expand(
            f"{MODEL}/{path}",
            dataset=name,
            model=CONFIG.models,
            seed=CONFIG.seeds,
            target=dataset.targets,
        )
    ]

# The scaling study: each model on each share of the training subjects, once per seed. Not part of
# `all`; ask for it by `snakemake scaling`.

CELL = f"{ROOT}/scaling/{{model}}/fraction-{{fraction}}/seed-{{seed}}"
STUDIED = CONFIG.scaling.models or CONFIG.models


def all_cells(wildcards):
    """The finished trainings of one dataset's study."""
    study = CONFIG.study()
    return expand(
        f"{CELL}/model.json",
        dataset=wildcards.dataset,
        model=study.models,
        fraction=[f"{fraction:g}" for fraction in study.scaling.fractions],
        seed=study.seeds,
    )


def all_studies(wildcards):
    """The fit of every dataset, or of the mixture that the study's models are trained on."""
    study = CONFIG.study()
    where = {
        study.pretrained_on(dataset, model): None
        for dataset in study.datasets
        for model in study.models
    }
    return expand(f"{ROOT}/scaling/fit.json", dataset=where)


rule pretrain_cell:
    """Train one model without labels on a share of the training subjects."""
    input:
        split=of_members(rules.split_dataset.output.split),
        tokens=of_members(all_batches("tokens")),
    output:
        f"{CELL}/model.json",
    log:
        f"logs/{CELL}.log",
    benchmark:
        f"logs/{CELL}.benchmark.tsv"
    wildcard_constraints:
        model="|".join(map(re.escape, STUDIED)),
        fraction=r"[0-9.e-]+",
    threads: 8
    params:
        run=TRAINING,
        model=lambda wildcards: STUDIED[wildcards.model].model_dump(
            mode="json", exclude={"finetune"}
        ),
        members=lambda wildcards: CONFIG.members(wildcards.dataset),
        steps=CONFIG.scaling.steps,
    shell:
        "exec neuromamba pretrain {params.run} --fraction {wildcards.fraction} --on-change restart"
        + LOGGED


rule fit_scaling:
    """Put the study's trainings in a table and a figure, and fit loss against compute."""
    input:
        all_cells,
    output:
        expand(
            f"{ROOT}/scaling/{{file}}",
            file=["scaling.tsv", "scaling.svg", "scaling.png", "fit.json"],
            allow_missing=True,
        ),
    log:
        f"logs/{ROOT}/scaling.log",
    params:
        run=RUN,
        evaluate={
            key: getattr(CONFIG.evaluate, key) for key in ("bootstrap", "confidence")
        },
    shell:
        "neuromamba scaling {params.run} 2>&1 | tee {log}"

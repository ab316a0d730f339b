# The scaling study: each model on each share of the training subjects, once per seed. Not part of
# `all`; ask for it by `snakemake scaling`.

CELL = f"{ROOT}/scaling/{{model}}/fraction-{{fraction}}/seed-{{seed}}"


rule pretrain_cell:
    """Train one model without labels on a share of the training subjects."""
    input:
        needs("cell"),
    output:
        f"{CELL}/model.json",
    log:
        f"logs/{CELL}.log",
    benchmark:
        f"logs/{CELL}.benchmark.tsv"
    wildcard_constraints:
        model="|".join(map(re.escape, SCALING)),
        fraction=r"[0-9.e-]+",
    conda:
        "../../envs/neuromamba.yaml"
    threads: 8 * CONFIG.compute.processes
    resources:
        **TOGETHER,
    params:
        run=TRAINING,
    shell:
        f"exec neuromamba pretrain {{params.run}} --fraction {{wildcards.fraction}} --on-change restart"
        f"{LOGGED}"


rule fit_scaling:
    """Put the study's trainings in a table and a figure, and fit loss against compute."""
    input:
        needs("scaling"),
    output:
        expand(
            f"{ROOT}/scaling/{{file}}",
            file=["scaling.tsv", "scaling.png", "fit.json"],
            allow_missing=True,
        ),
        report(
            f"{ROOT}/scaling/scaling.svg",
            caption="../report/scaling.rst",
            category="Scaling ({dataset})",
        ),
    log:
        f"logs/{ROOT}/scaling.log",
    benchmark:
        f"logs/{ROOT}/scaling.benchmark.tsv"
    conda:
        "../../envs/neuromamba.yaml"
    params:
        run=RUN,
    shell:
        "neuromamba scaling {params.run} 2>&1 | tee {log}"

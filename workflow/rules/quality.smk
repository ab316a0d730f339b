# Which runs and subjects are used: quality, what was left out, and the split.


rule qc_batch:
    """Measure the quality of the runs of one batch, with a page for each."""
    input:
        needs("qc"),
    output:
        f"{ROOT}/qc/batch-{{batch}}.tsv",
    log:
        f"logs/{ROOT}/qc/batch-{{batch}}.log",
    benchmark:
        f"logs/{ROOT}/qc/batch-{{batch}}.benchmark.tsv"
    conda:
        "../../envs/neuromamba.yaml"
    params:
        run=RUN,
    shell:
        "neuromamba qc {params.run} --batch {wildcards.batch} 2>&1 | tee {log}"


rule list_excluded:
    """List the runs that were left out on the way, with the reasons."""
    input:
        needs("excluded"),
    output:
        report(
            f"{ROOT}/excluded.tsv",
            caption="../report/excluded.rst",
            category="Data",
            subcategory="{dataset}",
        ),
    log:
        f"logs/{ROOT}/excluded.log",
    benchmark:
        f"logs/{ROOT}/excluded.benchmark.tsv"
    conda:
        "../../envs/neuromamba.yaml"
    params:
        run=RUN,
    shell:
        "neuromamba excluded {params.run} 2>&1 | tee {log}"


rule overview_dataset:
    """Compare the quality of all runs of a dataset on one page."""
    input:
        needs("overview"),
    output:
        f"{ROOT}/overview.tsv",
        report(
            f"{ROOT}/overview.html",
            caption="../report/overview.rst",
            category="Data",
            subcategory="{dataset}",
        ),
    log:
        f"logs/{ROOT}/overview.log",
    benchmark:
        f"logs/{ROOT}/overview.benchmark.tsv"
    conda:
        "../../envs/neuromamba.yaml"
    params:
        run=RUN,
    shell:
        "neuromamba overview {params.run} 2>&1 | tee {log}"


rule split_dataset:
    """Assign subjects to training, validation and test."""
    input:
        needs("splits"),
    # Repeats are added to the folds that there are, which are not removed before.
    output:
        update(
            expand(
                f"{ROOT}/splits/{{fold}}.tsv",
                fold=filter(None, CONFIG.splits.names),
                allow_missing=True,
            )
        ),
        report(
            update(
                f"{ROOT}/splits/{'folds' if CONFIG.splits.names[0] else 'holdout'}.tsv"
            ),
            caption="../report/splits.rst",
            category="Data",
            subcategory="{dataset}",
        ),
    log:
        f"logs/{ROOT}/splits.log",
    benchmark:
        f"logs/{ROOT}/splits.benchmark.tsv"
    conda:
        "../../envs/neuromamba.yaml"
    params:
        run=RUN,
    shell:
        "neuromamba splits {params.run} 2>&1 | tee {log}"

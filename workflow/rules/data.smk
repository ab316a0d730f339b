rule index_dataset:
    """List the runs of a dataset's derivatives, with their masks and confounds."""
    input:
        needs("index"),
    output:
        f"{ROOT}/index.tsv",
        expand(
            f"{ROOT}/index/batch-{{batch}}.tsv",
            batch=range(CONFIG.compute.batches),
            allow_missing=True,
        ),
    log:
        f"logs/{ROOT}/index.log",
    benchmark:
        f"logs/{ROOT}/index.benchmark.tsv"
    conda:
        "../../envs/neuromamba.yaml"
    params:
        run=RUN,
    shell:
        "neuromamba index {params.run} 2>&1 | tee {log}"


rule volumes_batch:
    """Resample the runs of one batch to the common grid."""
    input:
        needs("volumes"),
    output:
        f"{ROOT}/volumes/batch-{{batch}}.tsv",
    log:
        f"logs/{ROOT}/volumes/batch-{{batch}}.log",
    benchmark:
        f"logs/{ROOT}/volumes/batch-{{batch}}.benchmark.tsv"
    conda:
        "../../envs/neuromamba.yaml"
    params:
        run=RUN,
    shell:
        "neuromamba volumes {params.run} --batch {wildcards.batch} 2>&1 | tee {log}"


rule tokens_batch:
    """Index the brain patches of the runs of one batch, and pack their values."""
    input:
        needs("tokens"),
    output:
        f"{ROOT}/tokens/batch-{{batch}}.tsv",
    log:
        f"logs/{ROOT}/tokens/batch-{{batch}}.log",
    benchmark:
        f"logs/{ROOT}/tokens/batch-{{batch}}.benchmark.tsv"
    conda:
        "../../envs/neuromamba.yaml"
    params:
        run=RUN,
    shell:
        "neuromamba tokens {params.run} --batch {wildcards.batch} 2>&1 | tee {log}"


rule rois_batch:
    """Average the runs of one batch over regions, and correlate the regions."""
    input:
        needs("rois"),
    output:
        f"{ROOT}/rois/batch-{{batch}}.tsv",
    log:
        f"logs/{ROOT}/rois/batch-{{batch}}.log",
    benchmark:
        f"logs/{ROOT}/rois/batch-{{batch}}.benchmark.tsv"
    conda:
        "../../envs/neuromamba.yaml"
    params:
        run=RUN,
    shell:
        "neuromamba rois {params.run} --batch {wildcards.batch} 2>&1 | tee {log}"


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


rule split_dataset:
    """Assign subjects to training, validation and test."""
    input:
        needs("splits"),
    output:
        report(
            f"{ROOT}/splits/holdout.tsv",
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

rule index_dataset:
    """List the runs of a dataset's derivatives, with their masks and confounds."""
    input:
        lambda wildcards: existing(CONFIG.datasets[wildcards.dataset].derivatives),
    output:
        f"{ROOT}/index.tsv",
    log:
        f"logs/{ROOT}/index.log",
    params:
        run=RUN,
        dataset=of_dataset(
            "derivatives",
            "space",
            "resolution",
            "entities",
            "files",
            "repetition_time",
            "exclude",
        ),
    shell:
        "neuromamba index {params.run} 2>&1 | tee {log}"


rule volumes_batch:
    """Resample the runs of one batch to the common grid."""
    input:
        rules.index_dataset.output,
    output:
        f"{ROOT}/volumes/batch-{{batch}}.tsv",
    log:
        f"logs/{ROOT}/volumes/batch-{{batch}}.log",
    benchmark:
        f"logs/{ROOT}/volumes/batch-{{batch}}.benchmark.tsv"
    params:
        run=RUN,
        volumes=CONFIG.volumes.model_dump(mode="json"),
        time_patch=CONFIG.tokens.time_patch,
        batches=CONFIG.compute.batches,
    shell:
        "neuromamba volumes {params.run} --batch {wildcards.batch} 2>&1 | tee {log}"


rule tokens_batch:
    """Index the brain patches of the runs of one batch, and pack their values."""
    input:
        rules.volumes_batch.output,
    output:
        f"{ROOT}/tokens/batch-{{batch}}.tsv",
    log:
        f"logs/{ROOT}/tokens/batch-{{batch}}.log",
    benchmark:
        f"logs/{ROOT}/tokens/batch-{{batch}}.benchmark.tsv"
    params:
        run=RUN,
        tokens=CONFIG.tokens.model_dump(mode="json"),
    shell:
        "neuromamba tokens {params.run} --batch {wildcards.batch} 2>&1 | tee {log}"


rule rois_batch:
    """Average the runs of one batch over regions, and correlate the regions."""
    input:
        rules.volumes_batch.output,
        lambda wildcards: existing(CONFIG.datasets[wildcards.dataset].atlas),
    output:
        f"{ROOT}/rois/batch-{{batch}}.tsv",
    log:
        f"logs/{ROOT}/rois/batch-{{batch}}.log",
    benchmark:
        f"logs/{ROOT}/rois/batch-{{batch}}.benchmark.tsv"
    params:
        run=RUN,
        dataset=of_dataset("atlas"),
        rois=CONFIG.rois.model_dump(mode="json"),
    shell:
        "neuromamba rois {params.run} --batch {wildcards.batch} 2>&1 | tee {log}"


rule split_dataset:
    """Assign subjects to training, validation and test; list what was left out on the way."""
    input:
        rules.index_dataset.output,
        all_batches("volumes"),
        all_batches("tokens"),
        all_batches("rois"),
        lambda wildcards: existing(participants_file(wildcards.dataset)),
    output:
        split=f"{ROOT}/splits/holdout.tsv",
        excluded=f"{ROOT}/excluded.tsv",
    log:
        f"logs/{ROOT}/splits.log",
    params:
        run=RUN,
        dataset=of_dataset("participants", "targets"),
        splits=CONFIG.splits.model_dump(mode="json"),
    shell:
        "neuromamba splits {params.run} 2>&1 | tee {log}"

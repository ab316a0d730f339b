# One job a subject: fMRIPrep takes hours. A subject that fails is recorded and does not fail its job;
# other limits of memory or time, or `--forcerun` with its file, try it again.
rule preprocess_subject:
    """Bring the raw scans of one subject to MNI space, by the engine that the config names."""
    input:
        needs("preprocess"),
    output:
        f"{ROOT}/preprocess/{{subject}}.json",
    log:
        f"logs/{ROOT}/preprocess/{{subject}}.log",
    benchmark:
        f"logs/{ROOT}/preprocess/{{subject}}.benchmark.tsv"
    conda:
        "../../envs/neuromamba.yaml"
    threads: CONFIG.preprocess.threads
    resources:
        mem_mb=CONFIG.preprocess.memory_mb,
        runtime=round(CONFIG.preprocess.time_limit) + 10,
    params:
        run=RUN,
    shell:
        "neuromamba preprocess {params.run} --subject {wildcards.subject} 2>&1 | tee {log}"


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


rule anat_batch:
    """Resample the T1-weighted images of one batch of subjects to the common grid."""
    input:
        needs("anat"),
    output:
        f"{ROOT}/anat/batch-{{batch}}.tsv",
    log:
        f"logs/{ROOT}/anat/batch-{{batch}}.log",
    benchmark:
        f"logs/{ROOT}/anat/batch-{{batch}}.benchmark.tsv"
    conda:
        "../../envs/neuromamba.yaml"
    params:
        run=RUN,
    shell:
        "neuromamba anat {params.run} --batch {wildcards.batch} 2>&1 | tee {log}"


rule codes_batch:
    """Encode the slices of the runs of one batch by a frozen autoencoder, as 27 tokens a volume."""
    input:
        needs("codes"),
    output:
        f"{ROOT}/codes{{fold}}/batch-{{batch}}.tsv",
    log:
        f"logs/{ROOT}/codes{{fold}}/batch-{{batch}}.log",
    benchmark:
        f"logs/{ROOT}/codes{{fold}}/batch-{{batch}}.benchmark.tsv"
    conda:
        "../../envs/neuromamba.yaml"
    threads: 8
    resources:
        gpu=1 if CONFIG.compute.device != "cpu" else 0,
    params:
        run=RUN,
        fold=option_of_fold,
    shell:
        "neuromamba codes {params.run} --batch {wildcards.batch} {params.fold} 2>&1 | tee {log}"

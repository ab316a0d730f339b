# The output of a training rule is its last file alone: Snakemake deletes the outputs of a job that
# fails, and the checkpoints beside it must survive for the job to continue where it stopped.


rule pretrain_model:
    """Train a model without labels on the training subjects."""
    input:
        needs("pretrain"),
    output:
        f"{MODEL}/pretrain{{fold}}/model.json",
    log:
        f"logs/{MODEL}/pretrain{{fold}}.log",
    benchmark:
        f"logs/{MODEL}/pretrain{{fold}}.benchmark.tsv"
    conda:
        "../../envs/neuromamba.yaml"
    threads: 8 * CONFIG.compute.processes
    resources:
        **TOGETHER,
    params:
        run=TRAINING,
        fold=option_of_fold,
    shell:
        f"exec neuromamba pretrain {{params.run}} {{params.fold}} --on-change restart"
        f"{LOGGED}"


rule finetune_model:
    """Train a pretrained model, or a head on it, to predict one target."""
    input:
        needs("finetune"),
    output:
        f"{MODEL}/finetune/{{target}}{{fold}}/model.json",
    log:
        f"logs/{MODEL}/finetune/{{target}}{{fold}}.log",
    benchmark:
        f"logs/{MODEL}/finetune/{{target}}{{fold}}.benchmark.tsv"
    conda:
        "../../envs/neuromamba.yaml"
    threads: 8 * CONFIG.compute.processes
    resources:
        **TOGETHER,
    params:
        run=TRAINING,
        fold=option_of_fold,
    shell:
        f"exec neuromamba finetune {{params.run}} --target {{wildcards.target}} {{params.fold}}"
        " --on-change restart"
        f"{LOGGED}"


rule train_tokenizer:
    """Train an autoencoder of slices on the training subjects, for the codes of volumes."""
    input:
        needs("tokenizer"),
    output:
        f"{ROOT}/tokenizer{{fold}}/model.json",
    log:
        f"logs/{ROOT}/tokenizer{{fold}}.log",
    benchmark:
        f"logs/{ROOT}/tokenizer{{fold}}.benchmark.tsv"
    conda:
        "../../envs/neuromamba.yaml"
    threads: 8
    resources:
        gpu=1 if CONFIG.compute.device != "cpu" else 0,
    params:
        run=RUN,
        fold=option_of_fold,
    shell:
        f"exec neuromamba tokenizer {{params.run}} {{params.fold}} --on-change restart"
        f"{LOGGED}"

# The output of a training rule is its last file alone: Snakemake deletes the outputs of a job that
# fails, and the checkpoints beside it must survive for the job to continue where it stopped.


rule pretrain_model:
    """Train a model without labels on the training subjects."""
    input:
        split=of_members(rules.split_dataset.output.split),
        tokens=of_members(all_batches("tokens")),
        start=lambda wildcards: starting_weights(wildcards.model),
    output:
        f"{MODEL}/pretrain/model.json",
    log:
        f"logs/{MODEL}/pretrain.log",
    benchmark:
        f"logs/{MODEL}/pretrain.benchmark.tsv"
    threads: 8
    params:
        run=TRAINING,
        model=of_model(drop=["finetune"]),
        members=lambda wildcards: CONFIG.members(wildcards.dataset),
    shell:
        "exec neuromamba pretrain {params.run} --on-change restart" + LOGGED


rule finetune_model:
    """Train a pretrained model, or a head on it, to predict one target."""
    input:
        pretrained=pretrained,
        split=rules.split_dataset.output.split,
    output:
        f"{MODEL}/finetune/{{target}}/model.json",
    log:
        f"logs/{MODEL}/finetune/{{target}}.log",
    benchmark:
        f"logs/{MODEL}/finetune/{{target}}.benchmark.tsv"
    threads: 8
    params:
        run=TRAINING,
        model=of_model("finetune"),
        target=lambda wildcards: CONFIG.datasets[wildcards.dataset]
        .targets[wildcards.target]
        .model_dump(mode="json"),
    shell:
        "exec neuromamba finetune {params.run} --target {wildcards.target} --on-change restart"
        + LOGGED


rule evaluate_model:
    """Predict the test subjects by the model and by the baselines, and score the predictions."""
    input:
        model=rules.finetune_model.output,
        split=rules.split_dataset.output.split,
        rois=all_batches("rois"),
    output:
        expand(
            f"{MODEL}/evaluate/{{target}}/{{file}}",
            file=["predictions.tsv", "notes.json", "comparison.tsv", "metrics.tsv"],
            allow_missing=True,
        ),
    log:
        f"logs/{MODEL}/evaluate/{{target}}.log",
    benchmark:
        f"logs/{MODEL}/evaluate/{{target}}.benchmark.tsv"
    threads: 4
    params:
        run=TRAINING,
        evaluate=CONFIG.evaluate.model_dump(mode="json"),
    shell:
        "neuromamba evaluate {params.run} --target {wildcards.target} 2>&1 | tee {log}"


rule forecast_model:
    """Forecast the rest of windows of the test subjects' runs by the pretrained model."""
    input:
        pretrained=pretrained,
        split=rules.split_dataset.output.split,
        tokens=all_batches("tokens"),
    output:
        tables=expand(
            f"{MODEL}/forecast/{{file}}",
            file=["errors.tsv", "forecast.tsv"],
            allow_missing=True,
        ),
        figure=f"{MODEL}/forecast/forecast.svg",
        facts=f"{MODEL}/forecast/forecast.json",
    log:
        f"logs/{MODEL}/forecast.log",
    benchmark:
        f"logs/{MODEL}/forecast.benchmark.tsv"
    threads: 4
    params:
        run=TRAINING,
        forecast=CONFIG.forecast.model_dump(mode="json"),
        evaluate=CONFIG.evaluate.model_dump(
            mode="json", include={"bootstrap", "confidence", "allow_seen_subjects"}
        ),
    shell:
        "neuromamba forecast {params.run} 2>&1 | tee {log}"

# The output of a training rule is its last file alone: Snakemake deletes the outputs of a job that
# fails, and the checkpoints beside it must survive for the job to continue where it stopped.


rule pretrain_model:
    """Train a model without labels on the training subjects."""
    input:
        needs("pretrain"),
    output:
        f"{MODEL}/pretrain/model.json",
    log:
        f"logs/{MODEL}/pretrain.log",
    benchmark:
        f"logs/{MODEL}/pretrain.benchmark.tsv"
    conda:
        "../../envs/neuromamba.yaml"
    threads: 8 * CONFIG.compute.processes
    resources:
        **TOGETHER,
    params:
        run=TRAINING,
    shell:
        f"exec neuromamba pretrain {{params.run}} --on-change restart" f"{LOGGED}"


rule finetune_model:
    """Train a pretrained model, or a head on it, to predict one target."""
    input:
        needs("finetune"),
    output:
        f"{MODEL}/finetune/{{target}}/model.json",
    log:
        f"logs/{MODEL}/finetune/{{target}}.log",
    benchmark:
        f"logs/{MODEL}/finetune/{{target}}.benchmark.tsv"
    conda:
        "../../envs/neuromamba.yaml"
    threads: 8 * CONFIG.compute.processes
    resources:
        **TOGETHER,
    params:
        run=TRAINING,
    shell:
        f"exec neuromamba finetune {{params.run}} --target {{wildcards.target}} --on-change restart"
        f"{LOGGED}"


rule evaluate_model:
    """Predict the test subjects by the model and by the baselines, and score the predictions."""
    input:
        needs("evaluate"),
    output:
        f"{MODEL}/evaluate/{{target}}/notes.json",
        f"{MODEL}/evaluate/{{target}}/comparison.tsv",
        report(
            f"{MODEL}/evaluate/{{target}}/predictions.tsv",
            caption="../report/predictions.rst",
            category="{target} ({dataset})",
            labels={"model": "{model}", "seed": "{seed}", "table": "predictions"},
        ),
        report(
            f"{MODEL}/evaluate/{{target}}/metrics.tsv",
            caption="../report/metrics.rst",
            category="{target} ({dataset})",
            labels={"model": "{model}", "seed": "{seed}", "table": "metrics"},
        ),
    log:
        f"logs/{MODEL}/evaluate/{{target}}.log",
    benchmark:
        f"logs/{MODEL}/evaluate/{{target}}.benchmark.tsv"
    conda:
        "../../envs/neuromamba.yaml"
    threads: 4
    params:
        run=TRAINING,
    shell:
        "neuromamba evaluate {params.run} --target {wildcards.target} 2>&1 | tee {log}"


rule forecast_model:
    """Forecast the rest of windows of the test subjects' runs by the pretrained model."""
    input:
        needs("forecast"),
    output:
        tables=expand(
            f"{MODEL}/forecast/{{file}}",
            file=["errors.tsv", "forecast.tsv"],
            allow_missing=True,
        ),
        figure=report(
            f"{MODEL}/forecast/forecast.svg",
            caption="../report/forecast.rst",
            category="Forecasts ({dataset})",
            labels={"model": "{model}", "seed": "{seed}"},
        ),
        facts=f"{MODEL}/forecast/forecast.json",
    log:
        f"logs/{MODEL}/forecast.log",
    benchmark:
        f"logs/{MODEL}/forecast.benchmark.tsv"
    conda:
        "../../envs/neuromamba.yaml"
    threads: 4
    params:
        run=TRAINING,
    shell:
        "neuromamba forecast {params.run} 2>&1 | tee {log}"

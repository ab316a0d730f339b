# What the models and the baselines say of the test subjects, and why.


rule predict_baselines:
    """Predict the test subjects by the baselines, once for all models and seeds."""
    input:
        needs("baselines"),
    output:
        f"{ROOT}/baselines/{{target}}{{fold}}/predictions.tsv",
        f"{ROOT}/baselines/{{target}}{{fold}}/notes.json",
    log:
        f"logs/{ROOT}/baselines/{{target}}{{fold}}.log",
    benchmark:
        f"logs/{ROOT}/baselines/{{target}}{{fold}}.benchmark.tsv"
    conda:
        "../../envs/neuromamba.yaml"
    threads: 4
    params:
        run=RUN,
        fold=option_of_fold,
    shell:
        "neuromamba baselines {params.run} --target {wildcards.target} {params.fold} 2>&1 | tee {log}"


rule evaluate_model:
    """Predict the test subjects by the model and score it beside the baselines; or pool the folds."""
    input:
        needs("evaluate"),
    output:
        f"{MODEL}/evaluate/{{target}}{{fold}}/notes.json",
        f"{MODEL}/evaluate/{{target}}{{fold}}/comparison.tsv",
        report(
            f"{MODEL}/evaluate/{{target}}{{fold}}/predictions.tsv",
            caption="../report/predictions.rst",
            category="{target} ({dataset})",
            labels={"model": "{model}", "seed": "{seed}", "table": "predictions"},
        ),
        report(
            f"{MODEL}/evaluate/{{target}}{{fold}}/metrics.tsv",
            caption="../report/metrics.rst",
            category="{target} ({dataset})",
            labels={"model": "{model}", "seed": "{seed}", "table": "metrics"},
        ),
    log:
        f"logs/{MODEL}/evaluate/{{target}}{{fold}}.log",
    benchmark:
        f"logs/{MODEL}/evaluate/{{target}}{{fold}}.benchmark.tsv"
    conda:
        "../../envs/neuromamba.yaml"
    threads: 4
    params:
        run=TRAINING,
        fold=lambda wildcards: option_of_fold(wildcards)
        or ("--pool" if FOLDS[0] else ""),
    shell:
        "neuromamba evaluate {params.run} --target {wildcards.target} {params.fold} 2>&1 | tee {log}"


rule forecast_model:
    """Forecast the rest of windows of the test subjects' runs by the pretrained model."""
    input:
        needs("forecast"),
    output:
        tables=expand(
            f"{MODEL}/forecast{{fold}}/{{file}}",
            file=["errors.tsv", "forecast.tsv"],
            allow_missing=True,
        ),
        figure=report(
            f"{MODEL}/forecast{{fold}}/forecast.svg",
            caption="../report/forecast.rst",
            category="Forecasts ({dataset})",
            labels={"model": "{model}", "seed": "{seed}"},
        ),
        facts=f"{MODEL}/forecast{{fold}}/forecast.json",
    log:
        f"logs/{MODEL}/forecast{{fold}}.log",
    benchmark:
        f"logs/{MODEL}/forecast{{fold}}.benchmark.tsv"
    conda:
        "../../envs/neuromamba.yaml"
    threads: 4
    params:
        run=TRAINING,
        fold=option_of_fold,
    shell:
        "neuromamba forecast {params.run} {params.fold} 2>&1 | tee {log}"


rule identify_subjects:
    """Tell the test subjects apart by the pretrained model, in two runs or the halves of one."""
    input:
        needs("identify"),
    output:
        expand(
            f"{MODEL}/identify{{fold}}/{{file}}",
            file=["pairs.tsv", "similarity.npz", "identify.tsv", "identify.json"],
            allow_missing=True,
        ),
        report(
            f"{MODEL}/identify{{fold}}/identify.svg",
            caption="../report/identify.rst",
            category="Identification ({dataset})",
            labels={"model": "{model}", "seed": "{seed}"},
        ),
    log:
        f"logs/{MODEL}/identify{{fold}}.log",
    benchmark:
        f"logs/{MODEL}/identify{{fold}}.benchmark.tsv"
    conda:
        "../../envs/neuromamba.yaml"
    threads: 4
    params:
        run=TRAINING,
        fold=option_of_fold,
    shell:
        "neuromamba identify {params.run} {params.fold} 2>&1 | tee {log}"


rule retrieve_pairs:
    """Find the test subjects' images by their networks and the other way, and prompt classes."""
    input:
        needs("retrieve"),
    output:
        expand(
            f"{MODEL}/retrieve{{fold}}/{{file}}",
            file=["embeddings.npz", "ranks.tsv", "retrieve.tsv", "retrieve.json"],
            allow_missing=True,
        ),
        report(
            f"{MODEL}/retrieve{{fold}}/retrieve.svg",
            caption="../report/retrieve.rst",
            category="Retrieval ({dataset})",
            labels={"model": "{model}", "seed": "{seed}"},
        ),
    log:
        f"logs/{MODEL}/retrieve{{fold}}.log",
    benchmark:
        f"logs/{MODEL}/retrieve{{fold}}.benchmark.tsv"
    conda:
        "../../envs/neuromamba.yaml"
    threads: 4
    params:
        run=TRAINING,
        fold=option_of_fold,
    shell:
        "neuromamba retrieve {params.run} {params.fold} 2>&1 | tee {log}"


rule explain_model:
    """Map where in the brain the predictions of one target come from, with checks of the map."""
    input:
        needs("explain"),
    output:
        expand(
            f"{MODEL}/explain/{{target}}{{fold}}/{{file}}",
            file=[
                "group_attribution.nii.gz",
                "group_attribution.json",
                "regions.tsv",
                "attribution.png",
                "explain.json",
            ],
            allow_missing=True,
        ),
        report(
            f"{MODEL}/explain/{{target}}{{fold}}/regions.svg",
            caption="../report/explain.rst",
            category="Attribution ({dataset})",
            labels={"model": "{model}", "seed": "{seed}", "target": "{target}"},
        ),
    log:
        f"logs/{MODEL}/explain/{{target}}{{fold}}.log",
    benchmark:
        f"logs/{MODEL}/explain/{{target}}{{fold}}.benchmark.tsv"
    conda:
        "../../envs/neuromamba.yaml"
    threads: 4
    params:
        run=TRAINING,
        fold=option_of_fold,
    shell:
        "neuromamba explain {params.run} --target {wildcards.target} {params.fold} 2>&1 | tee {log}"

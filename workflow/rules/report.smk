rule score_model:
    """Put the metrics and loss curves of a model in the form that DVC and others read."""
    input:
        needs("scores"),
    output:
        f"{CONFIG.results}/scores/{{dataset}}/{{model}}/seed-{{seed}}/metrics.json",
    log:
        f"logs/{MODEL}/scores.log",
    benchmark:
        f"logs/{MODEL}/scores.benchmark.tsv"
    conda:
        "../../envs/neuromamba.yaml"
    params:
        run=TRAINING,
    shell:
        "neuromamba scores {params.run} 2>&1 | tee {log}"


rule compare_ablations:
    """Put models and what they are without a part of theirs in one table."""
    input:
        needs("ablations"),
    output:
        facts=f"{ROOT}/ablations/leaderboard.json",
        tables=expand(
            f"{ROOT}/ablations/{{file}}",
            file=["leaderboard.tsv", "comparisons.tsv"],
            allow_missing=True,
        ),
        page=report(
            f"{ROOT}/ablations/leaderboard.html",
            caption="../report/ablations.rst",
            category="Result",
        ),
    log:
        f"logs/{ROOT}/ablations.log",
    benchmark:
        f"logs/{ROOT}/ablations.benchmark.tsv"
    conda:
        "../../envs/neuromamba.yaml"
    params:
        run=RUN,
    shell:
        "neuromamba ablations {params.run} 2>&1 | tee {log}"


rule report:
    """Put data, training and results of everything on one page."""
    input:
        needs("report"),
    output:
        expand(
            f"{CONFIG.results}/report/{{file}}",
            file=["metrics.tsv", "metrics.json", "methods.md", "references.bib"],
        ),
        report(
            f"{CONFIG.results}/report/index.html",
            caption="../report/report.rst",
            category="Result",
        ),
    log:
        f"logs/{CONFIG.results}/report.log",
    benchmark:
        f"logs/{CONFIG.results}/report.benchmark.tsv"
    conda:
        "../../envs/neuromamba.yaml"
    params:
        config=f"{CONFIG.results}/{next(iter(CONFIG.datasets))}/config.yaml",
    shell:
        "neuromamba report --config {params.config} 2>&1 | tee {log}"

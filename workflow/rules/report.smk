rule report:
    """Put data, training and results of everything on one page."""
    input:
        all_datasets(f"{ROOT}/excluded.tsv"),
        all_models("pretrain/model.json"),
        all_targets("evaluate/{target}/metrics.tsv"),
    output:
        f"{CONFIG.results}/report/index.html",
    log:
        f"logs/{CONFIG.results}/report.log",
    params:
        config=all_datasets(f"{ROOT}/config.yaml")[0],
    shell:
        "neuromamba report --config {params.config} 2>&1 | tee {log}"

"""The configuration: what ships is valid and complete, and mistakes are explained."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from neuromamba.config import (
    Config,
    Lmae,
    NeuroMamba,
    RoiTransformer,
    Tablet,
    build_config,
    load_config,
    save_config,
)
from neuromamba.files import InputError
from neuromamba.layout import Layout
from neuromamba.stages import Job, all_jobs, jobs_before, output_of

SHIPPED = ["bids", "demo", "fmriprep", "xcpd", "hcp", "ukb", "abcd", "adhd200", "abide"]


@pytest.fixture
def base(root: Path) -> Path:
    return root / "config" / "config.yaml"


def problem(base: Path, *settings: str) -> str:
    with pytest.raises(InputError) as caught:
        load_config([base], settings)
    return str(caught.value)


def test_importing_the_config_imports_no_torch():
    code = "import neuromamba.config, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("dataset", SHIPPED)
def test_every_shipped_dataset_is_valid(base: Path, dataset: str):
    config = load_config([base], [f"datasets=[{dataset}]"])
    assert list(config.datasets) == [dataset]


def test_no_shipped_dataset_is_forgotten(root: Path):
    shipped = [*SHIPPED, "series"]
    assert sorted(shipped) == sorted(p.stem for p in (root / "config/datasets").glob("*.yaml"))


SIZES = {"small": 128, "base": 192, "5m": 256, "12m": 384, "21m": 512, "47m": 768}


@pytest.mark.parametrize("size", SIZES)
def test_published_sizes(base: Path, size: str):
    name = f"neuromamba-{size}"
    model = load_config([base], [f"models=[{name}]"]).models[name]
    assert (model.width, model.state, model.depth) == (SIZES[size], SIZES[size] // 4, 12)


def test_a_model_with_a_base_shares_all_but_its_fine_tuning(base: Path, tmp_path: Path):
    (tmp_path / "two.yaml").write_text("models: [neuromamba-tiny, neuromamba-tiny-probe]")
    files = [base, tmp_path / "two.yaml"]
    config = load_config(files, ["pretrain.steps=7"])
    tiny, probe = config.models.values()
    assert probe.finetune.mode == "probe"
    assert tiny.finetune.mode == "head"
    assert probe.model_dump(exclude={"base", "finetune"}) == tiny.model_dump(
        exclude={"base", "finetune"}
    )
    changed = load_config(files, ["models.neuromamba-tiny.width=64"])
    assert changed.models["neuromamba-tiny-probe"].width == 64
    assert config.pretraining_of("d", "neuromamba-tiny-probe") == ("d", "neuromamba-tiny")
    with pytest.raises(InputError, match="must be another one of `models`"):
        load_config([base], ["models=[neuromamba-tiny-probe]"])
    with pytest.raises(InputError, match="in `finetune` alone"):
        load_config(files, ["models.neuromamba-tiny-probe.width=64"])


PARTS = """
models:
  whole: {family: lmae, width: 16, experts: 3}
  plain: {ablation_of: whole, experts: 0}
  untaught: {ablation_of: whole, base: whole, finetune: {start: fresh}}
"""


def test_an_ablation_is_another_model_but_for_what_it_changes(base: Path, tmp_path: Path):
    (tmp_path / "parts.yaml").write_text(PARTS)
    config = load_config([base, tmp_path / "parts.yaml"])
    assert list(config.ablations) == ["plain", "untaught"]
    plain = config.models["plain"].model_dump()
    assert plain == config.models["whole"].model_dump() | {"ablation_of": "whole", "experts": 0}
    assert config.pretraining_of("demo", "untaught") == ("demo", "whole")
    asked = [job.model for job in all_jobs(config) if job.stage == "scores"]
    assert set(asked) == {"whole"}
    compared = jobs_before(config, Job("ablations", "demo"))
    assert {job.stage for job in compared} == {"scores"}
    assert [job.model for job in compared] == ["whole", "plain", "untaught"]
    again = build_config(config.model_dump(mode="json"), tmp_path, "again")
    assert again.ablations.keys() == config.ablations.keys()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("models={a: {family: lmae, ablation_of: b}}", "must be another one of `models`"),
        ("models={a: {ablation_of: b}, b: {ablation_of: a}}", "must be another one of `models`"),
        (
            "models={a: {family: lmae}, b: {ablation_of: a}, c: {ablation_of: b}}",
            "and no ablation itself",
        ),
        (
            "models={a: {family: lmae, finetune: {start: fresh}}}",
            "a pretraining of its own would be for nothing",
        ),
    ],
)
def test_a_wrong_ablation_is_explained(base: Path, settings: str, message: str):
    assert message in problem(base, settings)


def test_the_scaling_study_is_of_models_with_a_pretraining_of_their_own(base: Path, tmp_path: Path):
    (tmp_path / "two.yaml").write_text("models: [neuromamba-tiny, neuromamba-tiny-probe]")
    files = [base, tmp_path / "two.yaml"]
    assert list(load_config(files).study().models) == ["neuromamba-tiny"]
    with pytest.raises(InputError, match="has a base"):
        load_config(files, ["scaling.models=[neuromamba-tiny, neuromamba-tiny-probe]"])
    folds = load_config(files, ["splits={protocol: k-fold}"])
    assert folds.study().fold == "fold-0"


def test_a_change_of_a_model_is_none_of_the_studys_models(base: Path, tmp_path: Path):
    (tmp_path / "study.yaml").write_text("scaling: {models: [neuromamba-5m]}")
    config = load_config([base, tmp_path / "study.yaml"], ["models.neuromamba-small.width=256"])
    assert config.models["neuromamba-small"].width == 256
    assert config.scaling.models is not None
    assert list(config.scaling.models) == ["neuromamba-5m"]


MIXTURE = ["datasets=[hcp,abcd]", "mixtures={both: {hcp: 3, abcd: 1}}"]


def test_a_mixture_of_datasets(base: Path):
    config = load_config([base], [*MIXTURE, "pretrain={mixture: both}"])
    assert config.members("both") == {"hcp": 0.75, "abcd": 0.25}
    assert config.members("hcp") == {"hcp": 1.0}
    assert config.pretraining_of("hcp", "neuromamba-small") == ("both", "neuromamba-small")
    alone = load_config([base], MIXTURE)
    assert alone.pretraining_of("hcp", "neuromamba-small") == ("hcp", "neuromamba-small")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["mixtures={both: {hcp: 1}}"], "mixtures.both: hcp not among `datasets` (fmriprep)"),
        (["mixtures={fmriprep: {fmriprep: 1}}"], "mixtures.fmriprep has the name of a dataset"),
        (["mixtures={none: {}}"], "mixtures.none must name at least one dataset"),
        (["mixtures={x: {fmriprep: 0}}"], "mixtures.x.fmriprep (is 0)"),
        (["pretrain={mixture: all}"], "pretrain.mixture is 'all', which is not among `mixtures`"),
    ],
)
def test_a_wrong_mixture_is_explained(base: Path, settings, message):
    assert message in problem(base, *settings)


def test_the_demo_is_valid(root: Path, base: Path):
    config = load_config([base, root / "config" / "demo.yaml"])
    assert list(config.datasets) == ["demo"]
    assert config.volumes.shape == (48, 48, 48)


def test_config_yaml_names_every_key_with_its_default(base: Path):
    """The file is the reference of the settings, so it must not drift from the schema."""
    written = yaml.safe_load(base.read_text())
    config = Config.model_json_schema()
    assert set(written) == set(config["properties"]) | {"pretrain", "finetune"}
    defaults = {name: NeuroMamba(family="neuromamba").model_dump(mode="json")[name]
                for name in ("pretrain", "finetune")}  # fmt: skip
    whole = load_config([base]).model_dump(mode="json")
    for section, values in written.items():
        if isinstance(values, dict):
            assert values == defaults.get(section, whole.get(section)), section
            fresh = defaults.get(section) or type(getattr(load_config([base]), section))()
            assert values == (fresh if isinstance(fresh, dict) else fresh.model_dump(mode="json"))


def test_the_small_model_names_every_key(root: Path):
    written = yaml.safe_load((root / "config/models/neuromamba-small.yaml").read_text())
    assert set(written) == set(NeuroMamba.model_fields) - {"pretrain", "finetune"}
    assert NeuroMamba(**written) == NeuroMamba(family="neuromamba")


@pytest.mark.parametrize(("name", "family"), [("lmae", Lmae), ("roi-transformer", RoiTransformer)])
def test_the_models_of_series_name_every_key(root: Path, name: str, family: type[Lmae]):
    written = yaml.safe_load((root / f"config/models/{name}.yaml").read_text())
    assert set(written) == set(family.model_fields)


def test_the_published_model_of_codes_names_every_key(root: Path):
    written = yaml.safe_load((root / "config/models/tablet.yaml").read_text())
    assert set(written) == set(Tablet.model_fields)
    trainings = {"pretrain", "finetune"}
    assert Tablet(**written).model_dump(exclude=trainings) == Tablet(family="tablet").model_dump(
        exclude=trainings
    )


def test_every_shipped_model_is_valid(root: Path, base: Path):
    names = sorted(path.stem for path in (root / "config" / "models").glob("*.yaml"))
    given = [f"models=[{','.join(names)}]", "codes.tokenizer=slices"]
    config = load_config([base], given)
    assert list(config.models) == names
    variants = {name for name in names if name.startswith(("lmae-", "cinp-"))}
    assert set(config.ablations) == variants - {"lmae-probe", "cinp-tiny"}


def test_the_benchmarks_configs_are_valid(root: Path, base: Path):
    folder = root / "benchmarks"
    below = {"painted_abide_tablet": [folder / "painted_abide.yaml"]}
    found = {
        path.stem: load_config([base, *below.get(path.stem, []), path])
        for path in folder.glob("*.yaml")
    }
    assert set(found) == {"abide_series", "painted_abide", "painted_abide_folds", *below}
    for config in found.values():
        assert "fc" in config.evaluate.baselines
        assert all(dataset.targets for dataset in config.datasets.values())
    assert found["abide_series"].ablations


def test_a_config_cannot_be_changed(base: Path):
    with pytest.raises(ValidationError):
        load_config([base]).volumes.voxel_size = 3.0  # type: ignore[misc]


def test_an_unknown_key_is_named_with_its_neighbours(base: Path):
    message = problem(base, "volumes.voxelsize=3")
    assert "unknown key 'volumes.voxelsize'" in message
    assert "voxel_size" in message
    assert str(base) in message


def test_an_unknown_key_in_a_dataset_file_names_that_file(tmp_path: Path):
    (tmp_path / "datasets").mkdir()
    (tmp_path / "datasets" / "mine.yaml").write_text("derivative: data\n")
    (tmp_path / "run.yaml").write_text(
        "datasets: [mine]\nmodels: {m: {family: neuromamba}}\n",
    )
    with pytest.raises(InputError) as caught:
        load_config([tmp_path / "run.yaml"])
    message = str(caught.value)
    assert f"{tmp_path / 'datasets' / 'mine.yaml'}: unknown key 'derivative'" in message


def test_a_dataset_needs_scans_in_a_standard_space(base: Path):
    assert "needs `derivatives`" in problem(base, "datasets={mine: {space: MNI152NLin6Asym}}")
    native = problem(base, "datasets={mine: {derivatives: data, space: T1w}}")
    assert "'T1w'" in native
    assert "MNI152NLin2009cAsym" in native


def test_two_raw_datasets_may_not_replace_each_others_subjects(base: Path):
    raw = "datasets={a: {bids: raw, derivatives: made}, b: {bids: other, derivatives: ./made/}}"
    assert "datasets a and b both preprocess into ./made/" in problem(base, raw)
    tasks = "datasets={a: {derivatives: made}, b: {derivatives: made}}"
    assert {"a", "b"} < {*load_config([base], [tasks]).datasets}


def test_derivatives_of_raw_scans_go_to_the_results_unless_told_otherwise(base: Path):
    raw = ["datasets={a: {bids: raw}, b: {bids: raw, derivatives: made}}", "results=out"]
    found = load_config([base], raw).datasets
    assert [found[name].derivatives for name in "ab"] == ["out/a/derivatives", "made"]


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("volumes.shape=[96, 96, 95]", "tokens.patch (6) must divide"),
        ("splits.test=0.95", "leave subjects to train on"),
        ("pretrain.steps=0", "greater than 0"),
        ("models=[neuromamba-huge]", "neuromamba-12m, neuromamba-21m"),
        ("datasets=[nothing]", "there are: abcd"),
        ("datasets=demo", "must be a list of names"),
        ("models.neuromamba-small.head_dim=48", "must be a multiple of head_dim (48)"),
        ("models.neuromamba-small.width=36", "must be a multiple of 8"),
        ("models.neuromamba-small.volumes=21", "must be a multiple of tokens.time_patch"),
        ("results", "must have the form key.key=value"),
        ("finetune.mode=ful", "'full', 'adapters', 'head' or 'probe'"),
    ],
)
def test_a_wrong_value_is_explained(base: Path, setting: str, words: str):
    assert words in problem(base, setting)


def test_a_file_that_is_no_yaml_is_named(tmp_path: Path):
    path = tmp_path / "broken.yaml"
    path.write_text("a: [1, 2\n")
    with pytest.raises(InputError, match=r"broken\.yaml is not valid YAML"):
        load_config([path])
    path.write_text("- a\n")
    with pytest.raises(InputError, match="must hold `key: value` lines"):
        load_config([path])
    with pytest.raises(InputError, match="does not exist"):
        load_config([tmp_path / "absent.yaml"])


def test_layers_of_settings(base: Path):
    """Shared section < the model's own file < the command line."""
    shared = {"pretrain": {"steps": 5, "batch_size": 7}}
    model = {"family": "neuromamba", "pretrain": {"steps": 6}}
    raw = {"datasets": {"d": {"derivatives": "x"}}, "models": {"m": model}, **shared}
    pretrain = build_config(raw, "config", "test").models["m"].pretrain
    assert (pretrain.steps, pretrain.batch_size) == (6, 7)
    changes = {"pretrain": {"steps": 8}}
    pretrain = build_config(raw, "config", "test", changes).models["m"].pretrain
    assert (pretrain.steps, pretrain.batch_size) == (8, 7)


def test_a_saved_config_reads_back_the_same(root: Path, base: Path, tmp_path: Path):
    config = load_config([base, root / "config" / "demo.yaml"], ["finetune.steps=3"])
    save_config(tmp_path / "config.yaml", config)
    assert load_config([tmp_path / "config.yaml"]) == config


def test_the_processes_of_a_training_share_its_batches(base: Path):
    compute = load_config([base], ["compute.processes=2", "compute.nodes=2"]).compute
    assert (compute.processes, compute.nodes) == (2, 2)
    assert "models.neuromamba-small.pretrain.batch_size (4) must be a multiple of" in problem(
        base, "compute.processes=4", "compute.nodes=2"
    )
    assert "compute.nodes" in problem(base, "compute.nodes=0")


# --- Datasets of ROI series -----------------------------------------------------------------------


SERIES = {"derivatives": "data/series", "series": {"segmentation": 400}, "space": "T1w"}


def config_of_series(**changes: Any) -> dict[str, Any]:
    models = {"m": {"family": "roi_transformer"}}
    return {"datasets": {"s": SERIES, "other": {"derivatives": "x"}}, "models": models, **changes}


def test_the_shipped_dataset_of_series_is_valid_with_a_model_of_these(base: Path, tmp_path: Path):
    path = tmp_path / "run.yaml"
    path.write_text("{datasets: [series], models: {m: {family: roi_transformer}}}")
    assert load_config([base, path]).datasets["series"].arrays == ("rois",)
    assert "needs tokens" in problem(base, "datasets=[series]")


def test_what_is_made_of_a_dataset_is_told_by_what_it_consists_of():
    datasets = build_config(config_of_series(), "config", "test").datasets
    assert datasets["s"].arrays == ("rois",)
    assert datasets["other"].arrays == ("volumes", "tokens", "rois")
    assert datasets["s"].series is not None
    assert datasets["s"].series.segmentation == "400"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"models": {"m": {"family": "neuromamba"}}},
            r"models.m \(family neuromamba\) needs tokens.*dataset s has ROI series",
        ),
        (
            {"scaling": {"models": {"m": {"family": "neuromamba"}}}},
            r"scaling.models.m \(family neuromamba\) needs tokens",
        ),
        ({"qc": {"max_mean_fd": 0.3, "min_tsnr": 20}}, "qc.max_mean_fd, qc.min_tsnr can be"),
        ({"volumes": {"denoise": {"strategy": ["motion"]}}}, "volumes.denoise can be applied"),
        ({"volumes": {"denoise": {"smoothing": 6}}}, "volumes.denoise can be applied"),
        ({"rois": {"min_coverage": 0.5}}, "rois.min_coverage can be applied to images alone"),
        ({"datasets": {"s": {**SERIES, "bids": "raw"}}}, "bids is about images"),
        ({"datasets": {"s": {**SERIES, "resolution": "2"}}}, "resolution is about images"),
        ({"datasets": {"s": {"series": {}}}}, "needs `derivatives`"),
    ],
)
def test_what_needs_images_is_refused_for_series(changes: dict[str, Any], words: str):
    with pytest.raises(InputError, match=words):
        build_config(config_of_series(**changes), "config", "test")


def test_states_are_told_of_volumes_as_they_were_scanned():
    states = {"task": {"kind": "state", "classes": {"rest": "rest", "move": "move"}}}
    dataset = {"d": {"derivatives": "data", "targets": states}}
    raw = {"datasets": dataset, "models": {"m": {"family": "lmae"}}}
    with pytest.raises(InputError, match=r"models\.m\.repetition_time is 2 s.*set .* to null"):
        build_config(raw, "config", "test")
    raw["models"] = {"m": {"family": "lmae", "repetition_time": None}}
    assert build_config(raw, "config", "test").models["m"].repetition_time is None


def test_settings_of_quality_that_leave_out_nobody_do_not_matter_to_series():
    config = build_config(config_of_series(qc={"outlier": 5, "pages": False}), "config", "test")
    assert config.qc.outlier == 5


# --- Codes ----------------------------------------------------------------------------------------


@pytest.fixture
def reads_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The family `neuromamba` reads codes."""
    monkeypatch.setattr(NeuroMamba, "needs", ("codes",))


def test_a_name_on_the_hub_needs_its_commit(base: Path):
    hub = "codes.weights=owner/name"
    said = problem(base, hub)
    assert "name on the hub, where weights can change: set `revision` to the commit" in said
    assert "write ./owner/name" in said
    assert "set `revision`" in problem(base, hub, "codes.revision=main")
    load_config([base], [hub, f"codes.revision={'0a' * 20}"])
    load_config([base], ["codes.weights=./owner/name"])
    load_config([base], ["codes.weights=/data/weights/dc-ae"])
    said = problem(base, "codes.weights=./owner/name", f"codes.revision={'0a' * 20}")
    assert "is no name on it; leave revision out" in said


@pytest.mark.usefixtures("reads_codes")
def test_a_model_that_reads_codes_needs_weights_and_a_cube(base: Path):
    said = problem(base)
    assert "models.neuromamba-small (family neuromamba) reads codes, and codes.weights is" in said
    own = "codes.tokenizer=slices"
    assert "multiple of 3" in problem(base, own, "volumes.shape=[96, 90, 96]")
    assert "multiple of 3" in problem(base, own, "volumes.shape=[80, 80, 80]", "tokens.patch=4")
    load_config([base], [own])


@pytest.mark.usefixtures("reads_codes")
def test_codes_of_tokenizers_of_several_datasets_are_not_mixed(base: Path):
    mixture = ["datasets=[ukb, abcd]", "pretrain.mixture=all", "codes.tokenizer=slices"]
    said = problem(base, *mixture, "mixtures.all={ukb: 1, abcd: 1}")
    assert "each dataset has a tokenizer of its own" in said
    load_config([base], [*mixture, "mixtures.all={ukb: 1}"])
    dcae = ["codes.tokenizer=dc-ae", "codes.weights=/data/dc-ae"]
    load_config([base], [*mixture, *dcae, "mixtures.all={ukb: 1, abcd: 1}"])


def test_codes_are_made_only_where_a_model_reads_them(base: Path, monkeypatch: pytest.MonkeyPatch):
    made = {"codes", "tokenizer"}
    config = load_config([base], ["codes.tokenizer=slices"])
    assert not made & {job.stage for job in all_jobs(config)}
    monkeypatch.setattr(NeuroMamba, "needs", ("codes",))
    stages = [job.stage for job in all_jobs(config)]
    order = ("volumes", "splits", "tokenizer", "codes", "pretrain")
    assert [stages.index(one) for one in order] == sorted(stages.index(one) for one in order)
    published = load_config([base], ["codes.weights=/data/dc-ae"])
    assert made & {job.stage for job in all_jobs(published)} == {"codes"}


@pytest.mark.usefixtures("reads_codes")
def test_folds_have_codes_of_their_own_only_where_the_tokenizer_is_trained(base: Path):
    folds = ["splits.protocol=k-fold", "splits.folds=2"]
    own = load_config([base], ["codes.tokenizer=slices", *folds])
    published = load_config([base], ["codes.weights=/data/dc-ae", *folds])

    def files(config: Config, fold: str) -> list[str]:
        job = Job("pretrain", "fmriprep", model="neuromamba-small", fold=fold)
        before = [one for one in jobs_before(config, job) if one.stage == "codes"]
        return [str(output_of(config, one)) for one in before]

    assert files(own, "fold-1") == ["results/fmriprep/codes/fold-1/batch-0.tsv"]
    assert files(published, "fold-1") == ["results/fmriprep/codes/batch-0.tsv"]
    layout = Layout.of(own.in_fold("fold-1"), "fmriprep")
    assert str(layout.array("codes", "r")) == "results/fmriprep/codes/fold-1/r.zarr"
    assert str(layout.array("volumes", "r")) == "results/fmriprep/volumes/r.zarr"

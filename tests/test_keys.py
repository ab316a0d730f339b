"""Keys: what makes a result stale, and what does not."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml

from neuromamba import key_inputs, keys, source_code
from neuromamba.config import Config, NeuroMamba, build_config
from neuromamba.files import write_text
from neuromamba.keys import FOLLOWS, NOT_MADE, Keys
from neuromamba.layout import Layout
from neuromamba.recording import recorded
from neuromamba.records import forget_batches, record_path
from neuromamba.stages import Job, all_jobs, jobs_before, output_of
from neuromamba.status import accept_code, record_in_dvc, what_is_stale
from neuromamba.tables import write_table

MODEL = {"family": "neuromamba", "width": 64, "depth": 1}


@pytest.fixture
def scans(monkeypatch: pytest.MonkeyPatch) -> pd.DataFrame:
    """What the dataset holds; change it in place."""
    names = [f"sub-{k:02d}" for k in range(12)]
    runs = [f"{name}_task-rest" for name in names]
    table = pd.DataFrame({"run": runs, "subject": names, "fingerprint": "f"}, dtype="string")
    monkeypatch.setattr(key_inputs, "list_runs_of", lambda dataset: table.copy())
    return table


@pytest.fixture
def settings(tmp_path: Path) -> dict[str, Any]:
    people = pd.DataFrame(
        {
            "participant_id": [f"sub-{k:02d}" for k in range(13)],
            "sex": ["F", "M"] * 6 + ["F"],
            "age": range(20, 33),
        }
    )
    write_table(tmp_path / "participants.tsv", people)
    (tmp_path / "scans").mkdir()
    (tmp_path / "scans" / "dataset_description.json").touch()
    sex = {"kind": "classification", "column": "sex", "classes": {"female": "F", "male": "M"}}
    dataset = {
        "derivatives": str(tmp_path / "scans"),
        "participants": {"file": str(tmp_path / "participants.tsv")},
        "targets": {"sex": sex, "age": {"kind": "regression", "column": "age"}},
    }
    return {
        "results": str(tmp_path / "results"),
        "datasets": {"d": dataset},
        "models": {"m": MODEL},
        "compute": {"batches": 2},
    }


def config_of(settings: dict[str, Any], change: str = "") -> Config:
    """The config, with one setting changed: `section.key=value`."""
    raw = json.loads(json.dumps(settings))
    if change:
        key, value = change.split("=")
        *path, last = key.split(".")
        section = raw
        for name in path:
            section = section.setdefault(name, {})
        section[last] = yaml.safe_load(value)
    return build_config(raw, Path(), "test")


def make(config: Config, job: Job) -> None:
    """Do a job: leave its output, and its record."""
    with recorded(config, job):
        if job.stage == "splits":
            parts = ["train"] * 8 + ["validation"] * 2 + ["test"] * 2
            subjects = [f"sub-{k:02d}" for k in range(12)]
            table = pd.DataFrame({"subject": subjects, "part": parts})
            write_table(output_of(config, job), table)
            for number, name in enumerate(filter(None, config.splits.names)):
                parts = parts[-2:] + parts[:-2] if number else parts
                table = pd.DataFrame({"subject": subjects, "part": parts})
                write_table(Layout.of(config.in_fold(name), "d").split, table)
        elif job.stage == "index":
            write_table(output_of(config, job), key_inputs.list_runs_of(config.datasets["d"]))
        else:
            write_text(output_of(config, job), "made")


@pytest.fixture
def config(scans: pd.DataFrame, settings: dict[str, Any]) -> Config:
    """A config all of whose jobs have been done."""
    config = config_of(settings)
    for job in all_jobs(config):
        make(config, job)
    return config


def stale(config: Config) -> set[str]:
    found = Keys(config)
    return {job.stage for job in all_jobs(config) if found.is_stale(job)}


CHECKED = {"excluded", "overview"}
TRAININGS = {"pretrain", "finetune", "evaluate", "scores", "report"}
FROM_BASELINES = {"baselines", "evaluate", "scores", "report"}


def test_what_has_been_made_is_current_and_stays_so_when_it_is_moved(
    config: Config, settings: dict[str, Any], tmp_path: Path
):
    assert stale(config) == set()
    Path(config.results).rename(tmp_path / "moved")
    moved = config_of(settings, f"results={tmp_path / 'moved'}")
    assert stale(moved) == set()


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ("evaluate.bootstrap=7", {"evaluate", "scores", "report"}),
        ("evaluate.inner_folds=3", FROM_BASELINES),
        ("finetune.steps=7", {"finetune", "evaluate", "scores", "report"}),
        ("models.m.finetune.steps=7", {"finetune", "evaluate", "scores", "report"}),
        ("models.m.depth=2", TRAININGS),
        ("pretrain.learning_rate=0.5", TRAININGS),
        ("splits.folds=3", set()),
        ("splits.repeats=3", set()),
        ("splits.seed=3", {"splits", "baselines", *TRAININGS}),
        ("rois.cube=9", {"rois", *CHECKED, *FROM_BASELINES}),
        ("datasets.d.atlas=packaged:100", {"rois", *CHECKED, *FROM_BASELINES}),
        ("tokens.brain_fraction=0.5", {"tokens", "qc", *CHECKED, "baselines", *TRAININGS}),
        ("datasets.d.exclude=[sub-77]", {"index"}),
        ("compute.batches=3", {"index", "volumes", "tokens", "rois", "qc"}),
        ("qc.outlier=5", {"overview", "report"}),
        ("qc.fd_threshold=0.2", {"qc", "overview", "report"}),
        ("preprocess.engine=docker", set()),
        ("compute.max_excluded=0.5", set()),
        ("compute.device=cpu", set()),
        ("compute.processes=2", set()),
        ("pretrain.keep_checkpoints=9", set()),
        ("forecast.windows=9", set()),
        ("scaling.seeds=[4]", set()),
    ],
)
def test_a_setting_makes_its_stage_stale_and_those_below(
    config: Config, settings: dict[str, Any], change: str, expected: set[str]
):
    assert stale(config_of(settings, change)) == expected


FOLDS = {"protocol": "k-fold", "folds": 3}


@pytest.fixture
def folds(scans: pd.DataFrame, settings: dict[str, Any]) -> Config:
    """The same by cross-validation."""
    config = config_of(settings | {"splits": FOLDS})
    for job in all_jobs(config):
        make(config, job)
    return config


def test_what_has_been_made_of_folds_is_current(folds: Config, settings: dict[str, Any]):
    assert stale(folds) == set()
    assert stale(config_of(settings | {"splits": FOLDS}, "splits.test=0.3")) == set()
    # The holdout beside them is another thing.
    assert stale(config_of(settings)) == {"splits", "baselines", *TRAININGS}


def test_a_fold_that_changes_makes_its_own_trainings_stale(folds: Config):
    path = Layout.of(folds.in_fold("fold-1"), "d").split
    write_text(path, path.read_text().replace("sub-05\ttrain", "sub-05\tvalidation"))
    found = Keys(folds)
    jobs = [job for job in all_jobs(folds) if found.is_stale(job)]
    assert {job.fold for job in jobs} == {"fold-1", ""}
    assert {job.stage for job in jobs if not job.fold} == {"evaluate", "scores", "report"}
    assert {job.stage for job in jobs if job.fold} == {
        "baselines",
        "pretrain",
        "finetune",
        "evaluate",
    }


def test_more_repeats_make_the_folds_stale_that_are_added(folds: Config, settings: dict[str, Any]):
    more = config_of(settings | {"splits": FOLDS}, "splits.repeats=2")
    found = Keys(more)
    assert found.is_stale(Job("splits", "d"))
    assert found.why(Job("splits", "d")) == "splits.repeats was 1, is 2"
    added = {"fold-3", "fold-4", "fold-5"}
    assert {job.fold for job in all_jobs(more) if job.fold and found.is_stale(job)} == added
    of_all = {job.stage for job in all_jobs(more) if not job.fold and found.is_stale(job)}
    assert of_all == {"splits", "evaluate", "scores", "report"}
    assert found.kept_repeats("d") == 1
    for job in all_jobs(more):
        if found.is_stale(job):
            make(more, job)
    assert stale(more) == set()
    # One less again: what is made of all folds is made anew, and no fold.
    jobs = {job for job in all_jobs(folds) if Keys(folds).is_stale(job)}
    assert {job.fold for job in jobs} == {""}
    assert Keys(folds).kept_repeats("d") == 1


@pytest.mark.parametrize("what", ["other folds", "a fold that is gone", "a subject that is gone"])
def test_no_fold_is_kept_that_another_split_would_change(
    folds: Config, settings: dict[str, Any], scans: pd.DataFrame, what: str
):
    change = FOLDS | {"repeats": 2}
    if what == "other folds":
        change["validation"] = 0.3
    elif what == "a fold that is gone":
        Layout.of(folds.in_fold("fold-1"), "d").split.unlink()
    else:
        scans.loc[3, ["run", "subject"]] = ["sub-77_task-rest", "sub-77"]
    found = Keys(config_of(settings | {"splits": change}))
    assert found.kept_repeats("d") == 0
    assert found.is_stale(Job("pretrain", "d", model="m", seed=0, fold="fold-0"))


def test_a_model_with_a_base_starts_from_that_ones_pretraining(
    scans: pd.DataFrame, settings: dict[str, Any]
):
    settings["models"]["p"] = {"base": "m", "finetune": {"mode": "probe"}}
    config = config_of(settings)
    jobs = all_jobs(config)
    assert [job.model for job in jobs if job.stage == "pretrain"] == ["m"]
    for job in jobs:
        make(config, job)
    assert stale(config) == set()
    found = Keys(config_of(settings, "models.p.finetune.evaluation_windows=3"))
    old = {str(job) for job in jobs if found.is_stale(job)}
    assert "finetune (d, p, sex, seed 0)" in old
    assert "finetune (d, m, sex, seed 0)" not in old
    deeper = Keys(config_of(settings, "models.m.depth=2"))
    assert {job.model for job in jobs if job.stage == "finetune" and deeper.is_stale(job)} == {
        "m",
        "p",
    }


def test_a_second_seed_leaves_the_first_alone(config: Config, settings: dict[str, Any]):
    found = Keys(config_of(settings, "seeds=[0, 1]"))
    jobs = [job for job in all_jobs(found.config) if found.is_stale(job)]
    assert {job.seed for job in jobs if job.model} == {1}


def test_code_makes_its_stage_stale_and_those_below(
    config: Config, monkeypatch: pytest.MonkeyPatch
):
    real = source_code.code_of

    def code_of(*modules: str) -> dict[str, str]:
        return {file: digest + "x" * ("heads" in file) for file, digest in real(*modules).items()}

    monkeypatch.setattr(keys, "code_of", code_of)
    assert stale(config) == {"finetune", "evaluate", "scores", "report"}
    found = Keys(config)
    finetune = Job("finetune", "d", model="m", target="sex")
    assert found.why(finetune) == "code changed: neuromamba/heads.py"


def test_results_of_rewritten_code_can_be_kept_and_no_others(
    config: Config, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
):
    """A cosmetic change need not cost weeks of training."""
    model = output_of(config, Job("pretrain", "d", model="m"))
    model.write_text("{}")
    for target in ("sex", "age"):
        output_of(config, Job("finetune", "d", model="m", target=target)).write_text("{}")
    real = source_code.code_of

    def code_of(*modules: str) -> dict[str, str]:
        return {file: digest + "x" * ("batches" in file) for file, digest in real(*modules).items()}

    monkeypatch.setattr(keys, "code_of", code_of)
    assert stale(config) == TRAININGS
    other = config_of(settings, "finetune.steps=7")
    assert accept_code(other) == ["pretrain (d, m, seed 0)"]
    assert json.loads(model.read_text())["code"]["neuromamba/batches.py"].endswith("x")
    assert stale(config) == TRAININGS - {"pretrain"}
    assert len(accept_code(config)) == 6
    assert stale(config) == set()


def test_nothing_else_that_has_changed_before_a_result_is_accepted_with_code(
    config: Config, settings: dict[str, Any], tmp_path: Path
):
    """The jobs before it are current again, but it was not made of what they have now."""
    other = config_of(settings, "tokens.brain_fraction=0.5")
    for batch in range(2):
        make(other, Job("tokens", "d", batch=batch))
        make(other, Job("qc", "d", batch=batch))
    make(other, Job("excluded", "d"))
    make(other, Job("overview", "d"))
    assert stale(other) == {"baselines", *TRAININGS}
    assert accept_code(other) == []
    for job in all_jobs(other):
        make(other, job)
    write_text(tmp_path / "start" / "model.json", "{}")
    started = config_of(
        settings | {"pretrain": {"init_from": str(tmp_path / "start")}},
        "tokens.brain_fraction=0.5",
    )
    make(started, Job("pretrain", "d", model="m"))
    assert stale(started) == TRAININGS - {"pretrain"}
    assert accept_code(started) == []


def test_cells_of_a_study_with_models_of_its_own_are_current_once_they_are_made(
    config: Config, settings: dict[str, Any]
):
    study = {"models": {"other": MODEL}, "fractions": [0.5, 1.0]}
    with_study = config_of(settings | {"scaling": study})
    fit = Job("scaling", "d")
    cells = jobs_before(with_study, fit)
    assert {job.model for job in cells} == {"other"}
    for job in [*cells, fit]:
        make(with_study.study() if job.stage == "cell" else with_study, job)
    found = Keys(with_study)
    assert not any(found.is_stale(job) for job in [*cells, fit])
    longer = Keys(config_of(settings | {"scaling": study | {"steps": "proportional"}}))
    assert all(longer.is_stale(job) for job in [*cells, fit])


def test_an_added_subject_makes_its_batch_stale_and_no_training(
    config: Config, scans: pd.DataFrame
):
    scans.loc[len(scans)] = ["sub-12_task-rest", "sub-12", "f"]
    data = {"index", "volumes", "tokens", "rois", "qc"}
    assert stale(config) == {*data, *CHECKED, "scores", "report"}
    found = Keys(config)
    batches = [Job("tokens", "d", batch=number) for number in range(2)]
    assert sorted(found.is_stale(job) for job in batches) == [False, True]
    pretrain = Job("pretrain", "d", model="m")
    assert found.is_below_stale(pretrain)
    write_table(Layout.of(config, "d").excluded, pd.DataFrame({"run": ["sub-11_task-rest"]}))
    assert found.came_later("d") == ["sub-12"]


@pytest.mark.parametrize("change", ["replaced", "removed"])
def test_a_scan_of_the_split_that_changes_makes_the_trainings_stale(
    config: Config, scans: pd.DataFrame, change: str
):
    if change == "replaced":
        scans.loc[3, "fingerprint"] = "g"
    else:
        scans.loc[3, "subject"] = "sub-77"
    assert stale(config) >= TRAININGS
    assert ("splits" in stale(config)) == (change == "removed")


def test_a_label_makes_the_training_for_it_stale_alone(config: Config, tmp_path: Path):
    path = tmp_path / "participants.tsv"
    path.write_text(path.read_text().replace("sub-03\tM\t23", "sub-03\tM\t99"))
    found = Keys(config)
    jobs = [job for job in all_jobs(config) if found.is_stale(job)]
    assert {job.target for job in jobs if job.stage == "finetune"} == {"age"}
    # Where sex is told, age is what the confound model tells it by.
    assert {job.target for job in jobs if job.stage == "baselines"} == {"age", "sex"}
    assert {job.target for job in jobs if job.stage == "evaluate"} == {"age", "sex"}
    assert stale(config) == {"baselines", "finetune", "evaluate", "scores", "report"}
    # A subject that came later, and in no part, has no say.
    path.write_text(path.read_text().replace("sub-03\tM\t99", "sub-03\tM\t23"))
    path.write_text(path.read_text().replace("sub-12\tF\t32", "sub-12\tF\t99"))
    assert stale(config) == set()


def test_what_lies_elsewhere_is_taken_to_be_as_it_was(config: Config, tmp_path: Path):
    (tmp_path / "scans").rename(tmp_path / "archive")
    (tmp_path / "participants.tsv").rename(tmp_path / "archive.tsv")
    assert stale(config) == set()


def test_a_job_that_did_not_end_leaves_no_record(config: Config):
    job = Job("evaluate", "d", model="m", target="sex")

    with pytest.raises(RuntimeError), recorded(config, job):
        raise RuntimeError
    found = Keys(config)
    assert found.is_stale(job)
    assert found.why(job) == NOT_MADE


def test_a_record_is_of_what_lay_on_disk_and_not_of_the_config(
    config: Config, settings: dict[str, Any]
):
    """Tokens that are made by hand from volumes of other settings are not taken for right."""
    other = config_of(settings, "volumes.voxel_size=3")
    for batch in range(2):
        make(other, Job("tokens", "d", batch=batch))
    assert "tokens" in stale(other)
    make(other, Job("volumes", "d", batch=0))
    make(other, Job("tokens", "d", batch=0))
    assert not Keys(other).is_stale(Job("tokens", "d", batch=0))


def test_an_empty_mount_point_is_no_empty_dataset(config: Config, tmp_path: Path):
    (tmp_path / "scans" / "dataset_description.json").unlink()
    assert stale(config) == set()


def test_other_weights_to_start_from_reach_the_evaluation(
    config: Config, settings: dict[str, Any], tmp_path: Path
):
    write_text(tmp_path / "start" / "model.json", "{}")
    other = config_of(settings, f"pretrain.init_from={tmp_path / 'start'}")
    assert stale(other) == TRAININGS
    for job in all_jobs(other):
        make(other, job)
    assert stale(other) == set()
    write_text(tmp_path / "start" / "model.json", "{ }")
    assert stale(other) == TRAININGS


def test_another_atlas_reaches_the_evaluation(
    config: Config, settings: dict[str, Any], tmp_path: Path
):
    write_text(tmp_path / "atlas.nii.gz", "regions")
    other = config_of(settings, f"datasets.d.atlas={tmp_path / 'atlas.nii.gz'}")
    assert stale(other) == {"rois", *CHECKED, *FROM_BASELINES}


def test_a_mixture_reaches_the_fine_tuning_of_all_its_members(
    scans: pd.DataFrame, settings: dict[str, Any]
):
    settings["datasets"] = {"d": settings["datasets"]["d"], "e": settings["datasets"]["d"]}
    settings["mixtures"] = {"all": {"d": 0.5, "e": 0.5}}
    config = config_of(settings, "pretrain.mixture=all")
    for job in all_jobs(config):
        make(config, job)
    assert stale(config) == set()
    path = Layout.of(config, "e").split
    path.write_text(path.read_text().replace("sub-00\ttrain", "sub-00\ttest"))
    found = Keys(config)
    tuned = [Job("finetune", name, model="m", target="sex") for name in "de"]
    assert all(found.is_stale(job) for job in tuned)


def test_another_number_of_batches_leaves_no_list_of_before(
    config: Config, settings: dict[str, Any]
):
    """Else the lists of the larger number would be taken for right when it comes back."""
    forget_batches(config_of(settings, "compute.batches=1"), "d")
    found = Keys(config)
    batches = [Job("tokens", "d", batch=number) for number in range(2)]
    assert [found.is_stale(job) for job in batches] == [False, True]


def test_a_file_beside_the_last_of_a_job_is_missed(config: Config):
    job = Job("evaluate", "d", model="m", target="sex")
    beside = output_of(config, job).with_name("predictions.tsv")
    with recorded(config, job):
        write_text(beside, "made")
        write_text(output_of(config, job), "made")
    assert stale(config) == set()
    beside.unlink()
    assert "evaluate" in stale(config)


def test_a_split_stays_when_other_targets_come_and_go(config: Config, settings: dict[str, Any]):
    del settings["datasets"]["d"]["targets"]["age"]
    assert stale(config_of(settings)) == {"scores", "report"}
    settings["datasets"]["d"]["targets"]["sex"]["classes"] = {"female": "M", "male": "F"}
    assert "splits" in stale(config_of(settings))


def test_lists_of_arrays_that_are_no_longer_there_are_not_taken_for_right(
    scans: pd.DataFrame, settings: dict[str, Any], tmp_path: Path
):
    """DVC brings back the lists of another day, but not the arrays that lie apart from them."""
    config = config_of(settings, f"arrays={tmp_path / 'scratch'}")
    for job in all_jobs(config):
        make(config, job)
    assert stale(config) == set()
    lists = tmp_path / "results"
    shutil.copytree(lists, tmp_path / "then")
    other = config_of(settings | {"tokens": {"brain_fraction": 0.5}}, f"arrays={config.arrays}")
    for job in all_jobs(other):
        make(other, job)
    shutil.rmtree(lists)
    shutil.copytree(tmp_path / "then", lists)
    assert stale(config) == {"tokens"}
    (tmp_path / "scratch").rename(tmp_path / "elsewhere")
    assert stale(config) == set()


def test_only_the_first_of_the_processes_of_a_job_writes(
    config: Config, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("RANK", "1")
    job = Job("pretrain", "d", model="m")
    record = record_path(output_of(config, job))
    record.unlink()
    make(config, job)
    assert not record.exists()


def test_reasons_are_told_in_words_and_nothing_stale_is_recorded(
    config: Config, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
):
    other = config_of(settings, "finetune.steps=7")
    lines = what_is_stale(other)
    assert lines[0] == "finetune (d, m, sex, seed 0): finetune.steps was 1000, is 7"
    assert lines[-1] == f"report: {FOLLOWS}"
    run: list[object] = []
    monkeypatch.setattr("subprocess.run", lambda *command, **options: run.append(command))
    with pytest.raises(ValueError, match=r"nothing is recorded(.|\n)*steps was 1000, is 7"):
        record_in_dvc(other)
    assert not run


def test_jobs_come_after_those_that_they_need(config: Config):
    done: set[Job] = set()
    for job in all_jobs(config):
        assert set(jobs_before(config, job)) <= done
        done.add(job)


@pytest.mark.parametrize(
    ("old", "new", "same"),
    [
        ("x = 1\n", "x = 1  # why\n", True),
        ("x = 1\n", "# why\n\n\nx = 1\n", True),
        ("x = '# no comment'\n", "x = '# other'\n", False),
        ("x = 1\n", "x = 2\n", False),
    ],
)
def test_comments_are_no_code(old: str, new: str, same: bool):
    clean: Callable[[str], str] = source_code.without_comments
    assert (clean(old) == clean(new)) == same


def test_a_stages_code_is_what_it_imports_and_nothing_that_only_carries_results():
    assert {"neuromamba/tokens.py", "neuromamba/shards.py"} <= set(source_code.code_of("tokens"))
    assert not {"neuromamba/files.py", "neuromamba/stage.py"} & set(source_code.code_of("tokens"))
    assert "neuromamba/report.html.j2" in source_code.code_of("report")
    neutral = [name for name in source_code.NEUTRAL if name not in ("config", "models")]
    assert all((source_code.PACKAGE / f"{name}.py").exists() for name in neutral)


# --- Codes ----------------------------------------------------------------------------------------

CODES = {"codes", *TRAININGS}


@pytest.fixture
def weights(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A folder of weights, for a model that reads codes."""
    monkeypatch.setattr(NeuroMamba, "needs", ("codes",))
    write_text(tmp_path / "weights" / "config.json", "{}")
    write_text(tmp_path / "weights" / "diffusion_pytorch_model.safetensors", "a")
    return tmp_path / "weights"


def all_made(settings: dict[str, Any], codes: dict[str, Any]) -> Config:
    settings["codes"] = codes
    config = config_of(settings)
    for job in all_jobs(config):
        make(config, job)
    assert stale(config) == set()
    return config


def test_codes_of_published_weights_follow_their_content_and_settings(
    scans: pd.DataFrame, settings: dict[str, Any], weights: Path
):
    config = all_made(settings, {"weights": str(weights)})
    assert stale(config_of(settings, "codes.normalization=voxel")) == CODES
    assert stale(config_of(settings, "codes.precision=float32")) == CODES
    assert stale(config_of(settings, "codes.batch_slices=5")) == set()
    assert stale(config_of(settings, "codes.slices.width=5")) == set()
    # Another split trains anew, and has the same codes.
    assert stale(config_of(settings, "splits.seed=3")) == {"splits", "baselines", *TRAININGS}
    moved = weights.rename(weights.with_name("moved"))
    assert stale(config) == set()  # not at hand, so taken to be as they were
    assert stale(config_of(settings, f"codes.weights={moved}")) == set()
    write_text(moved / "README.md", "a model card")
    assert stale(config_of(settings, f"codes.weights={moved}")) == set()
    write_text(moved / "diffusion_pytorch_model.safetensors", "b")
    assert stale(config_of(settings, f"codes.weights={moved}")) == CODES


@pytest.mark.usefixtures("weights")
def test_codes_of_our_own_tokenizer_follow_its_training(
    scans: pd.DataFrame, settings: dict[str, Any]
):
    config = all_made(settings, {"tokenizer": "slices"})
    assert stale(config_of(settings, "codes.slices.steps=5")) == {"tokenizer", *CODES}
    assert stale(config_of(settings, "codes.normalization=voxel")) == {"tokenizer", *CODES}
    assert stale(config_of(settings, "codes.precision=float32")) == CODES
    made = {"splits", "baselines", "tokenizer", *CODES}
    assert stale(config_of(settings, "splits.seed=3")) == made
    scans.loc[3, "fingerprint"] = "g"
    assert stale(config) >= {"tokenizer", *CODES}


@pytest.mark.usefixtures("weights")
def test_a_fold_that_changes_makes_its_own_tokenizer_and_codes_stale(
    scans: pd.DataFrame, settings: dict[str, Any]
):
    settings["splits"] = FOLDS
    config = all_made(settings, {"tokenizer": "slices"})
    path = Layout.of(config.in_fold("fold-1"), "d").split
    write_text(path, path.read_text().replace("sub-05\ttrain", "sub-05\tvalidation"))
    found = Keys(config)
    old = [job for job in all_jobs(config) if found.is_stale(job)]
    assert {job.fold for job in old if job.stage in ("tokenizer", "codes")} == {"fold-1"}
    assert {job.batch for job in old if job.stage == "codes"} == {0, 1}
    fewer = config_of(settings, "compute.batches=1")
    forget_batches(fewer, "d")
    lists = sorted(Path(config.results).glob("d/codes/*/batch-*.tsv"))
    assert [path.name for path in lists] == ["batch-0.tsv"] * 3

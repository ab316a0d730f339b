"""Linear probes: convex fits that become the head of a pretrained model."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from fake_runs import FakeStore, make_config, write_dataset
from safetensors.torch import load_file
from scipy.special import softmax
from sklearn.calibration import CalibratedClassifierCV
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import r2_score, roc_auc_score
from sklearn.model_selection import StratifiedKFold, cross_val_predict

from neuromamba.batches import Windows, group_runs, list_runs, make_readers
from neuromamba.calibration_file import CALIBRATION
from neuromamba.checkpoint import load_model_info
from neuromamba.config import NeuroMamba
from neuromamba.distributed import World
from neuromamba.files import InputError
from neuromamba.finetune import predict_subjects, run_finetune
from neuromamba.heads import ClassHead, HeadedModel, NumberHead
from neuromamba.layout import Layout
from neuromamba.linear_probe import fit_classes, fit_number
from neuromamba.models import build_model
from neuromamba.observe import merge_runs, observe_subject
from neuromamba.predictor import open_predictor
from neuromamba.pretrain import run_pretrain
from neuromamba.probe import embed_subjects, fit_layer, train_probe
from neuromamba.scores import loss_curve
from neuromamba.tables import read_table, write_table

# --- The fit ------------------------------------------------------------------------------------


def people(seed: int, count: int, share: float = 0.5, effect: float = 1.0, width: int = 30):
    """Features (subject, feature), and a class that shifts three of them."""
    rng = np.random.default_rng(seed)
    y = (rng.random(count) < share).astype(np.int64)
    x = rng.normal(size=(count, width))
    x[:, :3] += effect * y[:, None]
    return x / np.sqrt(width), y


@pytest.mark.parametrize("seed", range(4))
def test_classes_are_recovered_from_features_and_not_from_noise(seed):
    found = {}
    for effect in (1.5, 0.0):
        (x, y), (x_test, y_test) = people(seed, 150, effect=effect), people(99, 400, effect=effect)
        layer = fit_classes(x, y, 2, 5, seed)
        found[effect] = roc_auc_score(y_test, (x_test @ layer.weights.T + layer.bias)[:, 1])
    assert found[1.5] > 0.9
    assert abs(found[0.0] - 0.5) < 0.15


def test_the_layer_of_two_classes_is_a_calibrated_logistic_regression():
    """Of many subjects that of scikit-learn, whose sigmoid has another prior."""
    x, y = people(0, 1500, share=0.25)
    layer = fit_classes(x, y, 2, 5, seed=3)
    weight = (len(y) / (2 * np.bincount(y)))[y]
    inner = StratifiedKFold(5, shuffle=True, random_state=3)
    model = LogisticRegression(C=layer.penalty, max_iter=5000)
    known = CalibratedClassifierCV(model, cv=inner, ensemble=False).fit(x, y, sample_weight=weight)
    mine = softmax(x @ layer.weights.T + layer.bias, axis=1)
    np.testing.assert_allclose(mine, known.predict_proba(x), atol=0.005)
    assert layer.folds == 5
    assert 0.5 < layer.score <= 1


@pytest.mark.parametrize("scale", [1.0, 1e-3])
def test_few_subjects_who_are_told_apart_get_probabilities_that_say_so(scale):
    """Of several penalties without an error the strongest is taken, with tiny decision values."""
    x, y = people(0, 24, effect=8.0)
    layer = fit_classes(scale * x, y, 2, 5, 0)
    share = softmax(scale * x @ layer.weights.T + layer.bias, axis=1)[:, 1]
    assert layer.score == 1
    assert share[y == 1].min() > 0.8
    assert share[y == 0].max() < 0.2


@pytest.mark.parametrize("seed", range(3))
def test_a_rare_class_is_not_forgotten(seed):
    """With more features than subjects, where a plain fit leans to the commoner class."""
    x, y = people(seed, 60, share=0.2, effect=1.5, width=100)
    x_test, y_test = people(99, 400, share=0.2, effect=1.5, width=100)
    layer = fit_classes(x, y, 2, 5, seed)
    right = (x_test @ layer.weights.T + layer.bias).argmax(1) == y_test
    recalls = [right[y_test == k].mean() for k in (0, 1)]
    plain = LogisticRegression(C=layer.penalty).fit(x, y).predict(x_test) == y_test
    assert min(recalls) > min(plain[y_test == k].mean() for k in (0, 1))


def test_a_class_without_training_subjects_is_never_predicted():
    x, y = people(0, 80)
    layer = fit_classes(x, 2 * y, 3, 5, 0)
    output = x @ layer.weights.T + layer.bias
    probability = softmax(output, axis=1)
    assert probability[:, 1].max() == 0
    assert roc_auc_score(y, probability[:, 2]) > 0.8
    # Such a subject in the validation part has no weight, and its loss is still a number.
    truth = torch.ones(80, dtype=torch.int64)
    assert ClassHead([1.0, 0.0, 1.0]).loss(torch.tensor(output).float(), truth)["loss"] == 0
    # A map explains a class against the mean of the others, in float32.
    explained = [of[:, 2] - (of[:, 0] + of[:, 1]) / 2 for of in (output, output.astype(np.float32))]
    np.testing.assert_allclose(explained[1], explained[0], rtol=0, atol=1e-4)


def test_three_classes_are_told_apart():
    rng = np.random.default_rng(0)
    y = rng.integers(3, size=240)
    x = rng.normal(size=(240, 10)) / 3
    x[np.arange(240), y] += 1
    layer = fit_classes(x[:120], y[:120], 3, 5, 0)
    assert ((x[120:] @ layer.weights.T + layer.bias).argmax(1) == y[120:]).mean() > 0.8


def test_the_score_of_three_classes_is_the_plain_auroc_over_the_folds():
    """Of classes that are not equally common, where a weighted one is another number."""
    rng = np.random.default_rng(1)
    y = rng.choice(3, size=150, p=[0.6, 0.3, 0.1])
    x = rng.normal(size=(150, 12)) / 3
    x[np.arange(150), y] += 0.1 + 0.2 * y
    layer = fit_classes(x, y, 3, 5, 4)
    model = LogisticRegression(C=layer.penalty, class_weight="balanced", max_iter=5000)
    inner = StratifiedKFold(5, shuffle=True, random_state=4)
    told = cross_val_predict(model, x, y, cv=inner, method="predict_proba")
    each = [roc_auc_score(y[part], told[part], multi_class="ovr") for _, part in inner.split(x, y)]
    assert layer.score == pytest.approx(np.mean(each), rel=1e-12)


def test_a_class_with_one_subject_leaves_no_folds():
    x, y = people(0, 20)
    y[:] = 0
    y[4] = 1
    layer = fit_classes(x, y, 2, 5, 0)
    assert (layer.folds, layer.penalty, layer.score) == (0, 1.0, None)
    assert (x @ layer.weights.T + layer.bias)[:, 1].argmax() == 4


@pytest.mark.parametrize("seed", range(3))
def test_numbers_are_recovered_by_ridge_regression(seed):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(300, 20)) / np.sqrt(20)
    z = x[:, :4].sum(1) * 2 + rng.normal(size=300) * 0.3
    layer = fit_number(x[:150], z[:150], 5, seed)
    predicted = x[150:] @ layer.weights[0] + layer.bias[0]
    assert r2_score(z[150:], predicted) > 0.7
    ridge = Ridge(alpha=1 / layer.penalty).fit(x[:150], z[:150])
    np.testing.assert_allclose(predicted, ridge.predict(x[150:]))


def test_more_features_than_people_give_the_model_of_all_features():
    rng = np.random.default_rng(0)
    x, y = people(0, 40, width=500)
    z = rng.normal(size=40)
    layer = fit_number(x, z, 5, 0)
    ridge = Ridge(alpha=1 / layer.penalty).fit(x, z)
    np.testing.assert_allclose(layer.weights[0], ridge.coef_, atol=1e-10)
    np.testing.assert_allclose(layer.bias[0], ridge.intercept_)
    y[0] = 2  # of which there is one, so that nothing is chosen and no sigmoid fitted
    layer = fit_classes(x, y, 3, 5, 0)
    known = LogisticRegression(class_weight="balanced", max_iter=5000, tol=1e-8).fit(x, y)
    assert layer.folds == 0
    np.testing.assert_allclose(layer.weights, known.coef_, atol=1e-3 * np.abs(known.coef_).max())


class Given(torch.nn.Module):
    """A family whose embedding is its input."""

    needs = ("x",)

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width


def test_the_penalty_means_the_same_whatever_the_units_of_the_target():
    rng = np.random.default_rng(0)
    features = torch.tensor(rng.normal(size=(80, 12)))
    values = 40 + 10 * (features[:, 0] + 0.1 * torch.tensor(rng.normal(size=80)))
    mean, sd = values.mean().item(), values.std().item()
    network = HeadedModel(Given(12), NumberHead(mean, sd), 0.0, True)
    layer = fit_layer(network, features, values.tolist(), 5, 0)
    found = network.eval().predict_features(features.float())[:, 0].detach()
    assert r2_score(values, found) > 0.95
    metres = HeadedModel(Given(12), NumberHead(mean / 100, sd / 100), 0.0, True)
    again = fit_layer(metres, features, (values / 100).tolist(), 5, 0)
    assert again.penalty == layer.penalty
    np.testing.assert_allclose(again.weights, layer.weights, rtol=1e-4, atol=1e-6)


def test_a_pool_that_was_not_trained_gives_the_plain_mean():
    settings = NeuroMamba(family="neuromamba", width=16, depth=1, state=4, head_dim=8)
    torch.manual_seed(0)
    model = build_model(settings, 16).eval()
    batch = {"tokens": torch.randn(7, 3, 16), "centers": torch.rand(7, 3)}
    batch |= {"patches": torch.tensor([3, 4])}
    with torch.no_grad():
        means = [h.mean((0, 1)) for h in model.encode(batch).split([3, 4])]
        torch.testing.assert_close(model.embed(batch), torch.stack(means))


# --- In the pipeline ----------------------------------------------------------------------------

PROBE = {"mode": "probe", "evaluation_windows": 3}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with two pretrained models, and the probe of the first on the sex of 44 subjects."""
    folder = tmp_path_factory.mktemp("probe")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("neuromamba.batches.TokenStore", FakeStore)
        parts = write_dataset(folder, 44)
        table = read_table(folder / "participants.tsv")
        odd = table["participant_id"].str[4:].astype(int) % 2
        write_table(folder / "participants.tsv", table.assign(age=30 + 20 * odd + table.index % 5))
        config = make_config(folder, finetune=PROBE)
        for seed in (0, 1):
            run_pretrain(config, "fake", "tiny", seed)
            for target in ("sex", "age"):
                run_finetune(config, "fake", "tiny", seed, target)
        yield folder, parts


@pytest.fixture
def probed(made, monkeypatch):
    monkeypatch.setattr("neuromamba.batches.TokenStore", FakeStore)
    monkeypatch.setattr(FakeStore, "poisoned", set())
    return made


def folder_of(folder, target="sex", seed=0):
    return Layout(folder / "results", "fake").finetune("tiny", seed, target)


@pytest.mark.parametrize("seed", [0, 1])
def test_a_probe_finds_what_can_be_read_off_the_features(probed, seed):
    folder, parts = probed
    config = make_config(folder, finetune=PROBE)
    people = [*parts["test"], *parts["validation"]]
    sex = predict_subjects(config, "fake", "tiny", seed, "sex", people)
    odd = np.array([int(name[4:]) % 2 for name in people])
    assert ((sex["prob_female"] > 0.5) == odd).all()
    age = predict_subjects(config, "fake", "tiny", seed, "age", people)
    assert list(age.columns) == ["subject", "value"]
    assert np.abs(age["value"] - (32 + 20 * odd)).max() < 6


def test_nothing_of_the_model_has_changed(probed):
    folder, _ = probed
    before = load_file(Layout(folder / "results", "fake").pretrain("tiny", 0) / "model.safetensors")
    after = load_file(folder_of(folder) / "model.safetensors")
    assert all(torch.equal(after.pop(f"backbone.{name}"), before[name]) for name in before)
    assert set(after) == {"center", "scale", "head.1.weight", "head.1.bias", "task.weights"}
    assert after["head.1.weight"].abs().max() > 0


def test_its_files_are_those_of_any_fine_tuning(probed):
    folder, parts = probed
    info = load_model_info(folder_of(folder))
    assert info["subjects"] == {part: parts[part] for part in ("train", "validation")}
    assert info["settings"]["finetune"] == {
        "mode": "probe",
        "start": "pretrained",
        "batch_size": 4,
        "evaluation_windows": 3,
    }
    assert info["settings"]["inner_folds"] == 5
    assert info["probe"].keys() == {"inverse_penalty", "folds", "score"}
    assert info["probe"]["folds"] == 5
    assert info["trained_parameters"] == 2 * (8 + 1)
    assert CALIBRATION in info["files"]
    curve = loss_curve(folder_of(folder))
    assert curve["step"].tolist() == [0]
    assert curve["validation"][0] == pytest.approx(info["best"]["loss"], rel=1e-12)
    assert info["best"]["loss"] < np.log(2)
    assert 0 < curve["train"][0] < np.log(2)
    assert load_model_info(folder_of(folder, "age"))["best"]["skill_mean"] > 0.5
    assert sorted(path.name for path in folder_of(folder).iterdir()) == [
        "calibration.json",
        "calibration.safetensors",
        "metrics.jsonl",
        "model.json",
        "model.safetensors",
    ]


@pytest.mark.parametrize("target", ["sex", "age"])
def test_a_subject_is_predicted_by_the_mean_of_its_features(probed, target):
    """As the evaluation does, and as `neuromamba predict` does by subject."""
    folder, parts = probed
    config = make_config(folder, finetune=PROBE)
    predictor = open_predictor(folder_of(folder, target), "cpu")
    table = predict_subjects(config, "fake", "tiny", 0, target, parts["validation"])
    layout = Layout.of(config, "fake")
    readers = make_readers(predictor.network, layout, config.models["tiny"], config.tokens)
    windows = Windows(
        group_runs(list_runs(config, "fake", parts["validation"], ["tokens"])), readers
    )
    for row in table.itertuples(index=False):
        runs = observe_subject(predictor.network, windows, row.subject, predictor.finetune)
        values, features = merge_runs(runs)
        assert values == list(row[1:])
        with torch.no_grad():
            by_mean = predictor.network.predict_features(torch.tensor(features[None]).float())
        assert values == pytest.approx(by_mean[0].tolist(), rel=1e-5)
    if target == "sex":
        assert values != pytest.approx(
            torch.cat([one.values for one in runs]).mean(0).tolist(), rel=1e-7
        )


class Half(World):
    """A process that hears nothing of the other."""

    def sum(self, values):
        return values


def opened(folder, names):
    """The network, the windows of some subjects, and the settings of the fine-tuning."""
    config = make_config(folder, finetune=PROBE)
    network = open_predictor(folder_of(folder), "cpu").network
    layout = Layout.of(config, "fake")
    readers = make_readers(network, layout, config.models["tiny"], config.tokens)
    windows = Windows(group_runs(list_runs(config, "fake", names, ["tokens"])), readers)
    return network, windows, config.models["tiny"].finetune


def test_processes_share_the_subjects_and_get_the_same(probed):
    folder, parts = probed
    network, windows, settings = opened(folder, parts["train"][:7])
    whole = embed_subjects(network, windows, settings, World())
    halves = [embed_subjects(network, windows, settings, Half(rank, 2)) for rank in (0, 1)]
    assert torch.equal(halves[0] + halves[1], whole)
    assert halves[0][1::2].abs().max() == 0


def test_training_subjects_of_one_class_end_all_processes(probed):
    folder, parts = probed
    network, windows, settings = opened(folder, parts["train"][:4])
    both, labels = {"train": windows, "validation": windows}, dict.fromkeys(parts["train"], 1)

    def train(rank):
        train_probe(network, settings, both, labels, None, 5, 0, Half(rank, 2))

    with pytest.raises(InputError, match="all training subjects with a usable run are of one"):
        train(0)
    with pytest.raises(SystemExit):
        train(1)


# --- Again, stopped, and changed ------------------------------------------------------------------


@pytest.fixture
def pretrained(tmp_path, monkeypatch):
    monkeypatch.setattr("neuromamba.batches.TokenStore", FakeStore)
    write_dataset(tmp_path)
    run_pretrain(make_config(tmp_path), "fake", "tiny", 0)
    return tmp_path


def probe(folder, on_change="refuse", **change):
    config = make_config(folder, finetune={**PROBE, **change})
    run_finetune(config, "fake", "tiny", 0, "sex", on_change)


def stop_in_step_seven(folder, monkeypatch, **change):
    """A training whose process ends there, and leaves its checkpoints."""
    training_batch = Windows.training_batch

    def stopped(self, seed, first, size):
        if first == 6 * size:
            raise KeyboardInterrupt
        return training_batch(self, seed, first, size)

    with monkeypatch.context() as patch:
        patch.setattr(Windows, "training_batch", stopped)
        with pytest.raises(KeyboardInterrupt):
            probe(folder, **change)
    assert (folder_of(folder) / "checkpoints").is_dir()


def test_only_what_a_probe_depends_on_makes_it_another_one(pretrained, capsys):
    probe(pretrained)
    before = (folder_of(pretrained) / "model.safetensors").read_bytes()
    probe(pretrained, steps=77, learning_rate=0.5, adapters={"rank": 2}, precision="bfloat16")
    assert "is up to date" in capsys.readouterr().err
    with pytest.raises(InputError, match="evaluation_windows: 3 -> 2"):
        probe(pretrained, evaluation_windows=2)
    config = make_config(pretrained, finetune=PROBE).model_dump()
    config["evaluate"]["inner_folds"] = 3
    changed = make_config(pretrained).model_validate(config)
    with pytest.raises(InputError, match="inner_folds: 5 -> 3"):
        run_finetune(changed, "fake", "tiny", 0, "sex")
    run_finetune(changed, "fake", "tiny", 0, "sex", "restart")
    assert load_model_info(folder_of(pretrained))["probe"]["folds"] == 3
    probe(pretrained, "restart")
    assert (folder_of(pretrained) / "model.safetensors").read_bytes() == before


def test_a_probe_that_was_killed_begins_again(pretrained, monkeypatch):
    def killed(*_):
        raise KeyboardInterrupt

    for where in ("probe.fit_layer", "trained.save_model"):
        with monkeypatch.context() as patch:
            patch.setattr(f"neuromamba.{where}", killed)
            with pytest.raises(KeyboardInterrupt):
                probe(pretrained)
        assert not (folder_of(pretrained) / "model.json").exists()
    probe(pretrained)
    assert load_model_info(folder_of(pretrained))["stage"] == "finetune"
    assert len((folder_of(pretrained) / "metrics.jsonl").read_text().splitlines()) == 2


def test_a_stopped_training_is_lost_only_on_request(pretrained, monkeypatch):
    stop_in_step_seven(
        pretrained, monkeypatch, mode="full", batch_size=4, checkpoint_every=4, keep_every=4
    )
    checkpoints = folder_of(pretrained) / "checkpoints"
    with pytest.raises(InputError, match=r"finetune\.mode: full -> probe"):
        probe(pretrained)
    assert checkpoints.is_dir()
    probe(pretrained, "restart")
    assert not checkpoints.exists()
    assert not (folder_of(pretrained) / "snapshots").exists()


def test_other_modes_follow_a_probe_only_on_request(pretrained):
    probe(pretrained)
    with pytest.raises(InputError, match=r"finetune\.mode: probe -> head"):
        probe(pretrained, mode="head", steps=2)
    probe(pretrained, "restart", mode="head", steps=2)
    rows = (folder_of(pretrained) / "metrics.jsonl").read_text().splitlines()
    assert "probe" not in load_model_info(folder_of(pretrained))
    assert max(json.loads(row)["step"] for row in rows) == 2


def test_an_embedding_that_is_not_finite_is_refused(pretrained, monkeypatch):
    monkeypatch.setattr("neuromamba.probe.merge_runs", lambda _: (None, np.full(8, np.nan)))
    with pytest.raises(InputError, match="no finite embedding"):
        probe(pretrained)


def test_a_process_that_is_lost_is_told(pretrained, monkeypatch):
    class Left(World):
        def gather(self, value):
            return [value, value]

        def sum(self, values):
            raise RuntimeError("[gloo/transport/tcp/pair.cc] Connection closed by peer")

    for module in ("probe", "trained"):
        monkeypatch.setattr(f"neuromamba.{module}.join", lambda: Left(0, 2))
    with pytest.raises(InputError, match="process 0 of 2 has lost another one"):
        probe(pretrained)


# --- A head that starts where a probe ends ------------------------------------------------------

TRAINED = {"mode": "full", "head_start": "probe", "steps": 4, "validate_every": 2}


def test_what_training_makes_worse_stays_the_probe(pretrained):
    probe(pretrained)
    before = load_file(folder_of(pretrained) / "model.safetensors")
    probe(pretrained, "restart", **TRAINED, learning_rate=1.0)
    after = load_file(folder_of(pretrained) / "model.safetensors")
    assert load_model_info(folder_of(pretrained))["best"]["step"] == 0
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert loss_curve(folder_of(pretrained))["step"].tolist()[0] == 0


@pytest.mark.parametrize("mode", ["full", "adapters", "head"])
def test_training_goes_on_from_the_probe(pretrained, mode):
    probe(pretrained)
    before = load_file(folder_of(pretrained) / "model.safetensors")
    probe(pretrained, "restart", **{**TRAINED, "mode": mode}, learning_rate=1e-6)
    info = load_model_info(folder_of(pretrained))
    last = load_file(folder_of(pretrained) / "last.safetensors")
    moved = (last["head.1.weight"] - before["head.1.weight"]).abs().max()
    assert 0 < moved < 1e-4 < before["head.1.weight"].abs().max()
    assert info["head_start"].keys() == {"inverse_penalty", "folds", "score"}
    assert info["settings"]["inner_folds"] == 5


def test_a_training_from_the_probe_that_was_stopped_ends_the_same(pretrained, monkeypatch):
    how = {**TRAINED, "steps": 8, "learning_rate": 1e-3, "checkpoint_every": 4}
    stop_in_step_seven(pretrained, monkeypatch, **how)
    probe(pretrained, **how)
    continued = (folder_of(pretrained) / "last.safetensors").read_bytes()
    probe(pretrained, "restart", **{**how, "batch_size": 2, "steps": 2})
    probe(pretrained, "restart", **how)
    assert (folder_of(pretrained) / "last.safetensors").read_bytes() == continued

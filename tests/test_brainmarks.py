"""Brainmarks' samples give the tokens and embeddings of our own stages, in Brainmarks' own code."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nibabel
import numpy as np
import pandas as pd
import pytest
import torch
from scans import write_run, write_scan

from neuromamba.batches import TokenWindows, Windows
from neuromamba.brainmarks import BrainmarksModel, open_model, refuse_other_needs
from neuromamba.brainmarks_samples import AFFINE, BrainmarksTransform, known_part
from neuromamba.config import Denoise, NeuroMamba, Tokens, Volumes
from neuromamba.embed import Embedder, embed_runs
from neuromamba.files import InputError, write_json
from neuromamba.models import build_model
from neuromamba.pretrained import Pretrained, save_pretrained
from neuromamba.resample import Resampler, resample_mask, target_affine
from neuromamba.tokens import make_tokens
from neuromamba.volumes import Source, make_volumes

SHAPE = (91, 109, 91)
MIDDLE_MM = np.array([0.0, -18.0, 4.0])
RADIUS_MM = 26.0
VOLUMES = 8
"""Volumes of a window."""


def distances() -> np.ndarray:
    """(x, y, z) mm from the middle of the brain, on Brainmarks' grid."""
    mm = np.moveaxis(np.indices(SHAPE), 0, -1) * 2.0 + AFFINE[:3, 3]
    return np.linalg.norm(mm - MIDDLE_MM, axis=-1)


MASK = (distances() < RADIUS_MM).T
"""(z, y, x) brain mask: a ball, whose 9,000 voxels keep the tests fast."""


def pretrained(**model: Any) -> Pretrained:
    """A small model of random weights on the usual grid."""
    section = {"width": 64, "depth": 2, "state": 16, "head_dim": 32, "volumes": VOLUMES, **model}
    settings = NeuroMamba.model_validate({"family": "neuromamba", **section})
    torch.manual_seed(0)
    network = build_model(settings, 6**3 * 2).eval()
    return Pretrained(network, settings, Tokens(), Volumes(), {"spaces": ["MNI152NLin6Asym"]})


def make_sample(series: np.ndarray) -> dict[str, Any]:
    """A run (volume, voxel) as Brainmarks' datasets hold it."""
    mean, std = series.mean(0, keepdims=True), series.std(0, keepdims=True)
    varies = std > 1e-6
    bold = (series - mean) / np.maximum(std, 1e-6) * varies
    return {
        "bold": torch.from_numpy(bold.astype(np.float16)),
        "mean": torch.from_numpy((mean * varies).astype(np.float32)),
        "std": torch.from_numpy((std * varies).astype(np.float32)),
        "tr": 2.0,
        "path": "sub-01_task-rest_bold.nii.gz",
    }


def restored(sample: dict[str, Any]) -> np.ndarray:
    return (sample["bold"].float() * sample["std"] + sample["mean"]).numpy()


def noise(n_volumes: int, seed: int = 0) -> np.ndarray:
    """A run (volume, voxel): anatomy of 1000 +- 200 and noise in time."""
    random = np.random.default_rng(seed)
    anatomy = 1000 + 200 * random.standard_normal(MASK.sum())
    return anatomy + 20 * random.standard_normal((n_volumes, MASK.sum()))


def shell_and_hole(n_volumes: int) -> tuple[np.ndarray, np.ndarray]:
    """A run that is the same all over its surface, with a hole of 0 that holds one patch.

    Returns the run (volume, voxel) and what its surface is like (volume,), for the outside.
    """
    surface = 900 + 30 * np.random.default_rng(7).standard_normal(n_volumes)
    series = noise(n_volumes)
    series[:, distances().T[MASK] > 22] = surface[:, None]
    z, y, x = np.nonzero(MASK)
    mm = np.stack([x, y, z], axis=1) * 2.0 + AFFINE[:3, 3]
    # Patch 8 of each axis spans 1.5 ... 11.5, -16.5 ... -6.5 and 5.5 ... 15.5 mm.
    hole = ((mm >= [0, -18, 4]) & (mm <= [12, -6, 16])).all(axis=1)
    series[:, hole] = 0
    return series, surface


def whole_image(series: np.ndarray, outside: np.ndarray) -> np.ndarray:
    """A run (volume, voxel) in the brain and `outside` (volume,) around it: (x, y, z, t)."""
    volumes = np.empty((len(series), *MASK.shape), dtype=np.float32)
    volumes[:] = outside[:, None, None, None]
    volumes[:, MASK] = series
    return volumes.T


def embed_by_stages(
    folder: Path, sample: dict[str, Any], outside: np.ndarray, model: Pretrained, count: int
) -> tuple[dict[str, Any], np.ndarray]:
    """The windows and the embedding of the run's NIfTI file by the package's own stages."""
    low, high = (np.argwhere(MASK.T).min(0) - 3, np.argwhere(MASK.T).max(0) + 4)
    box = tuple(slice(*edge) for edge in zip(low, high, strict=True))
    affine = AFFINE.copy()
    affine[:3, 3] += 2 * low
    data = whole_image(restored(sample), outside)[box]
    row = write_run(folder, "sub-01_task-rest", data, MASK.T[box], affine)
    source = Source(
        row["run"], "sub-01", Path(row["bold"]), Path(row["mask"]), "MNI152NLin6Asym", 2.0, "a"
    )
    target, tokens = folder / "volumes.zarr", folder / "tokens.zarr"
    grid = model.volumes.model_copy(update={"min_volumes": 2, "shard_volumes": 8})
    make_volumes(source, target, grid, model.tokens.time_patch)
    make_tokens(target, tokens, model.tokens, grid.shard_volumes)
    reader = TokenWindows(
        lambda run: tokens, model.model.volumes, model.tokens, model.model.normalization
    )
    windows = Windows({"sub-01": [row["run"]]}, [reader])
    chosen = windows.spaced(count)
    embedder = Embedder(model.network, model.model, model.tokens, model.volumes, "weights")
    _, embedding = embed_runs(embedder, windows, [chosen])
    return windows.batch(chosen), embedding[0]


def collate(transform: BrainmarksTransform, *samples: dict[str, Any]) -> dict[str, Any]:
    return torch.utils.data.default_collate([transform(sample) for sample in samples])


# --- The same as our own stages ------------------------------------------------------------------


@pytest.mark.parametrize("normalization", ["global", "voxel"])
def test_a_sample_gives_the_tokens_and_embedding_of_the_stages(
    tmp_path: Path, normalization: str
) -> None:
    model = pretrained(normalization=normalization)
    series, surface = shell_and_hole(n_volumes=19)
    sample = make_sample(series)
    expected, embedding = embed_by_stages(tmp_path, sample, surface, model, count=3)
    transform = BrainmarksTransform(model, MASK, windows=3)
    batch = collate(transform, sample)
    n = int(batch["patches"][0])
    # The hole is a patch that the mask has and the run has not.
    assert n == expected["patches"][0] == transform.n_patches - 1
    found = batch["tokens"][0]
    assert found.shape == (3, transform.n_patches, VOLUMES // 2, 432)
    wanted = expected["tokens"].unflatten(0, (3, n))
    assert wanted.std() > 0.5
    # Few values are rounded to the next float16, which is some hundredths of a voxel's SD away.
    apart = (found[:, :n] - wanted).abs()
    assert apart.max() < 0.05
    assert (apart > 1e-3).float().mean() < 1e-3
    assert torch.equal(batch["centers"][0, :n], expected["centers"][:n])
    with torch.inference_mode():
        cls, registers, patches = BrainmarksModel(model, transform.n_patches)(batch)
        states = model.network.encode(expected).mean(1).unflatten(0, (3, n)).mean(0)
    assert registers is None
    assert cls.shape == (1, 1, 64)
    assert patches.shape == (1, transform.n_patches, 64)
    assert np.abs(embedding).max() > 0.1
    np.testing.assert_allclose(cls[0, 0], embedding, atol=1e-4)
    np.testing.assert_allclose(patches[0].mean(0), embedding, atol=1e-4)
    places = batch["places"][0, :n]
    torch.testing.assert_close(patches[0, places], states, atol=1e-3, rtol=0)
    hole = np.setdiff1d(np.arange(transform.n_patches), places)
    torch.testing.assert_close(patches[0, hole], states.mean(0)[None], atol=1e-3, rtol=0)
    assert states.std(0).mean() > 0.1


def test_patches_lie_where_they_are_in_the_mask() -> None:
    model = pretrained()
    transform = BrainmarksTransform(model, MASK)
    whole, holed = transform(make_sample(noise(12))), transform(make_sample(shell_and_hole(12)[0]))
    n = int(holed["patches"])
    assert torch.equal(whole["places"], torch.arange(transform.n_patches))
    assert torch.equal(whole["centers"][holed["places"][:n]], holed["centers"][:n])
    missing = set(range(transform.n_patches)) - set(holed["places"][:n].tolist())
    assert whole["centers"][missing.pop()].tolist() == pytest.approx([8.5 / 16] * 3)
    assert not missing


def test_a_run_does_not_depend_on_its_batch_mates() -> None:
    model = pretrained()
    transform = BrainmarksTransform(model, MASK, windows=2)
    network = BrainmarksModel(model, transform.n_patches)
    samples = [make_sample(noise(12, seed=1)), make_sample(shell_and_hole(12)[0])]
    with torch.inference_mode():
        cls, _, patches = network(collate(transform, *samples))
        for k, sample in enumerate(samples):
            alone = network(collate(transform, sample))
            assert torch.equal(alone[0][0], cls[k])
            assert torch.equal(alone[2][0], patches[k])
    assert not torch.allclose(cls[0], cls[1], atol=1e-3)


def test_a_pooling_that_was_learnt_is_used() -> None:
    model = pretrained()
    torch.nn.init.normal_(model.network.pool.weight)
    transform = BrainmarksTransform(model, MASK, windows=1)
    batch = collate(transform, make_sample(noise(12)))
    with torch.inference_mode():
        cls, _, patches = BrainmarksModel(model, transform.n_patches)(batch)
        window = {"tokens": batch["tokens"][0, 0], "centers": batch["centers"][0]}
        expected = model.network.embed({**window, "patches": batch["patches"]})
    torch.testing.assert_close(cls[0], expected)
    assert not torch.allclose(cls[0, 0], patches[0].mean(0), atol=1e-3)


# --- Where Brainmarks' data are not what our stages read ------------------------------------------


def test_the_edge_of_the_brain_is_as_bright_as_its_inside() -> None:
    affine, shape = target_affine(Volumes()), Volumes().shape
    voxels = resample_mask(MASK.T, AFFINE, shape, affine)
    resampler = Resampler(SHAPE, AFFINE, shape, affine, voxels)
    matrix, known = known_part(resampler, MASK.ravel()), MASK.ravel()
    full = np.random.default_rng(0).normal(1000, 50, MASK.size).astype(np.float32)
    zeroed = np.where(known, full, 0)
    blended, ours = resampler.apply(zeroed[None, resampler.touched])[0], matrix @ full[known]
    share = resampler.apply(known[None, resampler.touched].astype(np.float32))[0]
    inside = share == 1
    assert 0.3 < inside.mean() < 0.95
    np.testing.assert_array_equal(ours[inside], blended[inside])
    np.testing.assert_allclose(ours, blended / share, rtol=1e-5)


def test_a_short_run_is_filled_up_with_its_mean() -> None:
    transform = BrainmarksTransform(pretrained(normalization="voxel"), MASK)
    with pytest.warns(UserWarning, match="runs of 5 volumes are filled up.*to the 8"):
        found = transform(make_sample(noise(5)))["tokens"]
    assert found.shape[:1] == (1,)
    volumes = found[0].unflatten(-1, (2, 216)).flatten(1, 2)
    assert volumes[:, :5].abs().amax() > 1
    # The mean is 0 in units of a voxel's own SD, but for float16.
    assert volumes[:, 5:].abs().amax() < 0.1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bold": torch.zeros(12, 400)}, r"bold has the shape \(12, 400\).*MNI152NLin6Asym"),
        (
            {"std": torch.full((1, int(MASK.sum())), torch.nan)},
            "there is NaN or infinity in volume 0",
        ),
        ({"std": torch.zeros(1, int(MASK.sum()))}, "no patch has enough brain voxels that vary"),
    ],
)
def test_a_sample_that_cannot_be_used_is_refused(change: dict[str, Any], message: str) -> None:
    transform = BrainmarksTransform(pretrained(), MASK)
    with pytest.raises(InputError, match=f"^sub-01_task-rest_bold.nii.gz: {message}"):
        transform({**make_sample(noise(12)), **change})


def test_models_that_need_more_than_volumes_are_refused() -> None:
    model = pretrained()
    other = SimpleNamespace(needs=("tokens", "fc"))
    with pytest.raises(InputError, match="reads tokens, fc; Brainmarks gives"):
        refuse_other_needs(Pretrained(other, model.model, model.tokens, model.volumes))  # type: ignore[arg-type]
    denoised = Volumes(denoise=Denoise(smoothing=6.0))
    with pytest.raises(InputError, match="learnt from denoised runs"):
        refuse_other_needs(Pretrained(model.network, model.model, model.tokens, denoised))


def test_another_template_is_warned_of() -> None:
    model = pretrained()
    facts = {"spaces": ["MNI152NLin2009cAsym"]}
    with pytest.warns(UserWarning, match="MNI152NLin2009cAsym; Brainmarks' are in MNI152NLin6"):
        refuse_other_needs(
            Pretrained(model.network, model.model, model.tokens, model.volumes, facts)
        )


def test_without_a_model_it_says_how_to_name_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NEUROMAMBA_WEIGHTS", raising=False)
    with pytest.raises(InputError, match=r"model_kwargs\.weights=FOLDER, or set NEUROMAMBA_WEIGHT"):
        open_model()


# --- Brainmarks' own programs ---------------------------------------------------------------------


def write_template(folder: Path, mask: np.ndarray) -> None:
    """A TemplateFlow folder that holds `mask` (z, y, x) where Brainmarks looks for it."""
    path = folder / "tpl-MNI152NLin6Asym" / "tpl-MNI152NLin6Asym_res-02_desc-brain_mask.nii.gz"
    path.parent.mkdir(parents=True)
    nibabel.save(nibabel.Nifti1Image(mask.T.astype(np.uint8), AFFINE), path)


def write_abide(folder: Path, counts: dict[str, int]) -> None:
    """Made-up subjects in the format of Brainmarks' ABIDE; in one sex the right is brighter."""
    import datasets

    from brainmarks import nisc

    right = np.nonzero(MASK)[2] > 45
    features = datasets.Features(
        {
            "sub": datasets.Value("string"),
            "path": datasets.Value("string"),
            "n_frames": datasets.Value("int32"),
            "tr": datasets.Value("float32"),
            "bold": datasets.Array2D(shape=(None, int(MASK.sum())), dtype="float16"),
            "mean": datasets.Array2D(shape=(1, int(MASK.sum())), dtype="float32"),
            "std": datasets.Array2D(shape=(1, int(MASK.sum())), dtype="float32"),
        }
    )
    sexes, number = {}, 0
    for split, count in counts.items():
        rows = []
        for _ in range(count):
            sub, sex = f"{number:04d}", "FM"[number % 2]
            series = noise(12, seed=number)
            series[:, right] += 400 * (sex == "M")
            bold, mean, std = nisc.scale(series)
            facts = {"sub": sub, "path": f"sub-{sub}_bold.nii.gz", "n_frames": 12, "tr": 2.0}
            signal = {"mean": mean.astype(np.float32), "std": std.astype(np.float32)}
            rows.append({**facts, **signal, "bold": bold.astype(np.float16)})
            sexes[sub], number = sex, number + 1
        table = datasets.Dataset.from_list(rows, features=features)
        table.save_to_disk(folder / "abide.mni.arrow" / split)
    (folder / "targets").mkdir()
    write_json(folder / "targets" / "abide_target_map_sex.json", sexes)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with a model, a template and a dataset."""
    pytest.importorskip("brainmarks.nisc", reason="no Brainmarks here: `make test-brainmarks`")
    folder = tmp_path_factory.mktemp("brainmarks")
    save_pretrained(folder / "model", pretrained(), "card")
    write_template(folder / "templateflow", MASK)
    write_abide(folder / "abide", {"train": 16, "validation": 8, "test": 12})
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TEMPLATEFLOW_HOME", str(folder / "templateflow"))
        yield folder


def run_module(site: Path, *arguments: str, **environment: str) -> str:
    """Run a program of Brainmarks in a process of its own, without a network."""
    own = {
        "ABIDE_ROOT": str(site / "abide"),
        "HF_HOME": str(site / "huggingface"),
        "HF_HUB_OFFLINE": "1",
        "TEMPLATEFLOW_HOME": str(site / "templateflow"),
        "TEMPLATEFLOW_AUTOUPDATE": "false",
        "OMP_NUM_THREADS": "1",
        **environment,
    }
    done = subprocess.run(
        [sys.executable, "-m", *arguments],
        cwd=site,
        env={**os.environ, **own},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


FAST = ["device=cpu", "num_workers=1", "batch_size=4"]


def test_a_file_as_brainmarks_reads_it_gives_the_embedding_of_our_stages(
    site: Path, tmp_path: Path
) -> None:
    from brainmarks.main_logistic import extract_features
    from brainmarks.models.registry import create_model
    from omegaconf import OmegaConf

    from brainmarks import nisc, readers

    series, surface = shell_and_hole(n_volumes=21)
    path = write_scan(tmp_path / "bold.nii.gz", whole_image(series, surface), AFFINE)
    bold, mean, std = nisc.scale(readers.mni_reader()(str(path)))
    signal = {"mean": mean.astype(np.float32), "std": std.astype(np.float32)}
    sample = {"bold": torch.from_numpy(bold.astype(np.float16)), "tr": 2.0, "path": str(path)}
    sample |= {name: torch.from_numpy(value) for name, value in signal.items()}
    transform, model = create_model("neuromamba", weights=str(site / "model"), windows=3)
    options = {"representation": "cls", "batch_size": 1, "num_workers": 0, "amp": False}
    found, _ = extract_features(
        OmegaConf.create(options),
        model,
        {"test": [transform(sample) | {"target": 0}]},
        torch.device("cpu"),
    )
    _, expected = embed_by_stages(tmp_path, sample, surface, pretrained(), count=3)
    np.testing.assert_allclose(found["test"][0], expected, atol=1e-4)


def test_brainmarks_logistic_evaluation_reads_our_embeddings(site: Path) -> None:
    run_module(
        site,
        *["brainmarks.main_logistic", "neuromamba", "cls", "abide_sex", "--overrides", *FAST],
        *[f"model_kwargs.weights={site / 'model'}", "model_kwargs.windows=2", "n_trials=2"],
    )
    table = pd.read_csv(
        site / "output/eval_logistic/abide_sex__neuromamba__cls__logistic/eval_table.csv"
    )
    fixed = table[table["trial"].isna()].set_index("split")
    assert set(fixed["model"]) == {"neuromamba"}
    assert set(table["trial"].dropna()) == {1, 2}
    assert fixed.loc["test", "bacc"] >= 0.9


def test_brainmarks_attention_probe_learns_on_our_patches(site: Path) -> None:
    run_module(
        site,
        *["brainmarks.main_probe", "neuromamba", "patch", "attn", "abide_sex", "--overrides"],
        *[*FAST, f"model_kwargs.weights={site / 'model'}", "model_kwargs.windows=1", "epochs=4"],
        *["warmup_epochs=1", "steps_per_epoch=8", "accum_iter=1", "lr_scale_grid=[1,10,50]"],
    )
    folder = site / "output/eval_probe/abide_sex__neuromamba__patch__attn"
    table = pd.read_csv(folder / "eval_table.csv").set_index("split")
    assert table.loc["test", "acc"] >= 0.9
    assert len(np.load(folder / "preds_best_test.npz")["preds"]) == 12


def test_brainmarks_smoke_test_of_models_passes(site: Path, tmp_path: Path) -> None:
    from brainmarks.readers import DATA_DIMS

    from brainmarks.models import test_models

    # Its samples have as many voxels as the real mask: a ball of the same size stands for that.
    nearest = np.argsort(distances().T, axis=None, kind="stable")[: DATA_DIMS["mni"]]
    mask = np.zeros(MASK.size, dtype=bool)
    mask[nearest] = True
    write_template(tmp_path / "templateflow", mask.reshape(MASK.shape))
    told = run_module(
        site,
        *["pytest", "-p", "no:cacheprovider", "-k", "neuromamba", str(test_models.__file__)],
        NEUROMAMBA_WEIGHTS=str(site / "model"),
        TEMPLATEFLOW_HOME=str(tmp_path / "templateflow"),
    )
    assert "2 passed" in told

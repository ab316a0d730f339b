"""Is there something to learn of change in time from codes, and does a small TABLeT learn it?

    python benchmarks/code_changes.py RESULTS/DATASET
    python benchmarks/code_changes.py results/demo --steps 1500 --trials "as configured"

RESULTS/DATASET holds codes and a split (`make demo-all`, or benchmarks/painted_abide_tablet.yaml).
How much of the variance of codes is change in time is told first. Codes of each run are then taken
about their mean over time. Of what is left of a token,

- `ridge` tells a share by a linear regression from the other half of the tokens of the same volume
  (100 principal components of them, no time), fitted on training and tested on validation subjects;
- a small TABLeT (that of config/models/tablet-tiny.yaml) is pretrained to tell it, and then with
  its input, its loss or its masks as published or otherwise; its skill over `static` is measured on
  validation subjects.

Test subjects are not opened. Everything runs on one core, in a quarter of an hour.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import zarr
from common import RESULTS, head, machine, write_results
from sklearn.decomposition import PCA
from sklearn.linear_model import Ridge
from sklearn.pipeline import make_pipeline

from neuromamba.config import Compute, load_config
from neuromamba.config import Tablet as Settings
from neuromamba.models import Tablet
from neuromamba.splits import read_split

ROOT = Path(__file__).parents[1]
TOKENS = (0, 4, 13, 20)
"""A corner, the middle of a face, the centre, and an edge of the 3 x 3 x 3 tokens."""
TRIALS: dict[str, dict[str, Any]] = {
    "as configured": {},
    "codes in one": {"input": "codes"},
    "absolute error": {"objective": "mae"},
    "codes in one, absolute error": {"input": "codes", "objective": "mae"},
    "random tokens hidden": {"mask": "random"},
    "whole volumes hidden": {"mask": "time"},
}
PACKAGES = ("torch", "scikit-learn")
Codes = list[npt.NDArray[np.float32]]


def read_codes(folder: Path) -> dict[str, Codes]:
    """The codes (volume, token, value) of each run, by the part of its subject."""
    split = read_split(folder / "splits" / "holdout.tsv")
    found: dict[str, Codes] = {}
    for part in ("train", "validation"):
        stores = [one for name in split[part] for one in folder.glob(f"codes/{name}_*.zarr")]
        found[part] = [
            np.asarray(zarr.open_array(store / "values", mode="r")[:], np.float32)
            for store in sorted(stores)
        ]
    return found


def changing(runs: Codes) -> float:
    """Share of the variance of the values of a token that is change in time, over all tokens."""
    about_mean = sum(float(np.square(run - run.mean(axis=0)).sum(dtype=np.float64)) for run in runs)
    every = sum(
        float(np.square(run - run.mean(axis=(0, 2), keepdims=True)).sum(dtype=np.float64))
        for run in runs
    )
    return about_mean / every


def regress(codes: dict[str, Codes]) -> dict[str, float]:
    """By token, the share of its changes' variance that the other half of the tokens tells."""
    changes = {
        part: np.concatenate([run - run.mean(axis=0) for run in runs])
        for part, runs in codes.items()
    }
    shares = {}
    for token in TOKENS:
        others = [k for k in range(changes["train"].shape[1]) if k % 2 != token % 2]
        x = {part: values[:, others].reshape(len(values), -1) for part, values in changes.items()}
        y = {part: values[:, token] for part, values in changes.items()}
        model = make_pipeline(PCA(100, random_state=0), Ridge(100.0)).fit(x["train"], y["train"])
        error = np.square(y["validation"] - model.predict(x["validation"])).sum()
        shares[str(token)] = float(1 - error / np.square(y["validation"]).sum())
    return shares


def draw(runs: Codes, volumes: int, count: int, rng: np.random.Generator) -> dict[str, Any]:
    windows = []
    for number in rng.integers(len(runs), size=count):
        first = rng.integers(len(runs[number]) - volumes + 1)
        windows.append(runs[number][first : first + volumes])
    return {"codes": torch.from_numpy(np.stack(windows))}


def train(codes: dict[str, Codes], settings: Settings, steps: int) -> list[float]:
    """Skill over `static` on validation subjects at five times."""
    torch.manual_seed(0)
    rng, volumes, how = np.random.default_rng(0), settings.volumes, settings.pretrain
    tokens, width = codes["train"][0].shape[1:]
    model = Tablet(settings, {"n_tokens": tokens, "code_width": width}, Compute())
    optimizer = torch.optim.AdamW(model.parameters(), how.learning_rate, how.betas)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, how.learning_rate, steps, pct_start=0.1
    )
    others = [draw(codes["validation"], volumes, 8, rng) for _ in range(3)]
    skills = []
    for step in range(1, steps + 1):
        model.train()
        optimizer.zero_grad()
        model.loss(draw(codes["train"], volumes, how.batch_size, rng))["loss"].backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), how.clip_norm)
        optimizer.step()
        schedule.step()
        if step % (steps // 5) == 0:
            model.eval()
            with torch.no_grad():
                told = [float(model.loss(one)["skill_static"]) for one in others]
            skills.append(float(np.mean(told)))
    return skills


def describe(result: dict[str, Any], about: str) -> str:
    told = f"{result['changing']:.1%} of the variance of a token's values is change in time."
    lines = [
        about,
        told,
        "",
        "| token | share of its changes that ridge regression tells |",
        "|---|---|",
    ]
    lines += [f"| {token} | {share:.2f} |" for token, share in result["ridge"].items()]
    lines += ["", "| a small TABLeT: skill over `static` at five times | | | | | |"]
    lines.append("|---|---|---|---|---|---|")
    for name, skills in result["tablet"].items():
        lines.append(f"| {name} | {' | '.join(f'{skill:+.3f}' for skill in skills)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, metavar="RESULTS/DATASET")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--trials", nargs="*", default=list(TRIALS), choices=list(TRIALS))
    options = parser.parse_args()
    torch.set_num_threads(1)
    host, codes = machine(*PACKAGES), read_codes(options.folder)
    files = [ROOT / "config" / name for name in ("config.yaml", "demo.yaml")]
    base = load_config(files, ["models=[tablet-tiny]"]).models["tablet-tiny"].model_dump()
    result: dict[str, Any] = {
        "changing": changing(codes["train"]),
        "ridge": regress(codes),
        "tablet": {},
    }
    for name in options.trials:
        settings = Settings.model_validate(base | TRIALS[name])
        result["tablet"][name] = train(codes, settings, options.steps)
        print(name, result["tablet"][name], flush=True)
    about = (
        f"{head(host, PACKAGES)}\n{options.folder.name}: codes of {len(codes['train'])} training "
        f"and {len(codes['validation'])} validation runs; {options.steps} steps."
    )
    facts = {"machine": host, "settings": {"steps": options.steps}, "results": result}
    name = f"code_changes_{options.folder.name}"
    write_results(RESULTS, name, facts, describe(result, about) + "\n")


if __name__ == "__main__":
    main()

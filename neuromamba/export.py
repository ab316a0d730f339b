"""Write the pretrained model of a run as a folder that can be shared, with its model card."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from tqdm import tqdm

import neuromamba
from neuromamba.config import Config
from neuromamba.files import InputError
from neuromamba.layout import Layout
from neuromamba.pretrain import list_training, make_record
from neuromamba.pretrained import (
    Pretrained,
    open_pretrained,
    refuse_other_grid,
    save_pretrained,
)
from neuromamba.token_store import TokenStore

PAPERS = {
    "neuromamba": [
        "NeuroMamba, NeurIPS 2025 workshop, OpenReview kftg4lmQi8",
        'T. Dao and A. Gu, "Transformers are SSMs", 2024, arXiv 2405.21060',
    ],
    "lmae": [
        "R. Cao and others, Bridging foundation models and efficient architectures, 2025, arXiv "
        "2508.16597, of which the abstract alone was at hand",
        'T. Dao and A. Gu, "Transformers are SSMs", 2024, arXiv 2405.21060',
    ],
    "roi_transformer": [
        "J. Ortega Caro and others, BrainLM, ICLR 2024, OpenReview RwI7ZEfR27",
        'K. He and others, "Masked autoencoders are scalable vision learners", 2022, arXiv '
        "2111.06377",
    ],
    "cinp": [
        "X. Hu, W. Wang and L. Xiao, Learning 3D medical image models from brain functional "
        "connectivity network supervision for mental disorder diagnosis, MICCAI 2025, arXiv "
        "2503.04205",
        'X. Kan and others, "Brain network transformer", NeurIPS 2022, arXiv 2210.06681',
        'Y. Tang and others, "Self-supervised pre-training of Swin Transformers for 3D medical '
        'image analysis", CVPR 2022, arXiv 2111.14791',
    ],
    "tablet": [
        "P. Y. Kim and others, Can natural image autoencoders compactly tokenize fMRI volumes for "
        "long-range dynamics modeling?, CVPR 2026, arXiv 2604.03619",
    ],
}
"""What a model of each family rests on."""


def run_export(config: Config, dataset: str, model: str, seed: int, folder: Path) -> None:
    """Write a pretrained model as `config.json`, `model.safetensors` and `README.md` in `folder`.

    No name of a subject or run is written.

    Raises
    ------
    InputError
        When the model's training has not finished or was under other settings, when the tokens it
        was trained on are not those of the config, or when there is something at `folder` already.
    """
    network, info = open_pretrained(config, dataset, model, seed)
    source, model = config.pretraining_of(dataset, model)
    section, members = config.models[model], config.members(source)
    layout = Layout.of(config, source)
    _, runs = list_training(config, source, section.needs)
    record = make_record(config, source, model, seed, section.pretrain, runs)
    if record["inputs"] != {name: info["inputs"].get(name) for name in record["inputs"]}:
        raise InputError(
            f"{layout.pretrain(model, seed) / 'model.json'}: the split or the runs have changed "
            "since this model was trained, so what it was trained on cannot be told; train it again"
        )
    if "tokens" in section.needs:
        store = TokenStore(layout.array("tokens", str(runs["run"].iloc[0])))
        refuse_other_grid(store, config.tokens, config.volumes)
    used = runs[~runs["run"].isin(set(info["left_out"]))]
    facts = {
        "name": model,
        "seed": seed,
        "parameters": info["parameters"],
        "spaces": sorted({config.datasets[name].space for name in members}),
        "data": [
            row
            for name in members
            for row in _count(name, info["subjects"], used, qualified=source not in members)
        ],
        "pretrained_from": _ancestors(info),
        "training": info["settings"]["pretrain"],
        "steps": info["step"],
        "best": info["best"],
    }
    regions = info["settings"].get("regions")
    codes = info["settings"].get("codes")
    pretrained = Pretrained(network, section, config.tokens, config.volumes, facts, regions, codes)
    save_pretrained(folder, pretrained, write_card(pretrained))
    tqdm.write(
        f"{folder}: {model}, {info['parameters']:,} parameters; set a licence in its README.md "
        "before sharing it",
        file=sys.stderr,
    )


def write_card(pretrained: Pretrained) -> str:
    """The model card: Markdown with the hub's YAML head."""
    template = files(neuromamba).joinpath("model_card.md.j2").read_text(encoding="utf-8")
    environment = Environment(undefined=StrictUndefined, keep_trailing_newline=True)
    facts, section = pretrained.facts, pretrained.model
    return environment.from_string(template).render(
        {
            **facts,
            "family": section.family,
            "version": neuromamba.__version__,
            "width": pretrained.network.width,
            "model": section.model_dump(mode="json"),
            "tokens": pretrained.tokens,
            "regions": pretrained.regions,
            "codes": pretrained.codes,
            "volumes": pretrained.volumes,
            "earlier": [earlier["dataset"] for earlier in facts["pretrained_from"]],
            "settings": json.dumps(facts["training"], indent=2),
            "papers": PAPERS[section.family],
        }
    )


def _count(
    dataset: str, subjects: Mapping[str, list[str]], runs: Any, qualified: bool
) -> list[dict[str, Any]]:
    """How many subjects and runs of a dataset each part of the training had."""
    start = f"{dataset}/" if qualified else ""
    rows = []
    for part, names in subjects.items():
        own = {name for name in names if name.startswith(start)}
        rows.append(
            {
                "dataset": dataset,
                "part": part,
                "subjects": len(own),
                "runs": int(runs["subject"].isin(own).sum()),
            }
        )
    return rows


def _ancestors(info: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The models that a model started from, nearest first: counts, and no names of subjects."""
    found = []
    earlier = info.get("pretrained_from")
    while earlier:
        counts = {part: len(names) for part, names in earlier["subjects"].items()}
        found.append({"dataset": earlier["dataset"], "seed": earlier["seed"], "subjects": counts})
        earlier = earlier.get("pretrained_from")
    return found

"""The page of one run's quality: facts, pictures, and what the rules say of it.

It holds its pictures and its style, asks nothing of the network, and is read on a phone as well as
on paper. What was measured stands in its head, for the stage that wrote it.
"""

from __future__ import annotations

import html
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import numpy.typing as npt

import neuromamba
from neuromamba import qc_figures
from neuromamba.config import Qc
from neuromamba.qc_metrics import Course, Images, Motion
from neuromamba.qc_plots import carpet_picture
from neuromamba.qc_rules import broken_rules, rules_of
from neuromamba.qc_table import METRICS
from neuromamba.qc_template import Template
from neuromamba.templates import environment

HEAD_BYTES = 16384
"""What a page has measured stands within its first bytes."""


@dataclass(frozen=True)
class Inputs:
    """One run's files: two stores, its confounds if it has any; the overview; fMRIPrep's report."""

    run: str
    volumes: Path
    tokens: Path
    confounds: str | None
    repetition_time: float
    overview: Path
    report: Path | None


@dataclass(frozen=True)
class Measured:
    """What a page shows, once the run has been read."""

    images: Images
    course: Course
    motion: Motion
    template: Template
    patches: npt.NDArray[np.int8]
    n_tokens: int
    attributes: dict[str, Any]


def read_page(page: Path) -> dict[str, Any] | None:
    """What a page has measured, with its key and the rules that were broken; `None` without one."""
    if not page.is_file():
        return None
    with page.open("rb") as stream:
        head = stream.read(HEAD_BYTES).decode("utf-8", errors="replace")
    found = re.search(r'<meta name="neuromamba-qc" content="([^"]*)">', head)
    try:
        return dict(json.loads(html.unescape(found[1]))) if found else None
    except ValueError:
        return None


def read_current(inputs: Inputs, page: Path, key: str, settings: Qc) -> dict[str, Any] | None:
    """What `qc.make_qc` returned for a page that would be the same now; `None` for any other."""
    known = read_page(page)
    if known is None or known["key"] != key:
        return None
    facts = {name: known[name] for name in ("key", *METRICS, "motion_note")}
    if known["said"] != _said(inputs, page, facts, settings):
        return None
    return {name: np.nan if value is None else value for name, value in facts.items()}


def _said(inputs: Inputs, page: Path, facts: dict[str, Any], settings: Qc) -> dict[str, Any]:
    """What a page says beside what was measured."""
    return {
        "rules": rules_of(settings),
        "broken": broken_rules(facts, settings),
        "report": inputs.report and _link(inputs.report, page.parent),
    }


def render_page(
    inputs: Inputs, page: Path, measured: Measured, facts: dict[str, Any], settings: Qc
) -> str:
    """The page of one run, to be written to `page`; `facts` is what `qc.make_qc` returns."""
    said = _said(inputs, page, facts, settings)
    kept = {k: None if isinstance(v, float) and not np.isfinite(v) else v for k, v in facts.items()}
    attributes = measured.attributes
    return (
        environment()
        .get_template("qc.html.j2")
        .render(
            run=inputs.run,
            stored=json.dumps({**kept, "said": said}, allow_nan=False),
            facts=[(name, metric, metric.shown(facts[name])) for name, metric in METRICS.items()],
            note=measured.motion.note,
            **said,
            settings=settings,
            denoised=describe_denoising(attributes),
            space=str(attributes.get("space", "unknown space")),
            source=Path(str(attributes.get("source", "volumes of unknown origin"))).name,
            overview=_link(inputs.overview, page.parent),
            pictures=_pictures(inputs, measured, settings),
            cuts=", ".join(f"{name} = {mm}" for name, mm in qc_figures.CUTS_MM),
            n_high=0
            if measured.motion.fd is None
            else int((np.nan_to_num(measured.motion.fd) > settings.fd_threshold).sum()),
            n_lost=int((measured.images.mask & (measured.patches == 0)).sum()),
            version=neuromamba.__version__,
        )
    )


def _pictures(inputs: Inputs, measured: Measured, settings: Qc) -> dict[str, str]:
    images, template = measured.images, measured.template
    brain = template.brain if template.brain.any() else images.mask
    mosaic = qc_figures.plan_mosaic(brain, images.affine)
    mean, mask = images.mean, images.mask
    return {
        "mean": qc_figures.mean_picture(mean, mask, template, mosaic),
        "sd": qc_figures.map_picture(images.sd, mask, mosaic, "SD over time"),
        "tsnr": qc_figures.map_picture(images.tsnr, mask, mosaic, "tSNR"),
        "tokens": qc_figures.token_picture(mean, mask, measured.patches, mosaic),
        "carpet": carpet_picture(
            measured.course, measured.motion, settings.fd_threshold, inputs.repetition_time
        ),
    }


def describe_denoising(attributes: dict[str, Any]) -> list[str]:
    """What was taken out of the signal, one thing an item; empty where nothing was."""
    done = attributes.get("denoise") or {}
    n_columns = len(done.get("columns") or [])
    items = []
    if n_columns:
        items.append(f"{n_columns} confounds regressed out ({', '.join(done['strategy'])})")
    for name, words in (("dropped", "before the steady state"), ("scrubbed", "of high motion")):
        if done.get(name):
            items.append(f"{len(done[name])} volumes {words} taken out")
    if done.get("detrend"):
        items.append("linear trend taken out")
    for name, words in (("high_pass", "below"), ("low_pass", "above")):
        if done.get(name):
            items.append(f"frequencies {words} {done[name]:g} Hz taken out")
    if done.get("repetition_time"):
        items.append(f"resampled to a TR of {done['repetition_time']:g} s")
    if attributes.get("smoothing"):
        items.append(f"smoothed by {attributes['smoothing']:g} mm (FWHM)")
    return items


def _link(target: Path, folder: Path) -> str:
    """A relative address from a page in `folder`."""
    return quote(Path(os.path.relpath(target, folder)).as_posix())

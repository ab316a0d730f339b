"""Windows of a new scan, made by the code of the data stages for a while."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from neuromamba.anat import make_anat
from neuromamba.anat_scan import Anatomical
from neuromamba.batches import Windows, make_readers
from neuromamba.codes import make_codes
from neuromamba.config import Codes, Rois
from neuromamba.files import InputError
from neuromamba.fitness import as_read, refuse_short
from neuromamba.layout import Layout
from neuromamba.paired_windows import ImageWindows, NoNetworks
from neuromamba.predictor import Predictor
from neuromamba.rois import make_rois
from neuromamba.runtime import FULL
from neuromamba.store import READ_VOLUMES
from neuromamba.tokens import make_tokens
from neuromamba.volumes import Source, make_volumes


@contextmanager
def scan_windows(predictor: Predictor, source: Source) -> Iterator[tuple[Windows, int]]:
    """Prepare one run in a temporary folder, which stays for the length of the block.

    With its windows comes the number of volumes that are left to be read, in whole time patches.

    Raises
    ------
    InputError
        When the run cannot be used.
    """
    with _temporary_layout() as layout:
        with _told_when_full(layout):
            n_volumes = _prepare(predictor, source, layout)
        readers = make_readers(predictor.network, layout, predictor.model, predictor.tokens)
        yield Windows({source.subject: [source.run]}, readers), n_volumes


@contextmanager
def image_windows(predictor: Predictor, image: Anatomical) -> Iterator[Windows]:
    """The same of one T1w image, of somebody of whom there is no connectivity.

    Raises
    ------
    InputError
        When the image cannot be used.
    """
    subject = image.subject
    with _temporary_layout() as layout:
        with _told_when_full(layout):
            store = layout.array("anat", subject)
            make_anat(image, store, predictor.space, predictor.volumes)
        networks = NoNetworks(predictor.network.n_rois)
        yield Windows({subject: [subject]}, [networks, ImageWindows(lambda _: store)])


@contextmanager
def _temporary_layout() -> Iterator[Layout]:
    with tempfile.TemporaryDirectory(prefix="neuromamba-predict-") as folder:
        yield Layout(Path(folder), "scan")


@contextmanager
def _told_when_full(layout: Layout) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise InputError(
            f"{layout.results}: the disk is full; free some space, or set TMPDIR to another folder"
        ) from error


def _prepare(predictor: Predictor, source: Source, layout: Layout) -> int:
    """Make what the model reads of a run; returns how many volumes that has."""
    tokens, volumes = predictor.tokens, predictor.volumes
    store = layout.array("volumes", source.run)
    made = make_volumes(source, store, volumes, tokens.time_patch)
    seconds = volumes.denoise.repetition_time or source.repetition_time
    n_volumes = int(made["n_volumes"])
    refuse_short(predictor, n_volumes, seconds, f"{source.bold}, after denoising,")
    if predictor.encoder is not None:
        assert predictor.codes is not None
        how = Codes(normalization=predictor.codes["normalization"])
        target, shard = layout.array("codes", source.run), volumes.shard_volumes
        make_codes(store, target, predictor.encoder, how, shard)
    elif predictor.atlas is not None:
        make_rois(store, layout.array("rois", source.run), predictor.atlas, READ_VOLUMES, Rois())
    else:
        make_tokens(store, layout.array("tokens", source.run), tokens, volumes.shard_volumes)
    return as_read(predictor, n_volumes, seconds) // tokens.time_patch * tokens.time_patch

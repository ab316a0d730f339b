"""Windows of a new scan, made by the code of the data stages for a while."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from neuromamba.batches import Windows, make_readers
from neuromamba.codes import make_codes
from neuromamba.config import Codes, Rois
from neuromamba.files import InputError
from neuromamba.fitness import as_read, refuse_short
from neuromamba.layout import Layout
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
    tokens = predictor.tokens
    with tempfile.TemporaryDirectory(prefix="neuromamba-predict-") as folder:
        layout = Layout(Path(folder), "scan")
        try:
            n_volumes = _prepare(predictor, source, layout)
        except OSError as error:
            if error.errno not in FULL:
                raise
            raise InputError(
                f"{folder}: the disk is full; free some space, or set TMPDIR to another folder"
            ) from error
        readers = make_readers(predictor.network, layout, predictor.model, tokens)
        yield Windows({source.subject: [source.run]}, readers), n_volumes


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

"""Windows of a new scan, made by the code of the stages `volumes` and `tokens` for a while."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from neuromamba.batches import Windows, make_readers
from neuromamba.files import InputError
from neuromamba.fitness import refuse_short
from neuromamba.layout import Layout
from neuromamba.predictor import Predictor
from neuromamba.runtime import FULL
from neuromamba.tokens import make_tokens
from neuromamba.volumes import Source, make_volumes


@contextmanager
def scan_windows(predictor: Predictor, source: Source) -> Iterator[tuple[Windows, int]]:
    """Prepare one run in a temporary folder, which stays for the length of the block.

    With its windows comes the number of volumes that are left after denoising, in whole time
    patches.

    Raises
    ------
    InputError
        When the run cannot be used.
    """
    tokens, volumes = predictor.tokens, predictor.volumes
    with tempfile.TemporaryDirectory(prefix="neuromamba-predict-") as folder:
        layout = Layout(Path(folder), "scan")
        stores = [layout.array(stage, source.run) for stage in ("volumes", "tokens")]
        try:
            make_volumes(source, stores[0], volumes, tokens.time_patch)
            facts = make_tokens(stores[0], stores[1], tokens, volumes.shard_volumes)
        except OSError as error:
            if error.errno not in FULL:
                raise
            raise InputError(
                f"{folder}: the disk is full; free some space, or set TMPDIR to another folder"
            ) from error
        n_volumes = facts["n_time_patches"] * tokens.time_patch
        refuse_short(predictor, n_volumes, f"{source.bold}, after denoising,")
        readers = make_readers(predictor.network, layout, predictor.model, tokens)
        yield Windows({source.subject: [source.run]}, readers), n_volumes

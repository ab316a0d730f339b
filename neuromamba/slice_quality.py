"""What a code of slices keeps, beside that of simpler codes of equal size.

Design choices, all ours
------------------------
- Codes of equal size are those with as many values a slice. Beside a trained autoencoder stand the
  principal components of slices of the same training subjects, which are the best linear code of
  what they are fitted on, and the lowest frequencies of the discrete cosine transform, which knows
  no data at all.
- Every code goes through float16, as codes are stored.
- Errors are of subjects that neither code has seen, and told as shares of the variance that are
  explained: of the slices about the mean slice of the training, which is mostly anatomy; and of the
  difference between two times of the same slice, which is what a model of fMRI reads.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import pandas as pd
from scipy.fft import dctn, idctn
from sklearn.decomposition import PCA

from neuromamba.slices import Floats

Code = Callable[[Floats], Floats]
"""From slices (slice, row, column) to what is left of them after coding and decoding."""


def measure_codes(codes: Mapping[str, Code], pairs: Floats, mean: Floats) -> pd.DataFrame:
    """Errors of codes.

    Parameters
    ----------
    codes
        By name.
    pairs
        (slice, 2, row, column) slices at two times, in [-1, 1].
    mean
        (row, column) mean slice of the training.

    Returns
    -------
    pandas.DataFrame
        `code`; `mse`, the mean squared error; `explained` and `explained_changes`, shares of the
        variance of slices and of their changes between the two times (missing where nothing
        changes). Negative where the code is worse than the mean slice, or than no change.
    """
    flat = pairs.reshape(-1, *pairs.shape[2:])
    spread = np.square(flat - mean, dtype=np.float64).mean()
    changes = (pairs[:, 1] - pairs[:, 0]).astype(np.float64)
    power = np.square(changes).mean()
    rows = []
    for name, code in codes.items():
        again = code(flat).astype(np.float64)
        error = np.square(again - flat).mean()
        both = again.reshape(pairs.shape)
        missed = np.square(both[:, 1] - both[:, 0] - changes).mean()
        rows.append(
            {
                "code": name,
                "mse": error,
                "explained": 1 - error / spread,
                "explained_changes": 1 - missed / power if power > 0 else np.nan,
            }
        )
    return pd.DataFrame(rows)


def principal_components(slices: Floats, size: int) -> Code:
    """A code by the first `size` principal components of slices (slice, row, column).

    Of n slices there are at most n - 1.
    """
    model = PCA(min(size, len(slices) - 1), svd_solver="full")
    model.fit(slices.reshape(len(slices), -1).astype(np.float64))

    def code(images: Floats) -> Floats:
        scores = _stored(model.transform(images.reshape(len(images), -1)))
        return model.inverse_transform(scores).reshape(images.shape).astype(np.float32)

    return code


def cosine_transform(edge: int, size: int) -> Code:
    """A code by the `size` lowest frequencies of the two-dimensional cosine transform."""
    row, column = np.indices((edge, edge))
    order = np.argsort((row**2 + column**2).ravel(), kind="stable")
    kept = np.zeros(edge**2, dtype=bool)
    kept[order[:size]] = True

    def code(images: Floats) -> Floats:
        found = dctn(images.astype(np.float64), axes=(1, 2), norm="ortho")
        stored = np.where(kept.reshape(edge, edge), _stored(found), 0)
        return np.asarray(idctn(stored, axes=(1, 2), norm="ortho"), dtype=np.float32)

    return code


def _stored(values: np.ndarray) -> np.ndarray:
    return values.astype(np.float16).astype(np.float64)

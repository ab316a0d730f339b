"""BIDS-style tables: tab-separated, one header line, `n/a` where a value is missing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd

from neuromamba.files import InputError, write_text


def write_table(path: Path | str, table: pd.DataFrame) -> None:
    """Write `table` to `path` atomically as BIDS-style TSV: missing values are `n/a`, no index."""
    write_text(path, table.to_csv(sep="\t", index=False, na_rep="n/a", lineterminator="\n"))


def read_table(path: Path | str, **kwargs: Any) -> pd.DataFrame:
    """Read a BIDS-style table: TSV, or CSV when the name ends in `.csv`; `n/a` is missing.

    Raises
    ------
    InputError
        When the file does not exist or is not a table.
    """
    path = Path(path)
    separator = "," if path.suffix.lower() == ".csv" else "\t"
    options: dict[str, Any] = {"keep_default_na": False, "na_values": ["n/a", "N/A", ""], **kwargs}
    try:
        return pd.read_csv(path, sep=separator, **options)
    except FileNotFoundError:
        raise InputError(f"{path} does not exist") from None
    except (pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeDecodeError) as error:
        raise InputError(
            f"{path} is not a readable table ({error}); repair or replace it"
        ) from None

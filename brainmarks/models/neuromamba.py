"""Registers NeuroMamba with Brainmarks, which imports every module of this namespace package.

There must be no `__init__.py` here or above: these folders belong to several distributions.
"""

from __future__ import annotations

from typing import Any

from brainmarks.models.registry import register_model

from neuromamba.brainmarks import BrainmarksModel, BrainmarksTransform, open_model


@register_model
def neuromamba(**kwargs: Any) -> tuple[BrainmarksTransform, BrainmarksModel]:
    """A folder that `neuromamba export` wrote; for the arguments see `open_model`."""
    return open_model(**kwargs)

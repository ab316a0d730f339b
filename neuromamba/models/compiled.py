"""Functions that are compiled where it pays: on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, wraps
from typing import ParamSpec, TypeVar

import torch
from torch.utils._triton import has_triton

P = ParamSpec("P")
T = TypeVar("T")


def compiled_on_gpu(function: Callable[P, T]) -> Callable[P, T]:
    """Compile a pure function of tensors at its first call, where torch has Triton.

    Elsewhere (a GPU on Windows, a build without Triton) it is called as it is: the same numbers,
    more slowly. Lengths vary from batch to batch, so one kernel is made for all of them.
    """

    @cache
    def chosen() -> Callable[P, T]:
        return torch.compile(function, dynamic=True, fullgraph=True) if has_triton() else function

    @wraps(function)
    def call(*arguments: P.args, **keywords: P.kwargs) -> T:
        return chosen()(*arguments, **keywords)

    return call

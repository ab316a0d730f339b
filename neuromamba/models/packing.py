"""Windows of several runs in one sequence, one after the other, without padding.

A window of P patches and T time patches is a part of P rows of every (N, T, ...) tensor of a batch,
and a part of P * T steps of the sequence that the model reads.

Dimensions in names: N patches of all windows, T time patches, L = N * T steps.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

Order = Literal["t-fastest", "space-fastest"]


class Packing(NamedTuple):
    """How the windows of a batch lie in the sequence.

    Attributes
    ----------
    patches : list of int
        Patches of each window.
    n_time : int
        Time patches of every window.
    order : str
        Within a window: `t-fastest` is all time patches of the first patch, then of the next;
        `space-fastest` is all patches of the first time patch, then of the next.
    """

    patches: list[int]
    n_time: int
    order: Order

    @property
    def steps(self) -> list[int]:
        """Steps of each window."""
        return [count * self.n_time for count in self.patches]

    def to_sequence(self, v_NT: Tensor) -> Tensor:
        """(N, T, ...) -> (L, ...)."""
        if self.order == "t-fastest":
            return v_NT.flatten(0, 1)
        return torch.cat([part.transpose(0, 1).flatten(0, 1) for part in v_NT.split(self.patches)])

    def to_grid(self, v_L: Tensor) -> Tensor:
        """(L, ...) -> (N, T, ...), the inverse of `to_sequence`."""
        if self.order == "t-fastest":
            return v_L.unflatten(0, (-1, self.n_time))
        parts = v_L.split(self.steps)
        return torch.cat([part.unflatten(0, (self.n_time, -1)).transpose(0, 1) for part in parts])

    def seq_idx(self, device: torch.device) -> Tensor | None:
        """The window of each step, (1, L) int32; `None` where there is only one."""
        if len(self.patches) == 1:
            return None
        windows = torch.arange(len(self.patches), dtype=torch.int32)
        return windows.repeat_interleave(torch.tensor(self.steps)).to(device)[None]


def mean_of_windows(parts: tuple[Tensor, ...]) -> Tensor:
    """The mean over windows of each one's mean: every window counts the same, long or short."""
    return torch.stack([part.mean() for part in parts]).mean()

"""NeuroMamba as one would first write it from the papers, with torch's own layers and autograd.

Grouped `nn.Conv1d`, `F.silu`, the listing of the Mamba-2 paper for the scan, in float32, one window
at a time. Parameters bear the names of `neuromamba.models.NeuroMamba`, so that the weights of one
load into the other.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from ssd_rivals import listing
from torch import Tensor, nn

from neuromamba.config.schema import NeuroMamba as Settings


class RMSNorm(nn.Module):
    """x / rms(x) * weight."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5) * self.weight


class Mixer(nn.Module):
    """The Mamba-2 layer: projections, convolution, scan, gated norm."""

    def __init__(self, s: Settings) -> None:
        super().__init__()
        inner = s.expand * s.width
        self.heads, self.chunk = inner // s.head_dim, s.chunk
        self.sizes = [inner, inner + 2 * s.state, self.heads]
        self.in_proj = nn.Linear(s.width, sum(self.sizes), bias=False)
        channels = self.sizes[1]
        self.conv = nn.Conv1d(channels, channels, s.conv, padding=s.conv - 1, groups=channels)
        self.splits = [inner, s.state, s.state]
        self.dt_bias = nn.Parameter(torch.zeros(self.heads))
        self.A_log = nn.Parameter(torch.zeros(self.heads))
        self.D = nn.Parameter(torch.ones(self.heads))
        self.norm = RMSNorm(inner)
        self.out_proj = nn.Linear(inner, s.width, bias=False)

    def forward(self, u: Tensor) -> Tensor:
        z, xBC, dt = self.in_proj(u).split(self.sizes, dim=-1)
        xBC = F.silu(self.conv(xBC.transpose(1, 2))[..., : u.shape[1]].transpose(1, 2))
        x, B, C = xBC.split(self.splits, dim=-1)
        dt = F.softplus(dt + self.dt_bias)
        x = x.unflatten(-1, (self.heads, -1))
        y = listing(x, dt, -self.A_log.exp(), B, C, self.D, self.chunk)
        return self.out_proj(self.norm(y.flatten(2) * F.silu(z)))


class Block(nn.Module):
    """RMSNorm -> Mamba-2 -> residual."""

    def __init__(self, s: Settings) -> None:
        super().__init__()
        self.norm = RMSNorm(s.width)
        self.mixer = Mixer(s)

    def forward(self, h: Tensor) -> Tensor:
        return h + self.mixer(self.norm(h))


class NaiveNeuroMamba(nn.Module):
    """Next-patch prediction, time fastest, mean squared error; see the models' own docstrings."""

    def __init__(self, s: Settings, patch_values: int) -> None:
        super().__init__()
        self.bands = s.bands
        self.embedding = nn.Linear(patch_values, s.width)
        self.position = nn.Linear(4 * (1 + 2 * s.bands), s.width)
        self.blocks = nn.ModuleList(Block(s) for _ in range(s.depth))
        self.norm = RMSNorm(s.width)
        self.head = nn.Linear(s.width, patch_values)

    def loss(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """The mean over the windows of each one's mean squared error."""
        counts = batch["patches"].tolist()
        pairs = zip(batch["tokens"].split(counts), batch["centers"].split(counts), strict=True)
        return {"loss": torch.stack([self.window_loss(t, c) for t, c in pairs]).mean()}

    def window_loss(self, tokens: Tensor, centers: Tensor) -> Tensor:
        n_patches, n_time, _ = tokens.shape
        t = (torch.arange(n_time, device=tokens.device) + 0.5) / n_time
        place = self.encode_coordinates(centers)[:, None].expand(-1, n_time, -1)
        time = self.encode_coordinates(t[:, None])[None].expand(n_patches, -1, -1)
        h = self.embedding(tokens) + self.position(torch.cat([place, time], dim=-1))
        h = h.flatten(0, 1)[None]
        for block in self.blocks:
            h = block(h)
        prediction = self.head(self.norm(h))[0]
        return F.mse_loss(prediction[:-1], tokens.flatten(0, 1)[1:])

    def encode_coordinates(self, x: Tensor) -> Tensor:
        angles = (x[..., None] * 2.0 ** torch.arange(self.bands, device=x.device)).flatten(-2)
        return torch.cat([x, angles.sin(), angles.cos()], dim=-1)


OURS = {"conv_weight": "conv.weight", "conv_bias": "conv.bias", "norm_weight": "norm.weight"}


def name_here(name: str) -> str:
    """Our parameter's name in the naive model."""
    stem, _, last = name.rpartition(".")
    return f"{stem}.{OURS.get(last, last)}" if stem.endswith("mixer") else name


def naive_copy(ours: nn.Module, settings: Settings, patch_values: int) -> NaiveNeuroMamba:
    """The naive model with the weights of ours."""
    naive = NaiveNeuroMamba(settings, patch_values)
    wanted = naive.state_dict()
    given = {name_here(name): value for name, value in ours.state_dict().items()}
    naive.load_state_dict({name: given[name].reshape(v.shape) for name, v in wanted.items()})
    return naive

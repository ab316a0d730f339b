"""Which tokens of a window of codes are hidden from a model, and what honest guesses of them get.

Masks are drawn as `neuromamba.models.roi_masks` says: from torch's global generator in training,
and the same each time in evaluation; on the CPU, and so the same on every device.

Dimensions in names: B samples, T volumes, N tokens of a volume, L = T * N tokens of a window, M
hidden ones of a window, W values.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from neuromamba.models.roi_masks import mask_generator

Kind = Literal["tube", "random", "time"]
Target = Literal["normed", "raw", "changes"]


def hidden_count(kind: Kind, volumes: int, tokens: int, share: float) -> int:
    """How many tokens of a window are hidden, M: the nearest number to the share, never all."""
    of = {"tube": tokens, "time": volumes, "random": volumes * tokens}[kind]
    count = min(max(1, round(share * of)), of - 1)
    return count * volumes * tokens // of


def draw_hidden(
    kind: Kind, samples: int, volumes: int, tokens: int, share: float, training: bool
) -> Tensor:
    """The places that are hidden, ascending: (B, M) int64 into a window's tokens, on the CPU.

    Parameters
    ----------
    kind
        `tube`: the same tokens at all times; `time`: all tokens at some times; `random`: any.
    samples, volumes, tokens
        B, T and N.
    share
        Of what is drawn: of the tokens of a volume, the volumes, or all tokens.
    training
        Whether masks differ from call to call.
    """
    shape = {"tube": (1, tokens), "time": (volumes, 1), "random": (volumes, tokens)}[kind]
    count = hidden_count(kind, volumes, tokens, share) * shape[0] * shape[1] // (volumes * tokens)
    places = []
    for _ in range(samples):
        score = torch.rand(shape, generator=mask_generator(training))
        hidden = torch.zeros(score.numel(), dtype=torch.bool)
        hidden[score.flatten().argsort()[:count]] = True
        places.append(hidden.view(shape).expand(volumes, tokens).flatten().nonzero()[:, 0])
    return torch.stack(places)


def take(of_BLW: Tensor, places_BM: Tensor) -> Tensor:
    """(B, L, W) -> (B, M, W)."""
    return of_BLW.gather(1, places_BM[..., None].expand(-1, -1, of_BLW.shape[-1]))


def targets_of(codes_BTNW: Tensor, target: Target) -> Tensor:
    """What a model learns to tell of each token, of the shape of the codes.

    `normed`: each token minus its mean over its values and divided by their SD, as masked
    autoencoders do with patches (arXiv 2111.06377, section 4.1). `raw`: the codes. `changes`: the
    codes minus each value's mean over the window's volumes, divided by the SD of what is left over
    all values and volumes of the token.
    """
    if target == "normed":
        return torch.nn.functional.layer_norm(codes_BTNW, codes_BTNW.shape[-1:])
    if target == "raw":
        return codes_BTNW
    return split_changes(codes_BTNW, torch.ones_like(codes_BTNW[..., 0]))[1]


def split_changes(codes_BTNW: Tensor, seen_BTN: Tensor) -> tuple[Tensor, Tensor]:
    """What of each token stays in a window, and what changes.

    Parameters
    ----------
    seen_BTN
        1 where a token is looked at, else 0.

    Returns
    -------
    tuple of Tensor
        Means over the volumes, (B, 1, N, W). Changes about them, divided by their SD over all
        values and volumes of the token: of the codes' shape, 0 where a token is not looked at.
    """
    count_B1N1 = seen_BTN.sum(1, keepdim=True)[..., None].clamp(min=1)
    mean_B1NW = torch.einsum("btnw,btn->bnw", codes_BTNW, seen_BTN)[:, None] / count_B1N1
    changes_BTNW = (codes_BTNW - mean_B1NW) * seen_BTN[..., None]
    variance_B1N1 = changes_BTNW.square().mean(3).sum(1, keepdim=True)[..., None] / count_B1N1
    # A token that does not change, outside of the brain, is 0 and not noise blown up.
    return mean_B1NW, changes_BTNW / variance_B1N1.sqrt().clamp(min=1e-6)


@torch.no_grad()
def reference_errors(target_BTNW: Tensor, places_BM: Tensor, kind: Kind) -> dict[str, Tensor]:
    """Mean squared errors of two guesses that learn nothing, over the hidden tokens.

    Returns
    -------
    dict of scalar Tensors
        ``mse_visible``: the mean of what is visible: of the same token at other times, or, where
        it is never visible (`tube`), of the other tokens of the same volume. ``mse_static``: each
        token's own mean over the window, hidden volumes included, which nobody could know; what
        this guess does not tell is change in time alone.
    """
    samples, volumes, tokens, _ = target_BTNW.shape
    time_BM, token_BM = places_BM // tokens, places_BM % tokens
    wanted_BMW = take(target_BTNW.flatten(1, 2), places_BM)
    seen_BL = torch.ones(samples, volumes * tokens, device=target_BTNW.device)
    seen_BTN = seen_BL.scatter(1, places_BM, 0.0).view(samples, volumes, tokens)
    if kind == "tube":
        sums = torch.einsum("btnw,btn->btw", target_BTNW, seen_BTN)
        visible = take(sums / seen_BTN.sum(2, keepdim=True), time_BM)
    else:
        sums = torch.einsum("btnw,btn->bnw", target_BTNW, seen_BTN)
        visible = take(sums / seen_BTN.sum(1)[..., None].clamp(min=1), token_BM)
    static = take(target_BTNW.mean(1), token_BM)
    guesses = {"visible": visible, "static": static}
    return {f"mse_{name}": (wanted_BMW - one).square().mean() for name, one in guesses.items()}

"""What runs in the processes that `test_cinp.py` starts: the gradient of a part of a batch."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from small_cinp import cinp, make_batch, rows

from neuromamba.distributed import World, join, wrap

SAMPLES, STEP = 6, 3


def lone_batch() -> dict[str, torch.Tensor]:
    """A batch with somebody who has an image alone, and somebody who has none."""
    batch = make_batch(SAMPLES)
    batch["has_fc"][1] = False
    batch["has_anat"][4] = False
    batch["person"][5] = batch["person"][0]
    return batch


def gradients(world: World, **changes) -> dict[str, torch.Tensor]:
    """Gradients of all parameters and the scalars, summed as the training loop does."""
    model = cinp(**changes).double().train()
    share = world.share(SAMPLES)
    batch = rows(lone_batch(), slice(world.rank * share, (world.rank + 1) * share))
    batch = {n: v.double() if v.is_floating_point() else v for n, v in batch.items()}
    loss = wrap(model, world)
    torch.manual_seed(STEP + world.rank)
    scalars = loss(batch)
    scalars["loss"].backward()
    found = {name: one.grad for name, one in model.named_parameters()}
    for name, value in scalars.items():
        found[f"scalar.{name}"] = world.sum(value.detach().double().clone()) / world.size
    return {name: value.contiguous() for name, value in found.items()}


if __name__ == "__main__":
    here = join()
    for kind, chosen in {"whole": {}, "chunks": {"chunk": 2}}.items():
        kept = gradients(here, **chosen)
        if here.leads:
            save_file(kept, Path(sys.argv[1]) / f"{kind}.safetensors")
